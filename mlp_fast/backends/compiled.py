"""torch.compile: of each baseline's forward and backward, and of the whole step as one graph."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mlp_fast.backends.base import Backend
from mlp_fast.backends.device_loop import DeviceLoop
from mlp_fast.backends.eager import AutogradLoop, Eager, EagerRaw
from mlp_fast.backends.requirements import compiler_missing
from mlp_fast.config import Config
from mlp_fast.errors import UserError
from mlp_fast.kernels._model import choose_form
from mlp_fast.model import manual_step
from mlp_fast.model.mlp import Parameters, Shape
from mlp_fast.model.schedule import update_scalars
from mlp_fast.model.windows import Tape


@contextmanager
def _errors_in_one_line(name: str) -> Iterator[None]:
    """Raises UserError, of one line, where torch.compile fails with a report of a hundred lines."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except (TorchDynamoException, OSError) as error:
        message = str(getattr(error, "inner_exception", error)).strip()
        by_compiler = re.search(r"^Output:\n(.+)", message, re.MULTILINE)
        reason = by_compiler[1] if by_compiler else message.partition("\n")[0]
        raise UserError(
            f"--backend {name}: torch.compile failed ({reason}); choose another backend, "
            "or see all of it by TORCH_LOGS=inductor"
        ) from error


class _Compiled(Backend):
    """A backend whose code torch.compile makes: it needs a compiler, and reports its errors in one line."""

    missing = staticmethod(compiler_missing)

    def prepare(self) -> None:
        with _errors_in_one_line(self.name):
            super().prepare()


class _CompiledLoss(_Compiled, AutogradLoop):
    """The loss is compiled, and with it the backward pass; AdamW, the batch and the loop stay eager."""

    def build(self) -> None:
        super().build()
        self.loss = torch.compile(self._loss, fullgraph=True, dynamic=False, mode=self.config.compile_mode)


class CompileRaw(_CompiledLoss, EagerRaw):
    """EagerRaw with its loss compiled."""

    name = "compile-raw"
    summary = "MLPRaw with torch.compile around forward and backward"


class Compile(_CompiledLoss, Eager):
    """Eager with its loss compiled."""

    name = "compile"
    summary = "MLP with torch.compile around forward and backward"


class CompileStep(_Compiled, DeviceLoop):
    """Batch, forward, backward and AdamW of model/manual_step.py as one compiled graph.

    One compilation serves the whole run; on CUDA GRAPH_STEPS of its steps are captured and replayed.
    """

    name = "compile-step"
    summary = "forward, backward and AdamW as one compiled graph"
    limits = "any sizes, with (B, V) logits in memory"
    direct = True

    def build(self) -> None:
        config, device = self.config, self.device
        self.form = choose_form(config.form, config.batch_size, self.shape.V)
        self.scalars = update_scalars(config).to(device)
        options = step_options(config.compile_mode)
        self.compiled = torch.compile(self._update, fullgraph=True, dynamic=False, options=options)
        self.build_loop({name: torch.empty(size, device=device) for name, size in self.shape.parameters.items()})

    @classmethod
    def refused(cls, config: Config, device: torch.device, shape: Shape, tape: Tape | None) -> str | None:
        if device.type == "cuda" and config.compile_mode in ("reduce-overhead", "max-autotune"):
            return f"--compile-mode {config.compile_mode} captures CUDA graphs of its own; {cls.name} takes default"
        return None

    def _step(self) -> None:
        self.compiled()

    def _update(self) -> None:
        parameters, step = self.held.parameters, self.device_step
        contexts, targets = self.tape.batch(step, self.config.batch_size)
        loss, gradients = manual_step.loss_and_gradients(parameters, contexts, targets, self.form)
        scalars = self.scalars.index_select(0, step)[0]
        manual_step.adamw_(parameters, gradients, self.held.exp_avg, self.held.exp_avg_sq, scalars)
        self.losses.index_copy_(0, step % self.GRAPH_STEPS, loss.view(1))
        step += 1  # in place

    def logits(self, contexts: Tensor) -> Tensor:
        return forward(self.held.parameters, contexts)


def step_options(mode: str) -> dict[str, Any]:
    """What torch.compile needs besides a mode's options, to round where eager torch rounds.

    For CUDA Inductor writes Triton, which fuses products into sums. That would lose AdamW's decay, which is nothing but
    the rounding of a product (docs/numerics.md). A product in float64 does not help: LLVM finds that it is exact, and
    takes the float32 one. The C++ for the CPU is never fused.
    """
    return {**torch._inductor.list_mode_options(mode), "emulate_precision_casts": True}


def forward(parameters: Parameters, contexts: Tensor) -> Tensor:
    """Contexts (N, T), int64 -> logits (N, V), by the gather form."""
    return manual_step.forward(parameters, contexts)[-1]
