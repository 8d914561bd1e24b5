"""A step of `native` on a machine that is not its own: beside another run, on one core, under a quota."""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench import floor
from bench.case import Case, Entry, Plan, Skipped, Timer
from mlp_fast.measure.timing import Spread

THREADS = 2
PROGRAM = "import os, runpy; {}; runpy.run_module('mlp_fast.train', run_name='__main__', alter_sys=True)"
ONE_CORE = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
# Where control groups are mounted, version 1 and version 2, and what grants the time of one processor.
QUOTAS = (
    (Path("/sys/fs/cgroup/cpu"), {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "100000"}),
    (Path("/sys/fs/cgroup"), {"cpu.max": "100000 100000"}),
)


@contextlib.contextmanager
def one_processor() -> Iterator[str]:
    """A control group with the time of one processor: the code by which a process enters it. It goes in the end."""
    for root, limits in QUOTAS:
        folder = root / f"mlp_fast-{os.getpid()}"
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir()
                stack.callback(folder.rmdir)
                for name, limit in limits.items():
                    with open(folder / name, "r+") as file:  # does not make it
                        file.write(limit)
            except OSError:
                continue
            yield f"open({str(folder / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))"
            return
    raise Skipped("no control group can be made here; that takes root, and control groups of processors")


def _at_once(processes: int, before: str, steps: int) -> list[float]:
    """Trains in so many processes at the same time; the milliseconds per step that each prints."""
    command = [sys.executable, "-c", PROGRAM.format(before), "--backend", "native", "--threads", str(THREADS)]
    command += ["--num-steps", str(steps), "--eval-every", str(steps)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    printed = [run.communicate()[0] for run in runs]
    if failed := [run.returncode for run in runs if run.returncode]:
        raise Skipped(f"a run of native ended with code {failed[0]}")
    return [float(ms) for text in printed for ms in re.findall(r"\(([\d.]+) ms/step\)", text)]


def busy_cases(plan: Plan) -> Iterator[Case]:
    """A step on two threads: alone, two runs at once, two threads on one core, two with the time of one processor."""
    if plan.device != "cpu":
        return
    steps = 20 if plan.dry else 10_000

    def case(id: str, processes: int = 1, before: str | None = "pass") -> Case:
        def run(timer: Timer, probes: floor.Probes) -> Entry:
            samples: list[float] = []
            with one_processor() if before is None else contextlib.nullcontext(before) as code:
                timer(lambda: samples.extend(_at_once(processes, code, steps)), lambda: None, 1 if plan.dry else 3)
            spread = dataclasses.asdict(Spread.of(samples))
            return {"backend": "native", "threads": THREADS, "processes": processes, "per": "step", "ms": spread}

        return Case("busy", id, run)

    yield case("alone")
    yield case("two at once", processes=2)
    yield case("one core", before=ONE_CORE)
    yield case("the time of one processor", before=None)
