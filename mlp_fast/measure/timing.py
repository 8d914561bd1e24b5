"""Honest times: rivals measured in turns, and no number for a backend that computes something else.

A round is some steps and one synchronisation. The rounds of all contenders are interleaved, in an order that turns by
one each time, so that a machine that warms up, throttles or is shared does so to all of them; a short rest comes
before each, so that none runs beside threads that another has left spinning. What is reported is the median over
rounds, with the fastest and the slowest beside it.

Before it is timed, a backend does 20 steps from the initial state and is compared with the same steps in float64: the
losses, the parameters and both moments after them. Eager in the same precision is the yardstick:

    error(backend, float64) <= 2 * error(eager, float64) + floor

AdamW divides a gradient by its own size, so a wrong scale hardly shows in the parameters; it does in the moments.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mlp_fast import backends
from mlp_fast.backends.base import Backend
from mlp_fast.config import Config
from mlp_fast.corpus.load import check_sizes, load_for
from mlp_fast.model.mlp import MLP, Parameters, Shape, initial_parameters
from mlp_fast.model.schedule import BETA1, BETA2, EPS, learning_rate
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape

BASELINE = "eager"
CHECK_STEPS = 20
# OpenMP's threads go on spinning after their work (libgomp's were seen to for 8 ms), on cores that the next one needs.
REST = 0.02

# Errors that pass beside a perfect eager, by precision: of a loss in nats, and of the state relative to its tensors.
# TF32 keeps 10 bits of an operand: 2^-10 is its rounding, and 5e-5 nats what that was seen to do to a loss.
LOSS_FLOOR = {"fp32": 1e-6, "tf32x3": 1e-6, "tf32": 5e-5}
STATE_FLOOR = {"fp32": 1e-5, "tf32x3": 1e-5, "tf32": 4e-3}
EAGER_LIMIT = 10  # eager itself may err by so many floors: it is measured against float64 only


class NotEquivalent(Exception):
    """A backend computes something else than the model; the message says what and by how much."""


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some samples."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """The spread of at least one sample."""
        return cls(statistics.median(samples), min(samples), max(samples))

    def scaled(self, factor: float) -> "Spread":
        """The spread in another unit, `factor` of which make one of this."""
        return Spread(self.median * factor, self.min * factor, self.max * factor)


def subject(config: Config) -> tuple[Shape, Tape]:
    """The model's sizes and the training tape, on the CPU, of a run with these settings; UserError as in training."""
    corpus = load_for(config)
    check_sizes(corpus, config.context_length, config.batch_size)
    return Shape.of(config, len(corpus.vocabulary)), Tape(corpus.train, config.context_length)


