"""Warm steps under a profiler: times of kernels or operators, launches and gaps."""

import argparse
import contextlib
import importlib.util
import json
import shlex
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from mlp_fast.backends.base import Backend
from mlp_fast.measure.table import table

STEPS_RANGE = "steps"  # the range around the warm steps, in the trace and in NVTX
LAUNCHES = ("LaunchKernel", "LaunchCooperativeKernel", "GraphLaunch", "MemcpyAsync", "MemsetAsync")


@dataclass(frozen=True)
class Row:
    """One name in the profile."""

    name: str  # a kernel, or on the CPU an operator, whose time is its own, without operators inside it
    calls: float  # per step
    microseconds: float  # per step
    share: float  # of the wall time of the steps, 0..1


@dataclass(frozen=True)
class Summary:
    """What a trace says about a step; times in microseconds per step."""

    device: bool  # whether it is about work on the device (True) or about operators on the CPU
    wall: float  # of the steps, under the profiler, which slows the host down
    busy: float  # while at least one kernel (operator) ran
    largest_gap: float  # the longest time in which none ran; microseconds, not per step
    launches: float  # kernels, copies and fills a step; on the CPU, operator calls
    host_launches: float  # calls of the CUDA runtime that started them; a graph counts once
    rows: list[Row]  # the greatest share first

    @property
    def idle_share(self) -> float:
        """The part of the wall time in which nothing ran."""
        return 1 - self.busy / self.wall

    def table(self, top: int = 15) -> str:
        """The summary as Markdown; rows after the first `top` are one, their sum."""
        rows, others = self.rows[:top], self.rows[top:]
        if others:
            sums = (sum(getattr(row, key) for row in others) for key in ("calls", "microseconds", "share"))
            rows = [*rows, Row(f"{len(others)} others", *sums)]
        cells = [(_cell(row.name), f"{row.calls:.2f}", f"{row.microseconds:.2f}", f"{row.share:.1%}") for row in rows]
        what, gaps = "operator (own time)", "outside torch's operators"
        launched = f"{self.launches:.2f} operator calls"
        if self.device:
            what, gaps = "kernel", "no kernel running"
            launched = f"{self.launches:.2f} launches from {self.host_launches:.2f} calls of the host"
        return (
            f"{table((what, 'calls/step', 'us/step', 'share'), cells)}\n\n"
            f"{self.wall:.2f} us a step under the profiler; {launched}\n"
            f"gaps, {gaps}: {self.wall - self.busy:.2f} us a step ({self.idle_share:.1%}), "
            f"the largest {self.largest_gap:.2f} us"
        )


def _cell(name: str) -> str:
    """A name of at most 60 characters that does not end its cell."""
    return (name if len(name) <= 60 else name[:57] + "...").replace("|", "/")


def summarise(trace: dict[str, Any], steps: int) -> Summary:
    """Reads a Chrome trace of torch.profiler.

    Args:
        trace: with one complete event named STEPS_RANGE around the steps, at whose end the device was idle.
        steps: how many it holds.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    root = next(e for e in events if e["name"] == STEPS_RANGE and e.get("cat") == "user_annotation")
    start, end = root["ts"], root["ts"] + root["dur"]

    def inside(*categories: str) -> list[dict[str, Any]]:
        found = [e for e in events if e.get("cat") in categories and e is not root]
        return [e for e in found if e["ts"] + e["dur"] > start and e["ts"] < end]

    work = inside("kernel", "gpu_memcpy", "gpu_memset")
    device = bool(work)
    if device:
        own = [(event["name"], event["dur"]) for event in work]
    else:
        work, own = inside("cpu_op"), _own_times(inside("cpu_op", "user_annotation"))
    host = sum(any(name in event["name"] for name in LAUNCHES) for event in inside("cuda_runtime", "cuda_driver"))
    times: dict[str, list[float]] = defaultdict(list)
    for name, time in own:
        times[name].append(time)
    wall = root["dur"] / steps
    rows = [Row(name, len(t) / steps, sum(t) / steps, sum(t) / root["dur"]) for name, t in times.items()]
    rows.sort(key=lambda row: -row.microseconds)
    busy, largest_gap = _busy([(event["ts"], event["ts"] + event["dur"]) for event in work], start, end)
    return Summary(device, wall, busy / steps, largest_gap, len(work) / steps, host / steps, rows)


def _busy(intervals: list[tuple[float, float]], start: float, end: float) -> tuple[float, float]:
    """How long at least one of the intervals covers [start, end], and the longest stretch that none covers."""
    busy, gap, reached = 0.0, 0.0, start
    for left, right in sorted(intervals):
        gap = max(gap, left - reached)
        if right > reached:
            busy += min(right, end) - max(left, reached)
            reached = min(right, end)
    return busy, max(gap, end - reached)


def _own_times(events: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Name and duration of every event, without the events of its thread that are nested inside."""
    own: list[float] = []
    around: list[tuple[Any, float, int]] = []  # thread, end and place of the events that the next may be inside of
    ordered = sorted(events, key=lambda e: (str(e.get("pid")), str(e.get("tid")), e["ts"], -e["dur"]))
    for place, event in enumerate(ordered):
        thread = event.get("pid"), event.get("tid")
        while around and (around[-1][0] != thread or around[-1][1] <= event["ts"]):
            around.pop()
        if around:
            own[around[-1][2]] -= event["dur"]
        around.append((thread, event["ts"] + event["dur"], place))
        own.append(event["dur"])
    return [(event["name"], time) for event, time in zip(ordered, own, strict=True)]


