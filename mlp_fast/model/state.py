"""TrainState: all that training changes, under one schema for every backend."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mlp_fast.model.mlp import Parameters, Shape, initial_parameters


@dataclass
class TrainState:
    """Parameters, AdamW's moments, and the number of steps done.

    Each dictionary maps the names of models.Shape.parameters to float32 tensors of the nn.Module's shapes, on the CPU,
    contiguous. The next step is number `step`: it decides the batch, the learning rate and the bias corrections, so
    the state is all that a run needs to go on.
    """

    parameters: Parameters
    exp_avg: Parameters
    exp_avg_sq: Parameters
    step: int = 0

    @classmethod
    def initial(cls, shape: Shape, seed: int) -> "TrainState":
        """The state before the first step."""
        return cls.of(initial_parameters(shape, seed))

    @classmethod
    def of(cls, parameters: Parameters) -> "TrainState":
        """The state before the first step from these parameters, which are not copied."""
        return cls(parameters, _zeros_like(parameters), _zeros_like(parameters))

    def clone(self) -> "TrainState":
        """A copy that shares no memory with this one."""
        return TrainState(_cloned(self.parameters), _cloned(self.exp_avg), _cloned(self.exp_avg_sq), self.step)


def _zeros_like(tensors: Parameters) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def _cloned(tensors: Parameters) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}
