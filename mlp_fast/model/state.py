"""TrainState: all that training changes, under one schema for every backend."""

from dataclasses import dataclass

import torch

from mlp_fast.model.mlp import Parameters, Shape, initial_parameters


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

    def clone(self) -> "TrainState":
        """A copy that shares no memory with this one."""
        copies = {key: {name: t.clone() for name, t in part.items()} for key, part in self.parts.items()}
        return TrainState(**copies, step=self.step)
