"""`python -m bench.probes`: what the machine can do at best; lower_bound.py rests on it.

    CPU    peak of fp32 multiply-adds by threads (csrc/fma_peak.c), rate of a matrix product, copy bandwidth by
           working set
    CUDA   fp32 and TF32 rate of a matrix product, copy bandwidth by working set, an empty launch, a node of a captured
           graph, a grid barrier among 8, 16, 32, 64 and all programs

Rates are operations per second, two for a multiply-add; bandwidths bytes read and written per second; times seconds.
A probe that cannot run stands in the result as the reason, a string.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.case import failure
from mlp_fast.cli import run_main
from mlp_fast.measure import machine
from mlp_fast.measure import table as markdown
from mlp_fast.measure.timing import seconds

FMA_SOURCE = Path(__file__).parent / "csrc" / "fma_peak.c"
CPU_SETS = (2**20, 2**24, 2**29)  # bytes: within a core's cache, within the last level, memory
CUDA_SETS = (2**24, 2**31)  # within L2, memory
BARRIER_PROGRAMS = (8, 16, 32, 64)
BARRIERS = 2000
CPU = torch.device("cpu")

Probes = dict[str, Any]


class Unavailable(Exception):
    """A probe cannot run here; the message says why."""


def measure_all(device: torch.device, *, quick: bool = False) -> Probes:
    """Runs every probe of a device; `quick` cuts sizes down to a check that all of them run."""
    probes = _cuda_probes(device, quick) if device.type == "cuda" else _cpu_probes(quick)
    results: Probes = {}
    for name, probe in probes.items():
        try:
            results[name] = probe()
        except Unavailable as reason:
            results[name] = str(reason)
        except Exception as error:  # of a compiler or a device: what is measured with the other probes still counts
            results[name] = failure(error)
    return results


# --- CPU --------------------------------------------------------------------------------------------------------------


def _cpu_probes(quick: bool) -> dict[str, Callable[[], Any]]:
    sets = CPU_SETS[:2] if quick else CPU_SETS
    return {
        "fma_rate": fma_rate,
        "matmul_rate": lambda: _matmul_rate(CPU, 128 if quick else 1024, "highest"),
        "copy_bandwidth": lambda: {str(size): _copy_bandwidth(CPU, size) for size in sets},
    }


def fma_rate() -> dict[str, float]:
    """The peak of fp32 multiply-adds by number of threads: one, and as many as torch uses."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        raise Unavailable("no C compiler was found")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "fma_peak"
        options = ["-O3", "-march=native", "-ffp-contract=fast", "-fopenmp"]
        built = subprocess.run(
            [compiler, *options, str(FMA_SOURCE), "-o", str(program)], capture_output=True, text=True
        )
        if built.returncode:
            raise Unavailable(f"{FMA_SOURCE.name} did not compile: {(built.stderr.splitlines() or ['no message'])[0]}")
        return {
            str(threads): float(subprocess.run([program, str(threads)], capture_output=True, check=True).stdout)
            for threads in sorted({1, torch.get_num_threads()})
        }


# --- both -------------------------------------------------------------------------------------------------------------


def _least(work: Callable[[], object], device: torch.device = CPU, runs: int = 10) -> float:
    """The shortest of some runs, in seconds of the device: a ceiling is what it can do undisturbed."""
    work()
    if device.type == "cpu":
        return min(seconds(work) for _ in range(runs))
    times = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times)


def _matmul_rate(device: torch.device, size: int, precision: str) -> float:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
        out = torch.empty(size, size, device=device)
        return 2 * size**3 / _least(lambda: torch.mm(a, b, out=out), device)
    finally:
        torch.set_float32_matmul_precision(before)


