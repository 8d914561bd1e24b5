"""The whole step in C on the CPU (kernels/cpu_step.py, kernels/csrc/train_step.c)."""

from collections.abc import Sequence
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mlp_fast.backends.base import Backend
from mlp_fast.kernels import cpu_step
from mlp_fast.model.sampling import last_context
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import WeightedWindows


class Native(Backend):
    """The C kernel, float32, on as many threads as torch has; it keeps the state in a layout of its own.

    The windows of an evaluation are prepared when they are first seen, and kept as long as they are.
    """

    name = "native"
    summary = "the whole step in C, on all threads"
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    limits = "any sizes, its logits in chunks of the batch"

    def build(self) -> None:
        shape = self.shape
        self.model = cpu_step.NativeModel(shape.V, shape.T, shape.E, shape.H, self.config.form)
        self.model.set_tape(self.tape.tokens, copy=False)
        self._pairs: WeakKeyDictionary[WeightedWindows, cpu_step.Pairs] = WeakKeyDictionary()

    @staticmethod
    def missing(device: torch.device) -> str | None:
        return cpu_step.unavailable()

    def prepare(self) -> None:
        """Nothing to do: it was compiled when the package was installed."""

    def advance(self, steps: int) -> Tensor:
        config = self.config
        return self.model.train(
            config.batch_size, steps, config.num_steps, config.learning_rate, config.weight_decay
        ).float()

    def state(self) -> TrainState:
        return TrainState.of_planes(self.model.store(), self.model.step)

    def load(self, state: TrainState) -> None:
        self.model.load(*state.planes(), state.step)

    def logits(self, contexts: Tensor) -> Tensor:
        return self.model.logits(contexts)

    def mean_loss(self, windows: WeightedWindows) -> float:
        pairs = self._pairs.get(windows)
        if pairs is None:
            pairs = self._pairs[windows] = self.model.pairs(windows.rows, windows.counts)
        return self.model.loss_sum(pairs) / windows.weight

    def sample(self, prompt: Sequence[int], count: int, seed: int) -> list[int]:
        return self.model.sample(last_context(prompt, self.shape.T), count, seed)
