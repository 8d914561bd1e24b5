"""What backends whose step needs nothing from the host share; on CUDA their steps are captured and replayed."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from mlp_fast.backends.base import Backend
from mlp_fast.config import Config
from mlp_fast.model.mlp import Parameters, Shape
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape, WeightedWindows


class StepGraph:
    """`step`, captured `steps` times in a row in one torch.cuda.CUDAGraph.

    The step must be capturable: static tensors, no synchronisation, its counter on the device, everything compiled
    and warmed up on the current device before. Capturing runs nothing, so the state does not move.

    Args:
        step: does one step in place.
        steps: how many a replay does.
    """

    def __init__(self, step: Callable[[], None], steps: int) -> None:
        self.steps = steps
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(steps):
                step()

    def replay(self) -> None:
        """Enqueues the captured steps on the current stream."""
        self.graph.replay()


class DeviceLoop(Backend):
    """A backend whose step needs nothing from the host.

    The step counter is a tensor on the device, and through it the batch's position and the learning rate are. Losses go
    into a ring of GRAPH_STEPS; so a subclass can capture that many steps in `graph`, once it is prepared.

    Args:
        parameters: on the device; their initial values do not matter.
    """

    GRAPH_STEPS = 50

    def __init__(
        self,
        config: Config,
        shape: Shape,
        tape: Tape,
        state: TrainState,
        device: torch.device,
        parameters: Parameters,
    ) -> None:
        super().__init__(config, shape, tape, state, device)
        self.parameters = parameters
        self.exp_avg, self.exp_avg_sq = (
            {name: torch.empty_like(tensor, requires_grad=False) for name, tensor in parameters.items()}
            for _ in range(2)
        )
        self.step = torch.zeros(1, dtype=torch.int64, device=device)  # an index tensor, as scatters want it
        self.losses = torch.empty(self.GRAPH_STEPS, device=device)
        self.graph: StepGraph | None = None
        self.load(state)

    @abstractmethod
    def _step(self) -> None:
        """Does one step in place: losses[step % GRAPH_STEPS] is its loss, and `step` one more afterwards."""

    def prepare(self) -> None:
        """Compiles and warms up steps, evaluations and samples, leaving the state as it was."""
        super().prepare()
        # The first layer has a form for few windows, and one for more of them than there are tokens.
        for count in sorted({1, min(self.shape.V + 1, self.evaluation_rows)}):
            rows = torch.zeros(count, self.shape.T + 1, dtype=torch.int64, device=self.device)
            self.mean_loss(WeightedWindows(rows, torch.ones(count, dtype=torch.float64, device=self.device)))

    def advance(self, steps: int) -> Tensor:
        losses = torch.empty(steps, device=self.device)
        done = 0
        while done < steps:
            # The ring of losses is read out whenever it wraps.
            first = self._host_step % self.GRAPH_STEPS
            count = min(self.GRAPH_STEPS - first, steps - done)
            if self.graph is not None and count == self.GRAPH_STEPS:
                self.graph.replay()
            else:
                for _ in range(count):
                    self._step()
            losses[done : done + count] = self.losses[first : first + count]
            self._host_step += count
            done += count
        return losses

    def state(self) -> TrainState:
        parameters, exp_avg, exp_avg_sq = (
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for tensors in (self.parameters, self.exp_avg, self.exp_avg_sq)
        )
        return TrainState(parameters, exp_avg, exp_avg_sq, self._host_step)

    def load(self, state: TrainState) -> None:
        with torch.no_grad():
            for name, tensor in self.parameters.items():
                tensor.copy_(state.parameters[name])
                self.exp_avg[name].copy_(state.exp_avg[name])
                self.exp_avg_sq[name].copy_(state.exp_avg_sq[name])
        self.step.fill_(state.step)
        self._host_step = state.step
