"""What backends whose step needs nothing from the host share; on CUDA their steps are captured and replayed."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from mlp_fast.backends.base import Backend
from mlp_fast.backends.requirements import use_precision
from mlp_fast.model.mlp import Parameters
from mlp_fast.model.state import TrainState


def captured(steps: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The steps as a CUDA graph, for replay() on the current stream.

    They must be capturable: static tensors, no synchronisation, the step counter on the device, everything compiled
    and warmed up on the current device before. Capturing runs nothing, so the state does not move.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    return graph


class DeviceLoop(Backend):
    """A backend whose step needs nothing from the host.

    The step counter is a tensor on the device, and through it the batch's position and the learning rate are. Losses go
    into a ring of GRAPH_STEPS, and so many steps are captured in one graph.

    Attributes:
        device_step: the number of the next step, (1,), int64, as indexing wants it; held.step is the same on the host.
        losses: the ring, (GRAPH_STEPS,), float32, on the device.
    """

    GRAPH_STEPS = 50

    def build_loop(self, parameters: Parameters) -> None:
        """The rest of build(), given the parameters that a step changes, on the device."""
        use_precision(self.config.precision)
        self.held = TrainState.of(parameters)
        self.device_step = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.losses = torch.empty(self.GRAPH_STEPS, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    @abstractmethod
    def _step(self) -> None:
        """Does step device_step in place: its loss to losses[device_step % GRAPH_STEPS], then device_step += 1."""

    def _run(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    def prepare(self) -> None:
        """Compiles, warms up and captures steps, evaluations and samples, leaving the state as it was."""
        super().prepare()
        for count in sorted(self.evaluated_counts()):
            self.evaluate_zeros(count)
        if self.device.type == "cuda" and self.world.size == 1:  # several exchange gradients at every step
            self.graph = captured(lambda: self._run(self.GRAPH_STEPS))

    def evaluated_counts(self) -> set[int]:
        """Numbers of windows that prepare() evaluates: few, and more than there are tokens."""
        return {1, min(self.shape.V + 1, self.evaluation_rows)}

    def advance(self, steps: int) -> Tensor:
        losses = torch.empty(steps, device=self.device)
        done = 0
        while done < steps:
            # The ring of losses is read out whenever it wraps.
            first = self.held.step % self.GRAPH_STEPS
            count = min(self.GRAPH_STEPS - first, steps - done)
            if self.graph is not None and count == self.GRAPH_STEPS:
                self.graph.replay()
            else:
                self._run(count)
            losses[done : done + count] = self.losses[first : first + count]
            self.held.step += count
            done += count
        return losses

    def load(self, state: TrainState) -> None:
        super().load(state)
        self.device_step.fill_(state.step)
