"""Cases of whole processes: imports, a help text, one step, training runs, and `native` on a busy machine."""

import contextlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from bench import lower_bound
from bench.case import Case, Entry, Plan, Skipped, Timer, compared, timed_beside
from bench.steps import REFERENCE
from mlp_fast.measure.equivalence import require

# The test loss after so many steps at the default settings on the embedded corpus, as bench.reference_loop prints it.
TEST_LOSS = {20: 2.921876, 40: 2.766121, 5000: 2.425677, 50000: 2.388702}
RUN_TOLERANCE = 2e-6  # two units of the last printed digit


def require_loss(name: str, steps: int, loss: float) -> None:
    """NotEquivalent where a run at the default settings on the embedded corpus ends with another test loss."""
    require(name, f"the test loss after {steps:,} steps", abs(loss - TEST_LOSS[steps]), RUN_TOLERANCE)


def _process_case(
    group: str, id: str, commands: Mapping[str, Sequence[str]], per: str, rounds: int, steps: int | None = None
) -> Case:
    """A Python process from its start to its end; the first of `commands` is the case, the others are timed beside it.

    With `steps` all of them train so many, and end with the test loss that they must.
    """

    def process(name: str) -> None:
        printed = _python(commands[name])
        if steps is not None:
            losses = re.findall(r"^test_loss (\S+)", printed, re.MULTILINE)
            require_loss(name, steps, float(losses[-1]) if losses else math.nan)

    def run(timer: Timer, probes: lower_bound.Probes) -> Entry:
        name, *others = commands
        beside = {other: partial(process, other) for other in others}
        return {
            **({} if steps is None else {"steps": steps}),
            "command": "python " + " ".join(commands[name]),
            "threads": torch.get_num_threads(),
            "per": per,
            **timed_beside(timer, partial(process, name), beside, rounds),
        }

    return Case(group, id, run)


def _python(arguments: Sequence[str]) -> str:
    """What a Python process prints."""
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if result.returncode:
        raise Skipped(
            f"python {' '.join(arguments)} failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}"
        )
    return result.stdout


def start_up_cases(plan: Plan) -> Iterator[Case]:
    """What a process costs before its first step."""
    torch_alone = ("-c", "import torch")
    train = ("-m", "mlp_fast.train", "--device", plan.device)
    rounds = 1 if plan.dry else 3
    for id, command in {
        "import torch": torch_alone,
        "import mlp_fast.train": ("-c", "import mlp_fast.train"),
        "mlp_fast.train --help": (*train, "--help"),
        "mlp_fast.train, one step": (*train, "--num-steps", "1", "--quiet"),
    }.items():
        others = {} if command is torch_alone else {"import torch": torch_alone}
        yield _process_case("start-up", id, {id: command, **others}, "process", rounds)


def run_cases(plan: Plan) -> Iterator[Case]:
    """Training runs from the start of the process to its end, beside the reference loop on the CPU."""
    train = ("-m", "mlp_fast.train", "--device", plan.device, "--num-steps")
    short, long = ("20", "40") if plan.dry else ("5000", "50000")
    for steps in (short, long):
        commands: dict[str, Sequence[str]] = {"mlp_fast.train": (*train, steps)}
        # A long run of it takes more than a minute: without --full tables.py scales the short one and says so.
        beside = plan.device == "cpu" and (steps == short or plan.full)
        if beside:
            commands[REFERENCE] = ("-m", "bench.reference_loop", "--quiet", "--num-steps", steps)
        rounds = 3 if beside and not plan.dry else 1
        yield _process_case("run", f"{steps} steps", commands, "run", rounds, steps=int(steps))


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
        def run(timer: Timer, probes: lower_bound.Probes) -> Entry:
            samples: list[float] = []
            with one_processor() if before is None else contextlib.nullcontext(before) as code:
                timer(lambda: samples.extend(_at_once(processes, code, steps)), lambda: None, 1 if plan.dry else 3)
            facts = {"backend": "native", "threads": THREADS, "processes": processes, "per": "step"}
            return {**facts, **compared(samples, {})}

        return Case("busy", id, run)

    yield case("alone")
    yield case("two at once", processes=2)
    yield case("one core", before=ONE_CORE)
    yield case("the time of one processor", before=None)
