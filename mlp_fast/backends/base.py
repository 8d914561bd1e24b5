"""What a backend is: it advances a TrainState on one device, and computes losses and logits with it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mlp_fast import distributed
from mlp_fast.backends.requirements import unsupported_by_torch
from mlp_fast.config import Config
from mlp_fast.model.mlp import Shape
from mlp_fast.model.rng import RNG
from mlp_fast.model.sampling import sample
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape, WeightedWindows

# Windows per forward pass of an evaluation, and logits: they bound its memory.
EVALUATION_ROWS, EVALUATION_LOGITS = 4096, 2**24


class Backend(ABC):
    """One way to compute the training loop.

    Args:
        config: the run's settings.
        shape: the model's sizes.
        tape: the training split, on the CPU.
        state: where to start; copied.
        device: one of `devices`.

    Attributes:
        held: the state as the steps change it, on the device: build() makes it, load() fills it. Its tensors have the
            shapes of Shape.parameters, and any strides. A backend with another layout writes state() and load() itself.
    """

    name: ClassVar[str]
    summary: ClassVar[str]  # one line for --list-backends
    devices: ClassVar[tuple[str, ...]] = ("cuda", "cpu")  # in order of preference
    limits: ClassVar[str] = "any sizes"  # the sizes that it supports, in words for --list-backends
    gather: ClassVar[bool] = True  # whether it has the gather form of the first layer
    direct: ClassVar[bool] = False  # whether it computes direct connections
    distributed: ClassVar[bool] = False  # whether it splits a batch over the processes of torchrun
    host_tape: ClassVar[bool] = False  # whether its batches may come from a tape that stays in the host's memory

    held: TrainState

    def __init__(self, config: Config, shape: Shape, tape: Tape, state: TrainState, device: torch.device) -> None:
        self.config, self.shape, self.device = config, shape, device
        self.world = distributed.world()
        self.tape = tape.to(device)
        self.build()
        self.load(state)

    @abstractmethod
    def build(self) -> None:
        """Makes what the steps need, but for the values of the state, which load() brings afterwards."""

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """What this machine lacks to run the backend on one of `devices`, in one line, or None."""
        return None

    # Why the products of the backend do not have a precision on a device, or None where they do.
    unsupported_precision = staticmethod(unsupported_by_torch)

    @classmethod
    def refused(cls, config: Config, device: torch.device, shape: Shape, tape: Tape | None) -> str | None:
        """Why the backend does not take settings, sizes or a tape that the attributes above allow, or None."""
        return None

    def prepare(self) -> None:
        """Compiles and warms up, leaving the state as it was; training time is counted after it."""
        state = self.state()
        self.advance(1)
        self.synchronize()
        self.load(state)

    @abstractmethod
    def advance(self, steps: int) -> Tensor:
        """Does so many steps and returns their batch losses, (steps,), float32, on the device.

        It may return before the device has finished; synchronize() waits.
        """

    def state(self) -> TrainState:
        """A copy of the state, on the CPU."""
        return self.held.clone()

    def load(self, state: TrainState) -> None:
        """Goes on from this state, which is copied."""
        self.held.copy_(state)

    @abstractmethod
    def logits(self, contexts: Tensor) -> Tensor:
        """Contexts (N, T), int64, on the device -> logits (N, V), float32."""

    @property
    def evaluation_rows(self) -> int:
        """Windows per forward pass of an evaluation."""
        return max(1, min(EVALUATION_ROWS, EVALUATION_LOGITS // self.shape.V))

    def mean_loss(self, windows: WeightedWindows) -> float:
        """The mean cross-entropy, in nats, over the windows (on the device)."""
        with torch.no_grad():
            losses = [
                F.cross_entropy(self.logits(rows[:, :-1]), rows[:, -1], reduction="none")
                for rows in windows.rows.split(self.evaluation_rows)
            ]
            return windows.mean(torch.cat(losses))

    def evaluate_zeros(self, count: int) -> Tensor:
        """Evaluates so many windows of token 0, to have that compiled; returns the windows, (count, T+1)."""
        rows = torch.zeros(count, self.shape.T + 1, dtype=torch.int64, device=self.device)
        self.mean_loss(WeightedWindows(rows, torch.ones(count, dtype=torch.float64, device=self.device)))
        return rows

    def shared_mean_loss(self, windows: WeightedWindows) -> float:
        """mean_loss of all windows, of which every process of the run computes its share; the same on all."""
        mine = windows.part(self.world.shard(len(windows.rows)))
        return self.world.mean(self.mean_loss(mine) if mine.weight else 0.0, mine.weight)

    def sample(self, prompt: Sequence[int], count: int, seed: int) -> list[int]:
        """`count` tokens after the prompt, which has at least T tokens; see sampling.sample."""

        def logits_of(context: Sequence[int]) -> Tensor:
            with torch.no_grad():
                return self.logits(torch.tensor([context], device=self.device))[0]

        return sample(logits_of, prompt, count, RNG(seed), self.shape.T)

    def synchronize(self) -> None:
        """Waits until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
