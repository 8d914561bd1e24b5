"""Cases of whole processes: imports, a help text, one step, training runs, and `native` on a busy machine."""

import contextlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from bench.case import Case, Entry, Plan, Skipped, Timer, compared, timed_beside
from bench.lower_bound import Probes
from bench.steps import REFERENCE
from mlp_fast.measure.equivalence import require

# The test loss after so many steps at the default settings on the embedded corpus, as bench.reference_loop prints it.
TEST_LOSS = {20: 2.921876, 40: 2.766121, 5000: 2.425677, 50000: 2.388702}
RUN_TOLERANCE = 2e-6  # two units of the last printed digit


def require_loss(name: str, steps: int, loss: float) -> None:
    """NotEquivalent where a run at the default settings on the embedded corpus ends with another test loss."""
    require(name, f"the test loss after {steps:,} steps", abs(loss - TEST_LOSS[steps]), RUN_TOLERANCE)


def python(command: Sequence[str]) -> str:
    """What a Python process prints; Skipped where it fails, with the line that says why."""
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"it ended with code {result.returncode}"]
        raise Skipped(next((line for line in lines if line.startswith("mlp_fast: ")), lines[-1]))
    return result.stdout


def process_case(
    group: str, id: str, per: str, commands: Mapping[str, Sequence[str]], rounds: int, steps: int | None = None
) -> Case:
    """A Python process from its start to its end; the first of `commands` is the case, the others are timed beside it.

    With `steps` all of them train so many, and end with the test loss that they must.
    """

    def process(name: str) -> None:
        printed = python(commands[name])
        if steps is not None:
            losses = re.findall(r"^test_loss (\S+)", printed, re.MULTILINE)
            require_loss(name, steps, float(losses[-1]) if losses else math.nan)

    def run(timer: Timer, probes: Probes) -> Entry:
        work, *others = commands
        facts = {"command": f"python {' '.join(commands[work])}", "threads": torch.get_num_threads(), "per": per}
        facts |= {} if steps is None else {"steps": steps}
        beside = {other: partial(process, other) for other in others}
        return {**facts, **timed_beside(timer, partial(process, work), beside, rounds)}

    return Case(group, id, run)


def start_up_cases(plan: Plan) -> Iterator[Case]:
    """What a process costs before its first step."""
    torch_alone = {"import torch": ("-c", "import torch")}
    train = ("-m", "mlp_fast.train", "--device", plan.device)
    commands: dict[str, Sequence[str]] = {
        **torch_alone,
        "import mlp_fast.train": ("-c", "import mlp_fast.train"),
        "mlp_fast.train --help": (*train, "--help"),
        "mlp_fast.train, one step": (*train, "--num-steps", "1", "--quiet"),
    }
    for id, command in commands.items():
        yield process_case("start-up", id, "process", {id: command, **torch_alone}, 1 if plan.dry else 3)


def run_cases(plan: Plan) -> Iterator[Case]:
    """Training runs from the start of the process to its end, beside the reference loop on the CPU."""
    short, long = (20, 40) if plan.dry else (5000, 50000)
    for steps in (short, long):
        train = ("-m", "mlp_fast.train", "--device", plan.device, "--num-steps", str(steps))
        commands: dict[str, Sequence[str]] = {"mlp_fast.train": train}
        # A long run of it takes more than a minute: without --full tables.py scales the short one and says so.
        if plan.device == "cpu" and (steps == short or plan.full):
            commands[REFERENCE] = ("-m", "bench.reference_loop", "--quiet", "--num-steps", str(steps))
        rounds = 3 if len(commands) > 1 and not plan.dry else 1
        yield process_case("run", f"{steps} steps", "run", commands, rounds, steps=steps)


# --- beside other work ------------------------------------------------------------------------------------------------

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


def busy_cases(plan: Plan) -> Iterator[Case]:
    """A step on two threads: alone, two runs at once, two threads on one core, two with the time of one processor."""
    steps = "20" if plan.dry else "10000"
    options = ("--backend", "native", "--threads", str(THREADS), "--num-steps", steps, "--eval-every", steps)

    def case(id: str, processes: int, before: str | None) -> Case:
        def run(timer: Timer, probes: Probes) -> Entry:
            samples: list[float] = []

            def at_once(code: str) -> None:
                with ThreadPoolExecutor(processes) as pool:
                    printed = pool.map(python, [("-c", PROGRAM.format(code), *options)] * processes)
                    samples.extend(float(ms) for text in printed for ms in re.findall(r"\(([\d.]+) ms/step\)", text))

            with one_processor() if before is None else contextlib.nullcontext(before) as code:
                timer(lambda: at_once(code), lambda: None, 1 if plan.dry else 3)
            facts = {"backend": "native", "threads": THREADS, "processes": processes, "per": "step"}
            return {**facts, **compared(samples, {})}

        return Case("busy", id, run)

    if plan.device == "cpu":
        yield case("alone", 1, "pass")
        yield case("two at once", 2, "pass")
        yield case("one core", 1, ONE_CORE)
        yield case("the time of one processor", 1, None)
