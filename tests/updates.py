"""Updates of a real run as torch.optim.AdamW computed them, and how far those of others are from them, in ulp."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mlp_fast import backends
from mlp_fast.backends.eager import Eager
from mlp_fast.config import Config
from mlp_fast.corpus import load as corpus
from mlp_fast.model.mlp import PARAMETER_NAMES, Shape
from mlp_fast.model.schedule import update_scalars
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape

CONFIG = Config(backend="eager", num_steps=50_000)
SHAPE = Shape(V=27, T=3, E=48, H=512)
UPDATES, APART = 12, 60  # 12 updates of 89,387 elements: a million


@dataclass(frozen=True)
class Update:
    """One update of a run: flat tensors, (89387,) float32, all parameters one after another."""

    step: int
    before: TrainState
    after: TrainState
    grad: Tensor

    @property
    def scalars(self) -> list[float]:
        """The decay factor, the step size and the root of the second bias correction."""
        return update_scalars(CONFIG)[self.step].double().tolist()


@cache
def updates() -> list[Update]:
    """Some of the default run's updates on the embedded corpus; the first of a run, and every 60th after it."""
    tape = Tape(corpus.load("embedded").train, SHAPE.T)
    backend = Eager(CONFIG, SHAPE, tape, TrainState.initial(SHAPE, CONFIG.seed), torch.device("cpu"))
    grads: list[Tensor] = []
    backend.optimizer.register_step_pre_hook(
        lambda *_: grads.append(torch.cat([x.grad.flatten() for x in backend.model.parameters()]))
    )
    found = []
    for _ in range(UPDATES):
        before = backend.state()
        backend.advance(1)
        found.append(Update(before.step, before, backend.state(), grads[-1]))
        backend.advance(APART - 1)
        grads.clear()
    return found


def flat(state: TrainState) -> dict[str, Tensor]:
    """p, m and v of a state, flat, in the order of the model's parameters."""
    parts = {"p": state.parameters, "m": state.exp_avg, "v": state.exp_avg_sq}
    return {kind: torch.cat([part[name].flatten() for name in PARAMETER_NAMES]) for kind, part in parts.items()}


@dataclass(frozen=True)
class Difference:
    """How far updates are from torch's.

    Attributes:
        equal: the share of elements with the same bits.
        largest: the largest difference, in ulp: units in the last place of the largest number that goes into a sum.
        mean: the mean signed difference, in ulp.
        outward: likewise, positive away from zero. Weight decay pulls towards zero, so where it is lost this shows.
    """

    equal: float
    largest: float
    mean: float
    outward: float

    @classmethod
    def of(cls, got: Tensor, expected: Tensor, terms: Tensor) -> "Difference":
        """The difference of results, given the largest size of any term of theirs; all float32 of one shape."""
        size = torch.maximum(terms.abs(), expected.float().abs())
        ulp = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
        difference = (got.double() - expected.double()) / ulp.double()
        return cls(
            (got == expected).double().mean().item(),
            difference.abs().max().item(),
            difference.mean().item(),
            (difference * expected.sign()).mean().item(),
        )

    def check(self, kind: str, largest: float, equal: float) -> None:
        """Asserts that nothing is shifted in one direction, and that few elements differ, by little."""
        assert abs(self.mean) < 0.01, (kind, self)
        assert abs(self.outward) < 0.01, (kind, self)
        assert self.largest <= largest, (kind, self)
        assert self.equal >= equal, (kind, self)


def differences(got: list[dict[str, Tensor]], of: list[Update]) -> dict[str, Difference]:
    """The differences of p, m and v from torch's after these updates, each element of all of them counted once."""
    result = {}
    for kind in "pmv":
        before, expected = ([flat(getattr(u, when))[kind] for u in of] for when in ("before", "after"))
        result[kind] = Difference.of(torch.cat([g[kind] for g in got]), torch.cat(expected), torch.cat(before))
    return result


def check(found: dict[str, Difference]) -> None:
    """Asserts that updates are torch's. Where torch fuses a product into a sum, as it does in the first moment, others
    need not: up to a third of the moments may differ, by two ulp."""
    found["p"].check("p", largest=16, equal=0.99)
    found["m"].check("m", largest=2, equal=0.66)
    found["v"].check("v", largest=2, equal=0.66)


@cache
def pre_activations() -> Tensor:
    """Arguments of tanh, (1048576,) float32: the first windows of the corpus in the states of the run."""
    contexts = Tape(corpus.load("embedded").train, SHAPE.T).rows[:171, :-1].long()
    found = []
    for update in updates():
        wte, w1, b1, *_ = (update.before.parameters[name] for name in PARAMETER_NAMES)
        found.append((wte[contexts].flatten(1) @ w1.t() + b1).flatten())
    return torch.cat(found)[: 1 << 20]


def check_backend(name: str, of: list[Update], **settings: Any) -> None:
    """Asserts that a backend's parameters after a step are those that torch makes of its moments after it."""
    tape, results, expected = Tape(corpus.load("embedded").train, SHAPE.T), [], []
    backend = backends.create(replace(CONFIG, backend=name, **settings), SHAPE, tape, of[0].before)
    for update in of:
        backend.load(update.before)
        backend.advance(1)
        got = flat(backend.state())
        decay, step_size, root = update.scalars
        denominator = (got["v"].sqrt() / root).add_(1e-8)
        expected.append(flat(update.before)["p"].mul_(decay).addcdiv_(got["m"], denominator, value=-step_size))
        results.append(got["p"])
    before = torch.cat([flat(update.before)["p"] for update in of])
    Difference.of(torch.cat(results), torch.cat(expected), before).check("p", largest=16, equal=0.99)
