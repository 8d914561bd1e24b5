"""torch.compile: of each baseline's forward and backward, and of the whole step as one graph."""

import shutil
import sys

import torch
from torch import Tensor

from mlp_fast.backends.cuda_graph import DeviceLoop, StepGraph
from mlp_fast.backends.eager import MATMUL_PRECISION, Eager, EagerRaw, torch_precision_error
from mlp_fast.config import Config
from mlp_fast.models import B1, B2, DIRECT, W1, W2, WTE, Parameters, Shape
from mlp_fast.optim import update_scalars
from mlp_fast.state import TrainState
from mlp_fast.step import adamw_, chosen_form, loss_and_gradients
from mlp_fast.tape import Tape


def compiler_missing(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None where it can: Inductor makes C++ for the CPU, Triton for CUDA."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "torch.compile needs the package triton for CUDA; install it"
        return None
    from torch._inductor import config as inductor

    compilers = [name for name in inductor.cpp.cxx if name]
    if sys.platform == "linux" and not any(shutil.which(name) for name in compilers):
        return f"torch.compile needs a C++ compiler on the CPU; install g++ (looked for {', '.join(compilers)})"
    return None


class CompileRaw(EagerRaw):
    """EagerRaw with its loss compiled, and by that the backward pass; AdamW, the batch and the loop stay eager."""

    name = "compile-raw"
    summary = "MLPRaw with torch.compile around forward and backward"

    def __init__(self, config: Config, shape: Shape, tape: Tape, state: TrainState, device: torch.device) -> None:
        super().__init__(config, shape, tape, state, device)
        self.loss = torch.compile(self._loss, fullgraph=True, dynamic=False, mode=config.compile_mode)

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        return compiler_missing(device)


class Compile(Eager):
    """Eager with its loss compiled, and by that the backward pass; AdamW, the batch and the loop stay eager."""

    name = "compile"
    summary = "MLP with torch.compile around forward and backward"

    def __init__(self, config: Config, shape: Shape, tape: Tape, state: TrainState, device: torch.device) -> None:
        super().__init__(config, shape, tape, state, device)
        self.loss = torch.compile(self._loss, fullgraph=True, dynamic=False, mode=config.compile_mode)

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        return compiler_missing(device)


class CompileStep(DeviceLoop):
    """Batch, forward, backward and AdamW of step.py as one compiled graph.

    One compilation serves the whole run, and on CUDA a captured run of steps is replayed.
    """

    name = "compile-step"
    summary = "forward, backward and AdamW as one compiled graph"
    limits = "any sizes, with (B, V) logits in memory"
    direct = True

    def __init__(self, config: Config, shape: Shape, tape: Tape, state: TrainState, device: torch.device) -> None:
        torch.set_float32_matmul_precision(MATMUL_PRECISION[config.precision])
        self.form = chosen_form(config.form, shape.V, config.batch_size)
        self.scalars = update_scalars(config).to(device)
        self.compiled = torch.compile(self._update, fullgraph=True, dynamic=False, mode=config.compile_mode)
        parameters = {name: torch.empty(size, device=device) for name, size in shape.parameters.items()}
        super().__init__(config, shape, tape, state, device, parameters)

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        return compiler_missing(device)

    @classmethod
    def rejects(cls, config: Config, shape: Shape, device: torch.device) -> str | None:
        if device.type == "cuda" and config.compile_mode in ("reduce-overhead", "max-autotune"):
            return f"--compile-mode {config.compile_mode} captures CUDA graphs of its own; {cls.name} takes default"
        return torch_precision_error(config, device)

    def _step(self) -> None:
        self.compiled()

    def _update(self) -> None:
        contexts, targets = self.tape.batch(self.step, self.config.batch_size)
        loss, gradients = loss_and_gradients(self.parameters, contexts, targets, self.form)
        adamw_(self.parameters, gradients, self.exp_avg, self.exp_avg_sq, self.scalars.index_select(0, self.step)[0])
        self.losses.index_copy_(0, self.step % self.GRAPH_STEPS, loss.view(1))
        self.step += 1

    def prepare(self) -> None:
        super().prepare()
        if self.device.type == "cuda":
            self.graph = StepGraph(self.compiled, self.GRAPH_STEPS)

    def logits(self, contexts: Tensor) -> Tensor:
        return forward(self.parameters, contexts)


def forward(parameters: Parameters, contexts: Tensor) -> Tensor:
    """Contexts (N, T), int64 -> logits (N, V), by the gather form."""
    emb = parameters[WTE][contexts].flatten(1)
    hidden = torch.tanh(emb @ parameters[W1].t() + parameters[B1])
    logits = hidden @ parameters[W2].t() + parameters[B2]
    return logits + emb @ parameters[DIRECT].t() if DIRECT in parameters else logits
