"""TrainState: all that training changes, under one schema for every backend."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlp_fast.model.mlp import PARAMETER_NAMES, Parameters, Shape, initial_parameters


@dataclass
class TrainState:
    """Parameters, AdamW's moments, and the number of steps done.

    Each dictionary maps the names of Shape.parameters to float32 tensors of the nn.Module's shapes, on the CPU,
    contiguous. The next step is number `step`: it decides the batch, the learning rate and the bias corrections, so
    the state is all that a run needs to go on.
    """

    parameters: Parameters
    exp_avg: Parameters
    exp_avg_sq: Parameters
    step: int = 0

    @property
    def parts(self) -> dict[str, Parameters]:
        """The three dictionaries by their names."""
        return {"parameters": self.parameters, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    @classmethod
    def initial(cls, shape: Shape, seed: int) -> "TrainState":
        """The state before the first step."""
        return cls.of(initial_parameters(shape, seed))

    @classmethod
    def of(cls, parameters: Parameters) -> "TrainState":
        """The state before the first step from these parameters, which are not copied."""
        exp_avg, exp_avg_sq = ({name: torch.zeros_like(tensor) for name, tensor in parameters.items()} for _ in "mv")
        return cls(parameters, exp_avg, exp_avg_sq)

    @classmethod
    def of_planes(cls, planes: Iterable[Sequence[Tensor]], step: int) -> "TrainState":
        """The state of what planes() gives, on any device; not copied."""
        p, m, v = (dict(zip(PARAMETER_NAMES, plane, strict=True)) for plane in planes)
        return cls(p, m, v, step)

    def planes(self) -> list[list[Tensor]]:
        """Parameters and moments, each a list in the order of PARAMETER_NAMES, as the step kernels have them."""
        return [[part[name] for name in PARAMETER_NAMES] for part in self.parts.values()]

    def clone(self) -> "TrainState":
        """A copy that shares no memory with this one, on the CPU and contiguous, of a state as a backend holds it."""
        p, m, v = (
            {name: t.detach().to("cpu", copy=True).contiguous() for name, t in part.items()}
            for part in self.parts.values()
        )
        return TrainState(p, m, v, self.step)

    @torch.no_grad()
    def copy_(self, state: "TrainState") -> None:
        """Takes over the values of another state, keeping its own tensors, which may be on any device."""
        for held, part in zip(self.parts.values(), state.parts.values(), strict=True):
            for name, tensor in held.items():
                tensor.copy_(part[name])
        self.step = state.step
