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
    def copied(cls, parts: Iterable[Parameters], step: int) -> "TrainState":
        """A copy of parameters and moments as a backend holds them, on any device and of any strides."""
        p, m, v = ({name: t.detach().to("cpu", copy=True).contiguous() for name, t in part.items()} for part in parts)
        return cls(p, m, v, step)

    def copy_to(self, parts: Iterable[Parameters]) -> None:
        """Writes parameters and moments into those that a backend holds."""
        with torch.no_grad():
            for held, part in zip(parts, self.parts.values(), strict=True):
                for name, tensor in held.items():
                    tensor.copy_(part[name])

    def planes(self) -> list[list[Tensor]]:
        """Parameters and moments, each a list in the order of PARAMETER_NAMES, as the step kernels have them."""
        return [[part[name] for name in PARAMETER_NAMES] for part in self.parts.values()]

    @classmethod
    def of_planes(cls, planes: Iterable[Sequence[Tensor]], step: int) -> "TrainState":
        """A copy of what planes() gives, on any device."""
        return cls.copied((dict(zip(PARAMETER_NAMES, plane, strict=True)) for plane in planes), step)

    def clone(self) -> "TrainState":
        """A copy that shares no memory with this one."""
        return TrainState.copied(self.parts.values(), self.step)
