"""What kernels execute, counted without a GPU, phase by phase, and the time that follows.

    python -m bench.counts [NAMES ...] [--gpu NAME ...] [--precision P ...]   counts and prints
    python -m bench.counts --write [NAMES ...] [--label TEXT]                 counts what is kept in BUDGETS, writes it
                                                                              anew, and the documents with it

The emulator of PTX runs the kernels as compiled (bench/workloads.py). For one program it counts how often each
instruction runs and how much shared and global memory it moves. The line table of the machine code names the PTX that
each of its instructions comes from, so the counts carry over to what really runs (bench/execution.py); the stalls and
waits that the assembler wrote into the code give the time of a warp alone. bench/gpus.py computes times from these, by
documented rates. All figures are those of program 0, the busiest.

    instructions           of a warp
    issue                  issue slots of a scheduler, one instruction a clock
    wavefronts             of shared memory, of the program, from the least to the most (engine/count.h)
    sectors                of 32 bytes of global memory
    exposed                latencies of a load from L2 that a warp alone waits out
    barriers, grid         barriers of the program, of all programs
    atomics                of all lanes
    us                     from the least to the most

tests/gpuless/test_counts.py counts again, and fails where a figure has got worse than in BUDGETS.
"""

import argparse
import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import gpus, recording
from bench.execution import KINDS, Launch, Row, add, rows_of
from bench.gpus import GPUS, Gpu
from bench.recording import Recording
from bench.resources import require_compiler
from bench.workloads import WORKLOADS
from mlp_fast.cli import run_main
from mlp_fast.errors import UserError
from mlp_fast.kernels._runtime import LEAST_CAPABILITY
from mlp_fast.measure.table import table

BUDGETS = Path(__file__).resolve().parent.parent / "tests" / "gpuless" / "budgets.json"
FIGURES = ("instructions", "issue", "wavefronts", "sectors", "exposed", "barriers", "grid_barriers", "atomics")
PAIRS = ("wavefronts", "us")  # from the least to the most
SUM = "sum"

Counted = dict[str, Any]  # as counted() returns it, and as BUDGETS has it


def counted(name: str, gpu: str, precision: str, programs: Sequence[int], phases: Mapping[str, Row]) -> Counted:
    """A workload on a GPU: the programs of its launches, its phases in the order of the code, and their sum."""

    def figures(row: Row) -> dict[str, Any]:
        row = {"instructions": sum(row.get(kind, 0) for kind in KINDS), **row}
        single = {name: round(row.get(name, 0.0), 2) for name in FIGURES}
        return single | {name: [round(row.get(f"{name}_{end}", 0.0), 2) for end in ("low", "high")] for name in PAIRS}

    total: Row = {}
    for row in phases.values():
        add(total, row)
    kinds = {kind: round(total.get(kind, 0)) for kind in KINDS}
    key = {"name": name, "gpu": gpu, "precision": precision, "programs": list(programs)}
    return {**key, "phases": {p: figures(row) for p, row in phases.items()}, SUM: {**figures(total), "kinds": kinds}}


@functools.cache
def launches(name: str, sm: int, processors: int, precision: str) -> list[Launch]:
    """The launches of a workload, emulated once for all GPUs of an architecture and as many multiprocessors."""
    gpu = next(gpu for gpu in GPUS.values() if (gpu.sm, gpu.processors) == (sm, processors))
    return WORKLOADS[name].launches(gpu, precision)


def count(name: str, gpu: Gpu, precision: str) -> Counted:
    """Compiles, emulates and counts a workload as it is on a GPU."""
    found = launches(name, gpu.sm, gpu.processors, precision)
    phases: dict[str, Row] = {}
    for launch in found:
        for phase, row in rows_of(launch, gpu).items():
            if round(sum(row.get(kind, 0) for kind in KINDS)):
                add(phases.setdefault(phase, {}), row)
    if name.startswith("triton-step"):  # whose kernels are nodes of a captured graph
        low, high = (len(found) * gpus.wait_us(gpu, "node", high) for high in (False, True))
        phases["ends of kernels"] = {"us_low": low, "us_high": high}
    return counted(name, gpu.name, precision, [launch.programs for launch in found], phases)


def worse(counted: Counted, budget: Counted) -> list[str]:
    """Where a count exceeds its budget; of a pair the larger figure counts. A new phase counts in the sum only."""
    found = []
    for phase, row in {**counted["phases"], SUM: counted[SUM]}.items():
        most = budget[SUM] if phase == SUM else budget["phases"].get(phase)
        for name in FIGURES if most else ():
            ours, allowed = (x[name][1] if name in PAIRS else x[name] for x in (row, most))
            if ours > allowed:
                found.append(f"{counted['name']}, {counted['precision']}, {phase}: {name} {allowed:,} -> {ours:,}")
    return found


