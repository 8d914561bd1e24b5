"""What the machine executes, counted without a GPU, phase by phase, and the time that follows.

    python -m bench.counts [NAMES ...] [--gpu NAME ...] [--precision P ...]   counts and prints
    python -m bench.counts --write [NAMES ...] [--label TEXT]                 counts what is kept in BUDGETS, writes it
                                                                              anew, and the documents with it

Kernels, as compiled, run in the emulator of PTX (bench/workloads.py), which counts for one program how often each
instruction runs and what it takes of shared and global memory. The machine code says by its line table which PTX each
of its instructions comes from, so the counts carry over to what really runs (bench/execution.py); and the stalls and
waits that the assembler wrote into it give the time of a warp that is alone. bench/gpus.py makes times of that, from
documented rates. All figures are those of program 0, the busiest.

    instructions           of a warp
    issue                  clocks of a scheduler that issues one a clock
    wavefronts             of shared memory; the program's, from the least to the most (engine/count.h)
    sectors                of 32 bytes of global memory
    exposed                latencies of a load from L2 that a warp alone waits out
    barriers, grid         of the program, of all programs
    atomics                of all lanes
    us                     from the least to the most

BUDGETS is a promise: tests/gpuless/test_counts.py counts again, and fails where a figure has got worse.
"""

import argparse
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import gpus, recording
from bench.execution import KINDS, Launch, Row, add, rows_of
from bench.gpus import GPUS, Gpu
from bench.resources import require_compiler
from bench.workloads import WORKLOADS
from mlp_fast.cli import run_main
from mlp_fast.errors import UserError
from mlp_fast.kernels._runtime import LEAST_CAPABILITY
from mlp_fast.measure.table import table

BUDGETS = Path(__file__).resolve().parent.parent / "tests" / "gpuless" / "budgets.json"
FIGURES = ("instructions", "issue", "wavefronts", "sectors", "exposed", "barriers", "grid_barriers", "atomics")
ALL_FIGURES = "instructions issue wavefronts sectors exposed.1 barriers grid_barriers atomics us.2"
SUM = "sum"

Counted = dict[str, Any]  # as counted() makes it, and as BUDGETS has it


def counted(name: str, gpu: str, precision: str, programs: Sequence[int], phases: Mapping[str, Row]) -> Counted:
    """A workload on a GPU: the programs of its launches, its phases in the order of the code, and all of them together.

    Pairs are from the least to the most.
    """

    def figures(row: Row) -> dict[str, Any]:
        row = {"instructions": sum(row.get(kind, 0) for kind in KINDS), **row}
        got: dict[str, Any] = {name: row.get(name, 0.0) for name in FIGURES}
        got |= {name: [row.get(f"{name}_{end}", 0.0) for end in ("low", "high")] for name in ("wavefronts", "us")}
        return {name: [round(x, 2) for x in v] if isinstance(v, list) else round(v, 2) for name, v in got.items()}

    total: Row = {}
    for row in phases.values():
        add(total, row)
    kinds = {kind: round(total.get(kind, 0)) for kind in KINDS}
    key = {"name": name, "gpu": gpu, "precision": precision, "programs": list(programs)}
    return {**key, "phases": {p: figures(row) for p, row in phases.items()}, SUM: {**figures(total), "kinds": kinds}}


@functools.cache
def launches(name: str, gpu: Gpu, precision: str) -> list[Launch]:
    """A workload's, as they are on a GPU: GPUs of one architecture and as many multiprocessors have the same."""
    like = next(g for g in GPUS.values() if g[1:3] == (gpu.sm, gpu.processors))
    workload = WORKLOADS[name]
    return workload.launches(gpu, precision, workload.B) if like == gpu else launches(name, like, precision)


def count(name: str, gpu: Gpu, precision: str) -> Counted:
    """Compiles, emulates and counts a workload as it is on a GPU."""
    phases: dict[str, Row] = {}
    for launch in (found := launches(name, gpu, precision)):
        for phase, row in rows_of(launch, gpu).items():
            if round(sum(row.get(kind, 0) for kind in KINDS)):
                add(phases.setdefault(phase, {}), row)
    if name.startswith("triton-step"):  # whose kernels are nodes of a captured graph
        low, high = (len(found) * gpus.wait_us(gpu, "node", high) for high in (False, True))
        phases["ends of kernels"] = {"us_low": low, "us_high": high}
    return counted(name, gpu.name, precision, [launch.programs for launch in found], phases)


def worse(counted: Counted, budget: Counted) -> list[str]:
    """Where what is counted is more than its budget; of pairs the most counts. Phases may be new, sums count anyway."""
    found = []
    for phase, row in {**counted["phases"], SUM: counted[SUM]}.items():
        most = budget[SUM] if phase == SUM else budget["phases"].get(phase)
        for name in FIGURES if most else ():
            ours, allowed = (x[name][1] if isinstance(x[name], list) else x[name] for x in (row, most))
            if ours > allowed:
                found.append(f"{counted['name']}, {counted['precision']}, {phase}: {name} {allowed:,} -> {ours:,}")
    return found


def measured_us(counted: Counted, folder: Path = recording.RESULTS) -> float | None:
    """What a recording says of it on such a GPU: the latest that has it."""
    workload = WORKLOADS[counted["name"]]
    for recordings in recording.recorded(folder):
        for record in recordings if gpus.is_measured_on(GPUS[counted["gpu"]], recordings[0].facts["device"]) else ():
            if entry := record.entry(workload.group, workload.id_of(counted["precision"])):
                return 1e3 * float(entry["ms"]["median"])
    return None


# --- tables ----------------------------------------------------------------------------------------------------------


