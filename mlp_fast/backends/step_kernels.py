"""What the backends on kernels of a whole step share: all but how the steps are launched."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mlp_fast.backends.base import Backend
from mlp_fast.backends.precision import unsupported_by_triton
from mlp_fast.config import Config
from mlp_fast.files import no_place_for_code
from mlp_fast.kernels._runtime import interpreting
from mlp_fast.model.mlp import Shape
from mlp_fast.model.sampling import last_context
from mlp_fast.model.schedule import update_scalars
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape, WeightedWindows

if TYPE_CHECKING:
    from mlp_fast.kernels.inference import Weights
    from mlp_fast.kernels.train_step import TrainStep


def kernels_missing(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on the device here, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "it needs the package triton, which is not installed"
    if device.type == "cpu" and not interpreting():
        return "it needs a CUDA device; --interpret runs the same kernels in Triton's interpreter, slowly"
    if device.type == "cuda" and interpreting():
        return "--interpret runs on the CPU; add --device cpu"
    if device.type == "cuda":
        from triton import knobs

        if reason := no_place_for_code(Path(knobs.cache.dir)):
            return f"Triton has no place for its code: {reason}; set TRITON_CACHE_DIR to a folder to execute from"
    return None


class StepKernels(Backend):
    """A launcher of kernels/train_step.py or persistent_step.py holds the state; kernels/inference.py evaluates it."""

    limits = "V, E <= 256, T <= 16, H <= 4096, B <= 8192"
    module: ClassVar[str]  # of kernels/, which has default_config() and the launcher
    launcher: ClassVar[str]
    kernels: TrainStep

    def build(self) -> None:
        """Makes the launcher, and takes over the module that evaluates; both need Triton."""
        from mlp_fast.kernels import inference

        self.inference = inference
        launchers = importlib.import_module(f"mlp_fast.kernels.{self.module}")
        config = launchers.default_config(**self._settings())
        tokens = self.tape.tokens.to(torch.int32)
        self.kernels = getattr(launchers, self.launcher)(config, tokens, update_scalars(self.config))
        self._finished = torch.zeros(1, dtype=torch.int32, device=self.device)

    @classmethod
    def unsupported(cls, config: Config, device: torch.device, shape: Shape | None, tape: Tape | None) -> str | None:
        reason = kernels_missing(device)
        if reason or shape is None:
            return reason
        from mlp_fast.kernels.train_step import check_sizes, check_tape

        if config.form == "gather":
            return "its kernels have the table form only; --form gather is for triton-op and compile-step"
        if reason := unsupported_by_triton(config.precision, device):
            return reason
        try:
            check_sizes(config.batch_size, shape.V, shape.T, shape.E, shape.H)
            if tape is not None:
                check_tape(len(tape.tokens))
        except ValueError as error:
            return str(error)
        return None

    def _settings(self) -> dict[str, Any]:
        """The arguments of default_config() of the launcher's module."""
        shape, config = self.shape, self.config
        settings: dict[str, Any] = {"B": config.batch_size, "V": shape.V, "T": shape.T, "E": shape.E, "H": shape.H}
        settings |= {"precision": config.precision, "deterministic": config.reduction == "deterministic"}
        if self.device.type == "cuda":
            settings["processors"] = torch.cuda.get_device_properties(self.device).multi_processor_count
        return settings

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
        return TrainState.of_planes(self.kernels.planes(), self._step)

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