def measured_us(counted: Counted, records: Iterable[Recording]) -> float | None:
    """The time of a workload on such a GPU in the first of the recordings that has it: of each device the latest."""
    workload, gpu = WORKLOADS[counted["name"]], GPUS[counted["gpu"]]
    here = (record for record in records if gpus.is_measured_on(gpu, record.facts["device"]))
    entries = (record.entry(workload.group, workload.id.format(counted["precision"])) for record in here)
    return next((1e3 * float(entry["ms"]["median"]) for entry in entries if entry), None)


# --- tables ----------------------------------------------------------------------------------------------------------


def _cell(figure: Any, decimals: int) -> str:
    """A figure, or a pair from the least to the most; text as it is, and a dash for None."""
    if figure is None or isinstance(figure, str):
        return figure or "–"
    ends = figure if isinstance(figure, list) else [figure]
    return "..".join(f"{x:,.{decimals}f}" for x in dict.fromkeys(ends))


def _table(corner: str, rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, int]) -> str:
    """Rows of figures by name; columns: the names of those to show, with their decimals."""
    header = [corner, *(name.replace("grid_barriers", "grid") for name in columns)]
    return table(header, [[label, *(_cell(row.get(c), n) for c, n in columns.items())] for label, row in rows.items()])


def _label(counted: Counted) -> str:
    return f"{counted['name']}, {counted['precision']}"


def phases_table(counted: Counted, columns: Mapping[str, int], corner: str = "phase", least: float = 0) -> str:
    """The phases of a workload whose time may be so many microseconds or more, and their sum."""
    rows = {**counted["phases"], SUM: counted[SUM]}
    return _table(corner, {phase: row for phase, row in rows.items() if row["us"][1] >= least}, columns)


def brief_phases(name: str, gpu: str) -> str:
    """The phases that take time, of a workload in every precision that is kept."""
    columns = {"instructions": 0, "wavefronts": 0, "exposed": 1, "us": 1}
    return "\n\n".join(phases_table(c, columns, f"{_label(c)}, {gpu}", 0.1) for c in chosen(name, gpu))


def times_table(kept: Sequence[Counted], records: Sequence[Recording]) -> str:
    """Microseconds of workloads by GPU, and what was measured behind them where a recording has it."""
    rows: dict[str, dict[str, str]] = {}
    for c in kept:
        measured = measured_us(c, records)
        behind = f", measured {measured:.1f}" if measured else ""
        rows.setdefault(_label(c), {})[c["gpu"]] = _cell(c[SUM]["us"], 1) + behind
    return _table("us", rows, {gpu: 1 for gpu in GPUS if any(gpu in row for row in rows.values())})


def bounds_table(kept: Sequence[Counted], records: Sequence[Recording]) -> str:
    """Microseconds of workloads on a GPU, beside the lower bound of each."""
    rows = {
        f"{_label(c)}, {c['gpu']}": {
            "lower bound": gpus.bound_us(GPUS[c["gpu"]], WORKLOADS[c["name"]].cost, c["precision"]),
            "counted": c[SUM]["us"],
            "measured": measured_us(c, records),
        }
        for c in kept
    }
    return _table("us", rows, {"lower bound": 2, "counted": 1, "measured": 1})


def work_table(kept: Sequence[Counted]) -> str:
    """What workloads execute on one GPU."""
    rows = {}
    for c in kept:
        arithmetic = c[SUM]["kinds"]["fp32"] + c[SUM]["kinds"]["tensor"]
        programs = " + ".join(f"{n:,}" for n in c["programs"])
        rows[_label(c)] = {**c[SUM], "programs": programs, "arithmetic": arithmetic}
    columns = ("programs", "instructions", "arithmetic", "wavefronts", "sectors", "exposed")
    return _table("", rows, dict.fromkeys(columns, 0))


def history_table(entries: Sequence[dict[str, Any]]) -> str:
    """The persistent step as it was counted, change by change."""
    tables = []
    for precision in PRECISIONS:
        rows = {}
        for entry in entries:
            sums = {s["gpu"]: s for s in entry["sums"] if (s["name"], s["precision"]) == (STEPS[0], precision)}
            rows[entry["label"]] = {**sums["H100"], **{f"us, {gpu}": sums[gpu]["us"] for gpu in ("H100", "A100")}}
        columns = {"issue": 0, "wavefronts": 0, "exposed": 0, "us, H100": 1, "us, A100": 1}
        tables.append(_table(f"{STEPS[0]}, {precision}", rows, columns))
    return "\n\n".join(tables)