def nvtx(name: str, device: torch.device) -> AbstractContextManager[Any]:
    """An NVTX range, on CUDA."""
    return torch.cuda.nvtx.range(name) if device.type == "cuda" else contextlib.nullcontext()


def profile_steps(backend: Backend, steps: int, trace: Path) -> Summary:
    """Does steps of a warm backend under torch.profiler and writes the Chrome trace."""
    with torch.profiler.profile() as profiler, record_function(STEPS_RANGE):
        # What the backend does outside torch's operators, Python or C, is this range's own time.
        with record_function(f"{backend.name}, outside operators"):
            backend.advance(steps)
        backend.synchronize()
    profiler.export_chrome_trace(str(trace))
    return summarise(json.loads(trace.read_text()), steps)


def warm_up(backend: Backend, steps: int) -> None:
    """Compiles, and does the steps before those that count."""
    with nvtx("prepare", backend.device):
        backend.prepare()
    with nvtx("warmup", backend.device):
        if steps:
            backend.advance(steps)
        backend.synchronize()


def run_steps(backend: Backend, steps: int) -> None:
    """Does steps in one call of the backend, as training does between two evaluations, and waits for the device."""
    with nvtx(STEPS_RANGE, backend.device):
        backend.advance(steps)
        backend.synchronize()


def run_under_proton(backend: Backend, steps: int, stem: str) -> None:
    """Does steps under Triton's Proton, which writes STEM.hatchet."""
    import triton.profiler as proton

    proton.start(stem, context="shadow")
    with proton.scope(STEPS_RANGE):
        run_steps(backend, steps)
    proton.finalize()


def proton_missing(device: torch.device) -> str | None:
    """Why Proton cannot be used, or None where it can."""
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.profiler") is None:
        return "Proton comes with the package triton, which is not installed"
    if device.type != "cuda":
        return "Proton measures GPU kernels; there is no CUDA device here"
    return None


def external_commands(arguments: Sequence[str], backend: str, steps: int) -> str:
    """The ncu and nsys commands that profile exactly these warm steps; see docs/profiling.md.

    Args:
        arguments: of this command, as given.
        backend: its name, for the names of the files.
        steps: how many warm steps nsys is to see; ncu sees one, because it replays every kernel many times.
    """
    replaced = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--backend", "--steps", "--top", "--trace", "--json", "--proton"):
        replaced.add_argument(option)
    kept = replaced.parse_known_args(arguments)[1]
    command = ["python", "-m", "mlp_fast.profile", "--backend", backend, *kept, "--no-profiler", "--steps"]
    return (
        "ncu, the kernels of one step in depth:\n"
        "  ncu --profile-from-start off --graph-profiling node --set full --import-source yes --force-overwrite "
        f"--export {backend} {shlex.join([*command, '1'])}\n"
        "nsys, the timeline of all steps:\n"
        "  nsys profile --capture-range=cudaProfilerApi --capture-range-end=stop --cuda-graph-trace=node "
        f"--trace=cuda,nvtx,osrt --force-overwrite=true --output {backend} {shlex.join([*command, str(steps)])}"
    )
