"""Whole processes as cases: imports, a help text, one step, and training runs from start to end."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from bench import floor
from bench.case import Case, Entry, Plan, Skipped, Timer
from bench.steps import REFERENCE
from mlp_fast.timing import Spread, seconds


def _process_case(
    group: str, id: str, commands: Mapping[str, Sequence[str]], per: str, rounds: int, **facts: Any
) -> Case:
    """A Python process from its start to its end; the first of `commands` is the case, the others are its rivals."""

    def run(timer: Timer, probes: floor.Probes) -> Entry:
        name, *others = commands
        samples: dict[str, list[float]] = {other: [] for other in others}

        def before() -> None:
            for other in others:
                samples[other].append(1e3 * seconds(partial(_python, commands[other])))

        times = timer(lambda: _python(commands[name]), before, rounds)
        spread = Spread.of([1e3 * t for t in times])
        rivals = {other: Spread.of(samples[other]) for other in others if samples[other]}
        return {
            **facts,
            "command": "python " + " ".join(commands[name]),
            "threads": torch.get_num_threads(),
            "per": per,
            "ms": dataclasses.asdict(spread),
            "rivals": {
                other: {"ms": dataclasses.asdict(s), "ratio": s.median / spread.median} for other, s in rivals.items()
            },
        }

    return Case(group, id, run)


def _python(arguments: Sequence[str]) -> None:
    result = subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise Skipped(
            f"python {' '.join(arguments)} failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}"
        )


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
    train = ("-m", "mlp_fast.train", "--device", plan.device, "--quiet", "--num-steps")
    short, long = ("20", "40") if plan.dry else ("5000", "50000")
    reference: dict[str, Sequence[str]] = {}
    if plan.device == "cpu":
        reference = {REFERENCE: ("-m", "bench.reference_loop", "--quiet", "--num-steps", short)}
    rounds = 3 if reference and not plan.dry else 1
    commands = {"mlp_fast.train": (*train, short), **reference}
    yield _process_case("run", f"{short} steps", commands, "run", rounds, steps=int(short))
    if plan.full and reference:
        reference = {REFERENCE: (*reference[REFERENCE][:-1], long)}
    else:
        reference = {}  # minutes long: tables.py scales the short one and says so
    commands = {"mlp_fast.train": (*train, long), **reference}
    yield _process_case("run", f"{long} steps", commands, "run", 1, steps=int(long))
