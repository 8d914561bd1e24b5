"""Whole processes as cases: imports, a help text, one step, and training runs from start to end."""

import math
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

from bench import floor
from bench.case import Case, Entry, Plan, Skipped, Timer, timed_beside
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
    """A Python process from its start to its end; the first of `commands` is the case, the others are its rivals.

    With `steps` all of them train so many, and end with the test loss that they must.
    """

    def process(name: str) -> None:
        printed = _python(commands[name])
        if steps is not None:
            losses = re.findall(r"^test_loss (\S+)", printed, re.MULTILINE)
            require_loss(name, steps, float(losses[-1]) if losses else math.nan)

    def run(timer: Timer, probes: floor.Probes) -> Entry:
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
        rivals = {} if command is torch_alone else {"import torch": torch_alone}
        yield _process_case("start-up", id, {id: command, **rivals}, "process", rounds)


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