def seconds(work: Callable[[], Any]) -> float:
    """The wall time of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rest() -> None:
    """Between two contenders: waits until the threads of the last one sleep."""
    time.sleep(REST)


@dataclass(frozen=True)
class Contender:
    """Someone whose steps are timed.

    Attributes:
        name: unique among rivals.
        run: does so many steps and returns when they are done.
        settle: is given what `run` returned, after the clock has stopped.
    """

    name: str
    run: Callable[[int], Any]
    settle: Callable[[Any], None] = lambda result: None

    @classmethod
    def of(cls, backend: Backend, settle: Callable[[Any], None] = lambda result: None) -> "Contender":
        """A backend; what it hands to `settle` is its losses."""

        def run(steps: int) -> Tensor:
            losses = backend.advance(steps)
            backend.synchronize()
            return losses

        return cls(backend.name, run, settle)


def measure(contenders: Sequence[Contender], rounds: Sequence[int]) -> dict[str, list[float]]:
    """Times contenders in turns.

    Args:
        contenders: ready to run: compiled, warmed up, their device idle.
        rounds: the number of steps of each round.

    Returns:
        By name, milliseconds per step of every round.
    """
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn, steps in enumerate(rounds):
        first = turn % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            rest()
            start = time.perf_counter()
            result = contender.run(steps)
            elapsed = time.perf_counter() - start
            samples[contender.name].append(1e3 * elapsed / steps)
            contender.settle(result)
    return samples


@dataclass(frozen=True)
class Errors:
    """How far a run went from the float64 one.

    Attributes:
        loss: the largest difference of a batch loss, in nats.
        state: (part, parameter name) -> difference. Of a parameter the RMS over the tensor's own: a gradient that is
            zero but for rounding moves single elements by a whole learning rate. Of a moment the largest over the
            tensor's largest.
    """

    loss: float
    state: dict[tuple[str, str], float]


class Judge:
    """Decides whether a backend computes the model, before its time counts.

    Args:
        config: sizes, schedule and precision of the runs to be judged.
        shape: the model's sizes.
        tape: the training split, on the CPU.
    """

    def __init__(self, config: Config, shape: Shape, tape: Tape) -> None:
        self.config = config
        self.initial = TrainState.initial(shape, config.seed)
        self.steps = min(CHECK_STEPS, config.num_steps)
        self.losses, self.state = float64_run(config, shape, tape, self.steps)
        self.eager = self._errors(backends.create(replace(config, backend=BASELINE), shape, tape, self.initial))
        self._limits = (LOSS_FLOOR[config.precision], STATE_FLOOR[config.precision])

    def check(self, backend: Backend) -> float:
        """The backend's largest loss error, in nats; it is left at the initial state.

        Raises:
            NotEquivalent: an error exceeds its limit.
        """
        errors = self._errors(backend)
        loss_floor, state_floor = self._limits
        require(backend.name, "a loss", errors.loss, self._limit(backend, self.eager.loss, loss_floor))
        for (part, name), error in errors.state.items():
            limit = self._limit(backend, self.eager.state[part, name], state_floor)
            require(backend.name, f"{part} of {name}, relative,", error, limit)
        return errors.loss

    def _limit(self, backend: Backend, eager: float, floor: float) -> float:
        return EAGER_LIMIT * floor if backend.name == BASELINE else 2 * eager + floor

    def _errors(self, backend: Backend) -> Errors:
        backend.load(self.initial)
        losses = backend.advance(self.steps).double().cpu()
        state = backend.state()
        backend.load(self.initial)
        moments = {
            (part, name): _ratio(
                (getattr(state, part)[name] - true).abs().max(), getattr(self.state, part)[name].abs().max()
            )
            for part in ("exp_avg", "exp_avg_sq")
            for name, true in getattr(self.state, part).items()
        }
        parameters = {
            ("parameters", name): _ratio((state.parameters[name] - true).norm(), true.norm())
            for name, true in self.state.parameters.items()
        }
        return Errors((losses - self.losses).abs().max().item(), {**parameters, **moments})


def float64_run(config: Config, shape: Shape, tape: Tape, steps: int) -> tuple[Tensor, TrainState]:
    """The first steps of a run in float64 on the CPU, under autograd with torch's AdamW: batch losses and state."""
    model = MLP(shape, initial_parameters(shape, config.seed)).double()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(BETA1, BETA2), eps=EPS, weight_decay=config.weight_decay
    )
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, config)
        optimizer.zero_grad()
        _, loss = model(*tape.batch(step, config.batch_size))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    tensors = dict(model.named_parameters())

    def moment(key: str) -> Parameters:
        return {name: optimizer.state[tensors[name]][key] for name in shape.parameters}

    parameters = {name: tensors[name].detach() for name in shape.parameters}
    return torch.stack(losses), TrainState(parameters, moment("exp_avg"), moment("exp_avg_sq"), steps)


def _ratio(difference: Tensor, size: Tensor) -> float:
    """difference / size; a tensor of zeros is measured absolutely."""
    return (difference / size if size > 0 else difference).item()


def require(name: str, what: str, error: float, limit: float) -> None:
    """NotEquivalent where something that `name` computed is off by more than the limit, or is not a number."""
    if not (math.isfinite(error) and error <= limit):
        raise NotEquivalent(f"{name} is not equivalent: {what} is off by {error:.1e} (at most {limit:.1e} may be)")
