"""The whole step as two or three kernels (kernels/train_step.py); on CUDA captured in graphs of many steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlp_fast.backends.device_loop import StepGraph
from mlp_fast.backends.step_kernels import StepKernels

if TYPE_CHECKING:
    from mlp_fast.kernels.train_step import TrainStep

# A graph of a thousand steps is replayed in hundredths of a second; one of many more would take seconds to capture.
MAX_GRAPH_STEPS = 1000


class TritonStep(StepKernels):
    """Two graphs are captured: of an evaluation interval, or MAX_GRAPH_STEPS of it, and of one step for the rest."""

    name = "triton-step"
    summary = "the whole step as a few kernels, many steps in one CUDA graph"
    _graphs: Sequence[StepGraph] = ()  # the longest first

    def _kernels(self) -> TrainStep:
        from mlp_fast.kernels.train_step import TrainStep, default_config

        return TrainStep(default_config(**self._settings()), *self._arguments())

    def prepare(self) -> None:
        """Compiles every kernel and captures the graphs, leaving the state as it was."""
        self._graphs = ()
        super().prepare()
        if self.device.type == "cuda":
            interval = min(self.config.eval_every, self.config.num_steps, MAX_GRAPH_STEPS)
            self._graphs = [self._captured(steps) for steps in sorted({interval, 1}, reverse=True)]

    def _captured(self, steps: int) -> StepGraph:
        graph = StepGraph(lambda: self.kernels.run(steps), 1)
        graph.steps = steps
        return graph

    def _run(self, steps: int) -> None:
        for graph in self._graphs:
            while steps >= graph.steps:
                graph.replay()
                steps -= graph.steps
        # Before prepare(), and in the interpreter, the same launches without a graph.
        if steps:
            self.kernels.run(steps)
