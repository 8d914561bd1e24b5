"""The whole step as two to four kernels (kernels/train_step.py); on CUDA captured in graphs of many steps."""

from functools import partial

import torch

from mlp_fast.backends.device_loop import captured
from mlp_fast.backends.step_kernels import StepKernels

# A graph of a thousand steps is replayed in hundredths of a second; one of many more would take seconds to capture.
MAX_GRAPH_STEPS = 1000


class TritonStep(StepKernels):
    """Two graphs are captured: of an evaluation interval, or MAX_GRAPH_STEPS of it, and of one step for the rest."""

    name = "triton-step"
    summary = "the whole step as a few kernels, many steps in one CUDA graph"
    module, launcher = "train_step", "TrainStep"

    def build(self) -> None:
        super().build()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by their steps, the longest first

    def prepare(self) -> None:
        """Compiles every kernel and captures the graphs, leaving the state as it was."""
        self._graphs = {}
        super().prepare()
        if self.device.type == "cuda":
            interval = min(self.config.eval_every, self.config.num_steps, MAX_GRAPH_STEPS)
            self._graphs = {n: captured(partial(self.kernels.run, n)) for n in sorted({interval, 1}, reverse=True)}

    def _run(self, steps: int) -> None:
        for count, graph in self._graphs.items():
            while steps >= count:
                graph.replay()
                steps -= count
        # Before prepare(), and in the interpreter, the same launches without a graph.
        if steps:
            self.kernels.run(steps)
