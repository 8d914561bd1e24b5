"""What the backends on kernels of a whole step share: all but how the steps are launched."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from mlp_fast.backends.base import Backend
from mlp_fast.backends.requirements import triton_missing, unsupported_by_triton
from mlp_fast.config import Config
from mlp_fast.model.mlp import Shape
from mlp_fast.model.sampling import last_context
from mlp_fast.model.schedule import update_scalars
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape, WeightedWindows

if TYPE_CHECKING:
    from mlp_fast.kernels.inference import Weights
    from mlp_fast.kernels.train_step import TrainStep


class StepKernels(Backend):
    """A launcher of kernels/train_step.py or persistent_step.py holds the state; kernels/inference.py evaluates it."""

    limits = "V, E <= 256, T <= 16, H <= 4096, B <= 8192"
    gather = False
    missing = staticmethod(triton_missing)
    unsupported_precision = staticmethod(unsupported_by_triton)
    module: ClassVar[str]  # of kernels/, with default_config() and the launcher
    launcher: ClassVar[str]
    kernels: TrainStep

    def build(self) -> None:
        from mlp_fast.kernels import inference  # needs Triton

        self.inference = inference
        launchers = importlib.import_module(f"mlp_fast.kernels.{self.module}")
        shape, config = self.shape, self.config
        settings = launchers.default_config(
            config.batch_size, shape.V, shape.T, shape.E, shape.H,
            precision=config.precision, deterministic=config.reduction == "deterministic",
            **(self.of_the_device() if self.device.type == "cuda" else {}),
        )  # fmt: skip
        tokens = self.tape.tokens.to(torch.int32)
        self.kernels = getattr(launchers, self.launcher)(settings, tokens, update_scalars(config))
        self._finished = torch.zeros(1, dtype=torch.int32, device=self.device)

    def of_the_device(self) -> dict[str, int]:
        """What default_config() of the launcher's module takes of a GPU."""
        return {"processors": torch.cuda.get_device_properties(self.device).multi_processor_count}

    @classmethod
    def refused(cls, config: Config, device: torch.device, shape: Shape, tape: Tape | None) -> str | None:
        from mlp_fast.kernels.train_step import check_sizes, check_tape

        try:
            check_sizes(config.batch_size, shape.V, shape.T, shape.E, shape.H)
            if tape is not None:
                check_tape(len(tape.tokens))
        except ValueError as error:
            return str(error)
        return None

    def prepare(self) -> None:
        """Compiles every kernel, leaving the state as it was."""
        state = self.state()
        # From step 0, as the schedule may have no step left after the state's.
        self.load(dataclasses.replace(state, step=0))
        self.advance(min(2, self.config.num_steps))
        window = self.evaluate_zeros(1)
        self.logits(window[:, 1:])
        self.sample([0] * self.shape.T, 1, seed=1)
        self.load(state)

    def advance(self, steps: int) -> Tensor:
        first = self._step
        if first + steps > self.config.num_steps:
            raise ValueError(f"step {first} and {steps} more lie beyond the schedule of {self.config.num_steps} steps")
        self._run(steps)
        self._step += steps
        return self.kernels.buffers.losses[first : first + steps].clone()

    def _run(self, steps: int) -> None:
        self.kernels.run(steps)

    def state(self) -> TrainState:
        self.synchronize()
        return TrainState.of_planes(self.kernels.planes(), self._step).clone()

    def load(self, state: TrainState) -> None:
        self.kernels.load(state.planes(), state.step)
        self._step = state.step

    @property
    def _weights(self) -> Weights:
        return self.inference.Weights(*self.kernels.planes()[0])

    def logits(self, contexts: Tensor) -> Tensor:
        return self.inference.logits(self._weights, contexts, precision=self.config.precision)

    def mean_loss(self, windows: WeightedWindows) -> float:
        precision = self.config.precision
        mean = self.inference.mean_loss(
            self._weights, windows.rows, windows.counts, self._finished, precision=precision
        )
        return mean.item()

    def sample(self, prompt: Sequence[int], count: int, seed: int) -> list[int]:
        return self.inference.sample(self._weights, last_context(prompt, self.shape.T), count, seed).tolist()