def _cells(row: Mapping[str, Any], figures: str) -> list[str]:
    """Of a row's figures by name, with so many decimals: "wavefronts exposed.1"; pairs from the least to the most."""
    cells = []
    for name, _, digits in (word.partition(".") for word in figures.split()):
        pair = row[name] if isinstance(row[name], list) else [row[name]]
        cells.append("..".join(f"{x:,.{digits or 0}f}" for x in dict.fromkeys(pair)))
    return cells


def phases_table(counted: Counted, figures: str, corner: str = "phase", least: float = 0) -> str:
    """The phases of a workload whose time may be so many microseconds or more, and the sum."""
    every = {**counted["phases"], SUM: counted[SUM]}
    rows = [[phase, *_cells(row, figures)] for phase, row in every.items() if row["us"][1] >= least]
    return table([corner, *(word.split(".")[0].replace("grid_barriers", "grid") for word in figures.split())], rows)


def brief_phases(name: str, gpu: str) -> str:
    """The phases that take time, of a workload in every precision that is kept."""
    figures = "instructions wavefronts exposed.1 us.1"
    tables = [phases_table(c, figures, f"{name}, {c['precision']}, {gpu}", 0.1) for c in chosen(name, gpu)]
    return "\n\n".join(tables)


def times_table(kept: Sequence[Counted], folder: Path = recording.RESULTS) -> str:
    """Microseconds of workloads by GPU, and what was measured behind them where a recording has it."""
    by_key = {(c["name"], c["precision"], c["gpu"]): c for c in kept}
    shown = [gpu for gpu in GPUS if any(c["gpu"] == gpu for c in kept)]
    rows = []
    for name, precision in dict.fromkeys((c["name"], c["precision"]) for c in kept):
        cells = []
        for gpu in shown:
            counted = by_key.get((name, precision, gpu))
            measured = counted and measured_us(counted, folder)
            span = _cells(counted[SUM], "us.1")[0] if counted else "–"
            cells.append(span + (f", measured {measured:.1f}" if measured else ""))
        rows.append([f"{name}, {precision}", *cells])
    return table(("us", *shown), rows)


def bounds_table(kept: Sequence[Counted]) -> str:
    """Microseconds of workloads on a GPU, beside the bound of each."""
    rows = []
    for c in kept:
        bound = gpus.bound_us(GPUS[c["gpu"]], WORKLOADS[c["name"]].cost, c["precision"])
        measured = measured_us(c)
        cells = [f"{bound:,.2f}", *_cells(c[SUM], "us.1"), f"{measured:,.1f}" if measured else "–"]
        rows.append([f"{c['name']}, {c['precision']}, {c['gpu']}", *cells])
    return table(("us", "lower bound", "counted", "measured"), rows)


def history_table(entries: Sequence[dict[str, Any]]) -> str:
    """The persistent step as it was counted, change by change."""
    parts = []
    for precision in PRECISIONS:
        rows = []
        for entry in entries:
            by_gpu = {s["gpu"]: s for s in entry["sums"] if (s["name"], s["precision"]) == (STEPS[0], precision)}
            us = [_cells(by_gpu[gpu], "us.1")[0] for gpu in ("H100", "A100")]
            rows.append([entry["label"], *_cells(by_gpu["H100"], "issue wavefronts exposed"), *us])
        head = (f"{STEPS[0]}, {precision}", "issue", "wavefronts", "exposed", "us, H100", "us, A100")
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def work_table(kept: Sequence[Counted]) -> str:
    """What workloads execute on one GPU."""
    rows = []
    for c in kept:
        row = {**c[SUM], "arithmetic": c[SUM]["kinds"]["fp32"] + c[SUM]["kinds"]["tensor"]}
        programs = " + ".join(f"{n:,}" for n in c["programs"])
        figures = _cells(row, "instructions arithmetic wavefronts sectors exposed")
        rows.append([f"{c['name']}, {c['precision']}", programs, *figures])
    return table(("", "programs", "instructions", "arithmetic", "wavefronts", "sectors", "exposed"), rows)


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
    workloads = []
    for name, gpu, precision in usual():
        if name in names:
            workloads.append(count(name, gpu, precision))
            print(f"counted: {name}, {precision}, {gpu.name}: {_cells(workloads[-1][SUM], 'us.1')[0]} us", flush=True)
        elif (name, gpu.name, precision) in before:
            workloads.append(before[name, gpu.name, precision])
    history = old["history"]
    if label is not None:
        remembered = [c for c in workloads if c["name"] in STEPS and c["gpu"] in REMEMBERED]
        sums = [{**{key: c[key] for key in ("name", "gpu", "precision")}, **c[SUM]} for c in remembered]
        history.append({"label": label, "sums": sums})
    first, second = (",\n".join(map(json.dumps, entries)) for entries in (workloads, history))
    lists = f'"workloads": [\n{first}\n],\n"history": [\n{second}\n]'
    BUDGETS.write_text(f'{{"triton": "{version("triton")}",\n{lists}\n}}\n')
    report.update(report.ROOT, recording.RESULTS, check=False)


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
    for name in arguments.names or STEPS:
        for gpu in (GPUS[each] for each in arguments.gpu):
            for precision in arguments.precision:
                if gpu.sm < LEAST_CAPABILITY[precision]:
                    continue
                found = count(name, gpu, precision)
                print(f"\n{name}, {precision}, {gpu.name}; programs: {found['programs']}\n")
                print(phases_table(found, ALL_FIGURES))
                kinds = ", ".join(f"{kind} {n:,}" for kind, n in found[SUM]["kinds"].items())
                print(f"\nInstructions by kind: {kinds}.\n")
                if measured := measured_us(found):
                    print(f"Measured: {measured:.2f} us\n")
    return 0


if __name__ == "__main__":
    run_main(main)
