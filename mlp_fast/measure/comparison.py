"""Backends side by side: same seed, same batches, their rounds interleaved.

Every backend trains the same N steps twice. Each pass is cut into rounds, and the rounds of all backends are taken in
turns; eager is always among them, as the baseline. A backend that does not compute the model gets no number;
equivalence.py says how that is decided.
"""

import dataclasses
import time
from collections.abc import Sequence
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

PASSES = 2  # the second tells whether the first is repeatable
ROUNDS = 10  # per pass


@dataclass(frozen=True)
class Result:
    """One line of the comparison.

    Attributes:
        backend: its name.
        ms_per_step: over all rounds; None where the backend was refused.
        x_eager: eager's median over this one's.
        compile_seconds: building the backend and its first step, compilation included.
        peak_bytes: the rise of memory from before the backend was built until after its first steps, compiler
            included (machine.PeakMemory says what is counted).
        loss_difference: the largest difference of a batch loss from eager's over the N steps, in nats.
        repeatable: whether both passes gave the same bits in every loss and in the state at the end.
        refused: why there are no numbers.
    """

    backend: str
    compile_seconds: float
    peak_bytes: int
    ms_per_step: Spread | None = None
    x_eager: float | None = None
    loss_difference: float | None = None
    repeatable: bool | None = None
    refused: str | None = None


class _Compared:
    """A backend in the comparison: its losses by pass, and its state at the end of each."""

    def __init__(self, name: str, config: Config, shape: Shape, tape: Tape, initial: TrainState) -> None:
        config = dataclasses.replace(config, backend=name)
        start = time.perf_counter()
        choice = backends.resolve(config, shape, tape)
        with machine.PeakMemory(choice.device) as memory:
            self.backend: Backend = choice.create(config, shape, tape, initial)
            self.backend.prepare()
        self.name = name
        self.compile_seconds = time.perf_counter() - start
        self.peak_bytes = memory.bytes
        self.initial = initial
        self.losses: list[list[Tensor]] = []
        self.states: list[TrainState] = []
        self.refused: str | None = None

    def begin_pass(self) -> None:
        self.backend.load(self.initial)
        self.losses.append([])

    def end_pass(self) -> None:
        self.states.append(self.backend.state())

    def keep(self, losses: Tensor) -> None:
        self.losses[-1].append(losses.cpu().clone())

    def pass_losses(self, index: int) -> Tensor:
        return torch.cat(self.losses[index])

    @property
    def repeatable(self) -> bool:
        first, second = self.states
        return torch.equal(self.pass_losses(0), self.pass_losses(1)) and all(
            torch.equal(tensor, second.parts[part][name])
            for part, tensors in first.parts.items()
            for name, tensor in tensors.items()
        )


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
    compared = [_Compared(name, config, shape, tape, verifier.initial) for name in names]
    for one in compared:
        try:
            verifier.check(one.backend)
        except NotEquivalent as refusal:
            one.refused = str(refusal)
    timed = [one for one in compared if one.refused is None]
    candidates = [Candidate.of(one.backend, one.keep) for one in timed]
    samples: dict[str, list[float]] = {one.name: [] for one in timed}
    for _ in range(PASSES):
        for one in timed:
            one.begin_pass()
        if candidates:
            for name, times in measure(candidates, cut(config.num_steps, ROUNDS)).items():
                samples[name] += times
        for one in timed:
            one.end_pass()
    return [_result(one, compared[names.index(BASELINE)], samples) for one in compared]


def cut(steps: int, rounds: int) -> list[int]:
    """Steps cut into at most so many rounds, as equal as can be."""
    rounds = min(rounds, steps)
    return [steps // rounds + (i < steps % rounds) for i in range(rounds)]


def _result(candidate: _Compared, baseline: _Compared, samples: dict[str, list[float]]) -> Result:
    result = Result(candidate.name, candidate.compile_seconds, candidate.peak_bytes, refused=candidate.refused)
    if candidate.refused is not None:
        return result
    spread = Spread.of(samples[candidate.name])
    result = dataclasses.replace(result, ms_per_step=spread, repeatable=candidate.repeatable)
    if baseline.refused is not None:
        return result
    difference = (candidate.pass_losses(0).double() - baseline.pass_losses(0).double()).abs().max().item()
    ratio = Spread.of(samples[baseline.name]).median / spread.median
    return dataclasses.replace(result, x_eager=ratio, loss_difference=difference)


def table(results: Sequence[Result]) -> str:
    """The comparison as a Markdown table, and under it why a backend has no number."""
    rows = []
    for result in results:
        spread = result.ms_per_step
        rows.append(
            (
                result.backend,
                "not equivalent" if spread is None else f"{spread.median:.4f}",
                "-" if spread is None else f"{spread.min:.4f}..{spread.max:.4f}",
                "-" if result.x_eager is None else f"{result.x_eager:.2f}",
                f"{result.compile_seconds:.2f}",
                f"{result.peak_bytes / 1e6:.1f}",
                "-" if result.loss_difference is None else f"{result.loss_difference:.1e}",
                {None: "-", True: "bit for bit", False: "no"}[result.repeatable],
            )
        )
    header = ("backend", "ms/step, median", "fastest..slowest round", "x eager", "first step, s", "peak memory, MB")
    shown = markdown.table((*header, "largest loss difference", "repeatable"), rows)
    return "\n".join([shown, *(f"no number: {result.refused}" for result in results if result.refused)])


def chosen(text: str | None, config: Config, shape: Shape) -> list[str]:
    """--backends as names: aliases resolved, none twice; without a text all that this machine has.

    Raises:
        UserError: a name is unknown, or a backend that was asked for is unavailable.
    """
    if text is None:
        return [name for name in backends.REGISTRY if backends.unsupported(name, config, shape) is None]
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise UserError("--backends names none; give some of " + ", ".join(backends.names()))
    resolved = [backends.resolve(dataclasses.replace(config, backend=name), shape).cls.name for name in names]
    return list(dict.fromkeys(resolved))
