"""Backends side by side: same seed, same batches, their rounds interleaved.

Every backend trains the same N steps twice, each pass cut into rounds; timing.py says how these are taken in turns, and
equivalence.py who gets a number. Eager is always among the backends, as the baseline.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlp_fast import backends
from mlp_fast.backends.base import Backend
from mlp_fast.config import Config
from mlp_fast.errors import UserError
from mlp_fast.measure import machine
from mlp_fast.measure import table as markdown
from mlp_fast.measure.equivalence import BASELINE, NotEquivalent, Verifier
from mlp_fast.measure.timing import Candidate, Spread, measure
from mlp_fast.model.mlp import Shape
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape

ROUNDS = 10  # per pass


@dataclass
class Result:
    """One line of the comparison.

    Attributes:
        backend: its name.
        compile_seconds: building the backend and its first step, compilation included.
        peak_bytes: the rise of memory from before the backend was built until after its first steps, compiler
            included (machine.PeakMemory says what is counted).
        refused: why there are no numbers.
        ms_per_step: over all rounds; None where the backend was refused.
        repeatable: whether both passes gave the same bits in every loss and in the state at the end.
        x_eager: eager's median over this one's.
        loss_difference: the largest difference of a batch loss from eager's over the N steps, in nats.
    """

    backend: str
    compile_seconds: float
    peak_bytes: int
    refused: str | None = None
    ms_per_step: Spread | None = None
    repeatable: bool | None = None
    x_eager: float | None = None
    loss_difference: float | None = None


def compare(names: Sequence[str], config: Config, shape: Shape, tape: Tape) -> list[Result]:
    """Compares backends over config.num_steps steps.

    Args:
        names: backends, not aliases; eager is added in front where it is missing.
        config: the settings all of them share; its `backend` is not looked at.
        shape: the model's sizes.
        tape: the training split, on the CPU.
    """
    names = list(names) if BASELINE in names else [BASELINE, *names]
    verifier = Verifier(config, shape, tape)
    built = {}
    for name in names:
        start = time.perf_counter()
        choice = backends.resolve(dataclasses.replace(config, backend=name), shape, tape)
        with machine.PeakMemory(choice.device) as memory:
            backend = choice.create(dataclasses.replace(config, backend=name), shape, tape, verifier.initial)
            backend.prepare()
        built[name] = (backend, Result(name, time.perf_counter() - start, memory.bytes))
    for backend, result in built.values():
        try:
            verifier.check(backend)
        except NotEquivalent as refusal:
            result.refused = str(refusal)
    timed = {name: backend for name, (backend, result) in built.items() if result.refused is None}
    first, second = (_one_pass(timed, verifier.initial, config.num_steps) for _ in range(2))
    for name in timed:
        result = built[name][1]
        result.ms_per_step = Spread.of(first.ms_per_step[name] + second.ms_per_step[name])
        result.repeatable = first.same_bits(second, name)
        if BASELINE in timed:
            eager = Spread.of(first.ms_per_step[BASELINE] + second.ms_per_step[BASELINE])
            result.x_eager = eager.median / result.ms_per_step.median
            result.loss_difference = (first.losses[name].double() - first.losses[BASELINE].double()).abs().max().item()
    return [result for _, result in built.values()]


@dataclass(frozen=True)
class _Pass:
    """What a pass gave, by the names of the backends: every round's time, the losses, and the state at the end."""

    ms_per_step: dict[str, list[float]]
    losses: dict[str, Tensor]
    states: dict[str, TrainState]

    def same_bits(self, other: "_Pass", name: str) -> bool:
        ours, theirs = (
            [one.losses[name], *(t for part in one.states[name].parts.values() for t in part.values())]
            for one in (self, other)
        )
        return all(map(torch.equal, ours, theirs))


def _one_pass(timed: dict[str, Backend], initial: TrainState, steps: int) -> _Pass:
    losses: dict[str, list[Tensor]] = {name: [] for name in timed}
    for backend in timed.values():
        backend.load(initial)

    def kept(name: str) -> Callable[[Tensor], None]:
        return lambda part: losses[name].append(part.cpu().clone())

    candidates = [Candidate.of(backend, kept(name)) for name, backend in timed.items()]
    samples = measure(candidates, cut(steps, ROUNDS)) if candidates else {}
    states = {name: backend.state() for name, backend in timed.items()}
    return _Pass(samples, {name: torch.cat(parts) for name, parts in losses.items()}, states)


def cut(steps: int, rounds: int) -> list[int]:
    """Steps cut into at most so many rounds, as equal as can be."""
    rounds = min(rounds, steps)
    return [steps // rounds + (i < steps % rounds) for i in range(rounds)]


def table(results: Sequence[Result]) -> str:
    """The comparison as a Markdown table, and under it why a backend has no number."""

    def or_dash(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        (
            result.backend,
            "not equivalent" if result.ms_per_step is None else f"{result.ms_per_step.median:.4f}",
            "-" if result.ms_per_step is None else f"{result.ms_per_step.min:.4f}..{result.ms_per_step.max:.4f}",
            or_dash(result.x_eager, ".2f"),
            f"{result.compile_seconds:.2f}",
            f"{result.peak_bytes / 1e6:.1f}",
            or_dash(result.loss_difference, ".1e"),
            {None: "-", True: "bit for bit", False: "no"}[result.repeatable],
        )
        for result in results
    ]
    header = ("backend", "ms/step, median", "fastest..slowest round", "x eager", "first step, s", "peak memory, MB")
    shown = markdown.table((*header, "largest loss difference", "repeatable"), rows)
    return "\n".join([shown, *(f"no number: {result.refused}" for result in results if result.refused)])


def named(text: str) -> list[str]:
    """--backends as names; UserError where there are none."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise UserError("--backends names none; give some of " + ", ".join(backends.names()))
    return names


def chosen(names: Sequence[str] | None, config: Config, shape: Shape) -> list[str]:
    """The backends of these names: aliases resolved, none twice; for None all that this machine has.

    Raises:
        UserError: a name is unknown, or a backend that was asked for is unavailable.
    """
    if names is None:
        return [name for name in backends.REGISTRY if backends.unsupported(name, config, shape) is None]
    resolved = [backends.resolve(dataclasses.replace(config, backend=name), shape).cls.name for name in names]
    return list(dict.fromkeys(resolved))