def _copy_bandwidth(device: torch.device, working_set: int) -> float:
    source = torch.ones(working_set // 8, device=device)  # half of it, in floats
    target = torch.empty_like(source)
    repeats = max(1, (2**26 if device.type == "cpu" else 2**30) // working_set)

    def copies() -> None:
        for _ in range(repeats):
            target.copy_(source)

    # On CUDA as a graph, so that small copies are not timed by their launches.
    work = copies if device.type == "cpu" else _captured(lambda: target.copy_(source), repeats).replay
    return repeats * working_set / _least(work, device)


# --- CUDA -------------------------------------------------------------------------------------------------------------


def _cuda_probes(device: torch.device, quick: bool) -> dict[str, Callable[[], Any]]:
    size = 1024 if quick else 8192
    sets = CUDA_SETS[:1] if quick else CUDA_SETS
    return {
        "fp32_rate": lambda: _matmul_rate(device, size, "highest"),
        "tf32_rate": lambda: _matmul_rate(device, size, "high"),
        "copy_bandwidth": lambda: {str(working_set): _copy_bandwidth(device, working_set) for working_set in sets},
        "empty_launch": lambda: _empty_launch(device),
        "graph_node": lambda: _graph_node(device),
        "grid_barrier": lambda: _grid_barrier(device),
    }


def _empty_launch(device: torch.device) -> float:
    """The host's time for a launch of a kernel that does nothing, in a row of them."""
    launches = 2000

    def work() -> None:
        for _ in range(launches):
            torch.cuda._sleep(0)
        torch.cuda.synchronize(device)

    return _least(work) / launches


def _graph_node(device: torch.device) -> float:
    """The device's time for a node of a captured graph whose kernel does nothing, in a row of them."""
    nodes = 1000
    graph = _captured(lambda: torch.cuda._sleep(0), nodes)
    return _least(graph.replay, device) / nodes


def _captured(work: Callable[[], object], times: int) -> torch.cuda.CUDAGraph:
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            work()
    return graph


def _grid_barrier(device: torch.device) -> dict[str, float]:
    """The time of a barrier among so many programs, the last number being one on every multiprocessor."""
    try:
        from bench.barrier_kernel import run_barriers
    except ImportError as error:
        raise Unavailable(f"the barrier's kernel needs the package triton ({error})") from None
    everywhere = torch.cuda.get_device_properties(device).multi_processor_count
    result = {}
    for programs in sorted({*(n for n in BARRIER_PROGRAMS if n < everywhere), everywhere}):
        many = _least(partial(run_barriers, programs, BARRIERS, device), device)
        few = _least(partial(run_barriers, programs, 1, device), device)
        result[str(programs)] = (many - few) / (BARRIERS - 1)  # the launch itself falls out
    return result


# --- output -----------------------------------------------------------------------------------------------------------

UNITS = {
    "fma_rate": (1e-9, "GFLOP/s", "fp32 multiply-adds, {key} threads"),
    "matmul_rate": (1e-9, "GFLOP/s", "fp32 matrix product"),
    "fp32_rate": (1e-12, "TFLOP/s", "fp32 matrix product"),
    "tf32_rate": (1e-12, "TFLOP/s", "TF32 matrix product"),
    "copy_bandwidth": (1e-9, "GB/s", "copy, working set of {key} bytes"),
    "empty_launch": (1e6, "us", "empty kernel, launched by the host"),
    "graph_node": (1e6, "us", "empty kernel, node of a captured graph"),
    "grid_barrier": (1e6, "us", "grid barrier, {key} programs"),
}


def table(probes: Probes) -> str:
    """The probes as a Markdown table."""
    rows = []
    for name, value in probes.items():
        factor, unit, label = UNITS[name]
        for key, number in value.items() if isinstance(value, dict) else [("", value)]:
            measured = f"not measured: {number}" if isinstance(number, str) else f"{number * factor:.4g} {unit}"
            words = label.format(key=f"{int(key):,}" if key else "").replace(" 1 threads", " 1 thread")
            rows.append((words, measured))
    return markdown.table(("probe", "measured"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.probes", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="small sizes: only whether every probe runs")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    probes = measure_all(device, quick=arguments.quick)
    print(f"{machine.device_name(device)}\n\n{table(probes)}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({**machine.facts(device), "probes": probes}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