# --- what is kept ----------------------------------------------------------------------------------------------------

STEPS = ("triton-persistent", "triton-step")
PRECISIONS = ("fp32", "tf32x3")
REMEMBERED = ("A100", "H100")  # in the history
OTHERS_ON = ("H100",)  # all but the steps are counted here


def usual() -> Iterator[tuple[str, Gpu, str]]:
    """What BUDGETS holds: steps in two precisions on every GPU, all else in fp32."""
    for name in WORKLOADS:
        for gpu in GPUS.values():
            for precision in PRECISIONS if name in STEPS else ("fp32",):
                if gpu.sm >= LEAST_CAPABILITY[precision] and (name in STEPS or gpu.name in OTHERS_ON):
                    yield name, gpu, precision


def kept() -> dict[str, Any]:
    """The contents of BUDGETS: the version of Triton that its figures hold for, and the workloads."""
    return dict(json.loads(BUDGETS.read_text()))


def chosen(name: str | None = None, gpu: str | None = None) -> list[Counted]:
    """The workloads in BUDGETS, all or those of a name or a GPU."""
    return [c for c in kept()["workloads"] if name in (None, c["name"]) and gpu in (None, c["gpu"])]


def write(names: Sequence[str], label: str | None) -> None:
    """Counts what is kept under these names, keeps the rest as it is, and brings the documents up to date.

    label: a name under which the sums of the steps are kept for good, beside those of before.
    """
    from bench import report

    old: dict[str, Any] = kept() if BUDGETS.exists() else {"workloads": [], "history": []}
    before = {(c["name"], c["gpu"], c["precision"]): c for c in old["workloads"]}
    workloads, history = [], old["history"]
    for name, gpu, precision in usual():
        if name in names:
            workloads.append(count(name, gpu, precision))
            print(f"counted: {name}, {precision}, {gpu.name}: {_cell(workloads[-1][SUM]['us'], 1)} us", flush=True)
        elif (name, gpu.name, precision) in before:
            workloads.append(before[name, gpu.name, precision])
    if label is not None:
        remembered = [c for c in workloads if c["name"] in STEPS and c["gpu"] in REMEMBERED]
        sums = [{**{key: c[key] for key in ("name", "gpu", "precision")}, **c[SUM]} for c in remembered]
        history.append({"label": label, "sums": sums})
    first, second = (",\n".join(map(json.dumps, entries)) for entries in (workloads, history))
    lists = f'"workloads": [\n{first}\n],\n"history": [\n{second}\n]'
    BUDGETS.write_text(f'{{"triton": "{version("triton")}",\n{lists}\n}}\n')
    report.update(report.ROOT, recording.RESULTS, check=False)


def show(found: Counted, records: Sequence[Recording]) -> None:
    """Prints a workload: its phases, its instructions by kind, and its time where one was measured."""
    print(f"\n{found['name']}, {found['precision']}, {found['gpu']}; programs: {found['programs']}\n")
    print(phases_table(found, {**dict.fromkeys(FIGURES, 0), "exposed": 1, "us": 2}))
    kinds = ", ".join(f"{kind} {n:,}" for kind, n in found[SUM]["kinds"].items())
    print(f"\nInstructions by kind: {kinds}.\n")
    if measured := measured_us(found, records):
        print(f"Measured: {measured:.2f} us\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.counts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAMES", help="what to count (default: the training steps)")
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=["H100"], metavar="NAME", help=", ".join(GPUS))
    parser.add_argument("--precision", nargs="+", choices=("fp32", "tf32x3", "tf32"), default=["fp32"])
    parser.add_argument("--write", action="store_true", help="count what is kept (all, or NAMES), and write it anew")
    parser.add_argument("--label", metavar="TEXT", help="with --write: remember the steps' sums under this name")
    arguments = parser.parse_args(argv)
    if arguments.label is not None and not arguments.write:
        raise UserError("--label names what --write keeps; add --write")
    require_compiler()
    if unknown := sorted(set(arguments.names) - set(WORKLOADS)):
        raise UserError(f"{unknown[0]}: nothing of that name is counted; choose from {', '.join(WORKLOADS)}")
    if arguments.write:
        write(arguments.names or list(WORKLOADS), arguments.label)
        return 0
    records = [record for recordings in recording.recorded() for record in recordings]
    for name, gpu, precision in itertools.product(arguments.names or STEPS, arguments.gpu, arguments.precision):
        if GPUS[gpu].sm >= LEAST_CAPABILITY[precision]:
            show(count(name, GPUS[gpu], precision), records)
    return 0


if __name__ == "__main__":
    run_main(main)
