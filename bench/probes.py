"""`python -m bench.probes`: the best rates and times of the machine, from which lower_bound.py makes lower bounds.

    CPU    peak of fp32 multiply-adds by threads (csrc/fma_peak.c), rate of a matrix product, copy bandwidth by
           working set
    CUDA   fp32 and TF32 rate of a matrix product, copy bandwidth by working set, an empty launch, a node of a captured
           graph, a grid barrier among 8, 16, 32, 64 and all programs

Rates are operations per second, two for a multiply-add; bandwidths bytes read and written per second; times seconds.
The result of a probe that cannot run is the reason, a string.
"""

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.case import Skipped, Work, matmul_precision, reason, repeated, waited
from mlp_fast.cli import run_main
from mlp_fast.measure import machine
from mlp_fast.measure import table as markdown
from mlp_fast.measure.timing import seconds

FMA_SOURCE = Path(__file__).parent / "csrc" / "fma_peak.c"
CPU_SETS = (2**20, 2**24, 2**29)  # bytes: within a core's cache, within the last level, memory
CUDA_SETS = (2**24, 2**31)  # within L2, memory
BARRIER_PROGRAMS = (8, 16, 32, 64)
BARRIERS = 2000
EMPTY = 2000  # empty launches, or nodes of a graph
CPU = torch.device("cpu")


def measure_all(device: torch.device, *, quick: bool = False) -> dict[str, Any]:
    """Runs every probe of a device; with `quick` at small sizes, to check that all of them run."""
    results: dict[str, Any] = {}
    for name, probe in probes_of(device, quick).items():
        try:
            results[name] = probe()
        except Exception as error:  # of a compiler or a device: what is measured with the other probes still counts
            results[name] = reason(error)
    return results


def probes_of(device: torch.device, quick: bool) -> dict[str, Callable[[], Any]]:
    """The probes of a device, by name."""
    sets = (CUDA_SETS if device.type == "cuda" else CPU_SETS)[: -1 if quick else None]
    copies = {"copy_bandwidth": lambda: {str(size): _copy_bandwidth(device, size) for size in sets}}
    if device.type == "cpu":
        return {"fma_rate": fma_rate, "matmul_rate": lambda: _matmul_rate(CPU, 128 if quick else 1024), **copies}
    size, empty = 1024 if quick else 8192, partial(torch.cuda._sleep, 0)
    return {
        "fp32_rate": lambda: _matmul_rate(device, size),
        "tf32_rate": lambda: _matmul_rate(device, size, "high"),
        **copies,
        # By the host's clock, and by the device's.
        "empty_launch": lambda: _least(waited(lambda: [empty() for _ in range(EMPTY)], device)) / EMPTY,
        "graph_node": lambda: _least(repeated(empty, device, EMPTY), device) / EMPTY,
        "grid_barrier": lambda: _grid_barrier(device),
    }


def fma_rate() -> dict[str, float]:
    """The peak of fp32 multiply-adds by number of threads: one, and as many as torch uses."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        raise Skipped("no C compiler was found")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "fma_peak"
        options = ["-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-o", str(program)]
        built = subprocess.run([compiler, str(FMA_SOURCE), *options], capture_output=True, text=True)
        if built.returncode:
            raise Skipped(f"{FMA_SOURCE.name} did not compile: {(built.stderr.splitlines() or ['no message'])[0]}")
        return {
            str(threads): float(subprocess.run([program, str(threads)], capture_output=True, check=True).stdout)
            for threads in sorted({1, torch.get_num_threads()})
        }


def _least(work: Work, device: torch.device = CPU, runs: int = 10) -> float:
    """The shortest of some runs, in seconds of the device: the undisturbed one."""
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


def _matmul_rate(device: torch.device, size: int, precision: str = "highest") -> float:
    a, b, out = (torch.randn(size, size, device=device) for _ in range(3))
    with matmul_precision(precision):
        return 2 * size**3 / _least(lambda: torch.mm(a, b, out=out), device)


def _copy_bandwidth(device: torch.device, working_set: int) -> float:
    source = torch.ones(working_set // 8, device=device)  # half of it, in floats
    target = torch.empty_like(source)
    repeats = max(1, (2**26 if device.type == "cpu" else 2**30) // working_set)
    # On CUDA as a graph, so that small copies are not timed by their launches.
    return repeats * working_set / _least(repeated(lambda: target.copy_(source), device, repeats), device)


def _grid_barrier(device: torch.device) -> dict[str, float]:
    """The time of a barrier by the number of programs; the greatest has one on every multiprocessor."""
    try:
        from bench.barrier_kernel import run_barriers
    except ImportError as error:
        raise Skipped(f"the barrier's kernel needs the package triton ({error})") from None
    everywhere = torch.cuda.get_device_properties(device).multi_processor_count
    result = {}
    for programs in sorted({*(n for n in BARRIER_PROGRAMS if n < everywhere), everywhere}):
        many, few = (_least(partial(run_barriers, programs, count, device), device) for count in (BARRIERS, 1))
        result[str(programs)] = (many - few) / (BARRIERS - 1)  # the launch itself falls out
    return result


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


def table(probes: Mapping[str, Any]) -> str:
    """The probes as a Markdown table; "" where there are none."""
    rows = []
    for name, value in probes.items():
        factor, unit, label = UNITS[name]
        for key, number in value.items() if isinstance(value, dict) else [("", value)]:
            measured = f"not measured: {number}" if isinstance(number, str) else f"{number * factor:.4g} {unit}"
            words = label.format(key=f"{int(key):,}" if key else "").replace(" 1 threads", " 1 thread")
            rows.append((words, measured))
    return markdown.table(("probe", "measured"), rows) if rows else ""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.probes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: only whether every probe runs")
    quick = parser.parse_args(argv).quick
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{machine.device_name(device)}\n\n{table(measure_all(device, quick=quick))}")
    return 0


if __name__ == "__main__":
    run_main(main)
