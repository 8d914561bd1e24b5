"""Backends to measure the measuring with: one of a known speed, and others that are wrong in a known way."""

import time
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from mlp_fast import backends
from mlp_fast.backends.base import Backend
from mlp_fast.backends.eager import Eager
from mlp_fast.model.windows import WeightedWindows


class Slow(Eager):
    """Eager, its steps drawn out to 5 ms each; of three rounds one is faster and one slower, so 5 ms is the median.

    Attributes:
        rounds: milliseconds a step of every round, on a clock of its own: a busy machine adds to a sleep.
    """

    name = "slow"
    rounds: ClassVar[list[float]] = []

    def advance(self, steps: int) -> Tensor:
        start = time.perf_counter()
        step_time = (0.005, 0.004, 0.007)[len(self.rounds) % 3]
        losses = []
        for done in range(1, steps + 1):
            losses.append(super().advance(1))
            time.sleep(max(0.0, start + step_time * done - time.perf_counter()))
        result = torch.cat(losses)
        self.rounds.append(1e3 * (time.perf_counter() - start) / steps)
        return result


class Clocked(Eager):
    """Eager on a clock of its own, `now`, in seconds: preparing, a step and an evaluation take times of their own."""

    name = "clocked"
    now = 0.0
    preparation, step_time, evaluation = 1000.0, 1.0, 30.0

    def prepare(self) -> None:
        Clocked.now += self.preparation

    def advance(self, steps: int) -> Tensor:
        Clocked.now += steps * self.step_time
        return super().advance(steps)

    def mean_loss(self, windows: WeightedWindows) -> float:
        Clocked.now += self.evaluation
        return super().mean_loss(windows)


class Wrong(Eager):
    """Eager with the gradient of the last bias off by a thousandth."""

    name = "wrong"

    def advance(self, steps: int) -> Tensor:
        bias = self.tensors["mlp.2.bias"]
        handle = bias.register_hook(lambda gradient: gradient * 1.001)
        try:
            return super().advance(steps)
        finally:
            handle.remove()


class Unsteady(Eager):
    """Eager that never does the same twice: losses that grow by a hair with every load."""

    name = "unsteady"
    loads = 0

    def load(self, state: Any) -> None:
        super().load(state)
        type(self).loads += 1

    def advance(self, steps: int) -> Tensor:
        losses = super().advance(steps)
        return losses + self.loads * 2.0**-21


def register(monkeypatch: pytest.MonkeyPatch, *classes: type[Backend]) -> None:
    """Makes them known by their names for the time of a test."""
    extra = {cls.name: cls for cls in classes}
    original = backends.backend_class
    monkeypatch.setattr(backends, "REGISTRY", {**backends.REGISTRY, **dict.fromkeys(extra, "")})
    monkeypatch.setattr(backends, "backend_class", lambda name: extra.get(name) or original(name))
