"""torch.compile: of each baseline's forward and backward, and of the whole step as one graph."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlp_fast.backends.base import Backend
from mlp_fast.backends.device_loop import DeviceLoop
from mlp_fast.backends.eager import AutogradLoop, Eager, EagerRaw
from mlp_fast.backends.precision import unsupported_by_torch
from mlp_fast.config import Config
from mlp_fast.errors import UserError, one_line
from mlp_fast.files import no_place_for_code, shown
from mlp_fast.kernels._model import choose_form
from mlp_fast.model.manual_step import adamw_, loss_and_gradients
from mlp_fast.model.mlp import B1, B2, DIRECT, W1, W2, WTE, Parameters, Shape
from mlp_fast.model.schedule import update_scalars
from mlp_fast.model.windows import Tape


def compiler_missing(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None where it can: Inductor makes C++ for the CPU, Triton for CUDA."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "torch.compile needs the package triton for CUDA; install it"
        return code_folder_unusable()
    from torch._inductor import config as inductor

    compilers = [name for name in inductor.cpp.cxx if name]
    if sys.platform == "linux" and not any(shutil.which(name) for name in compilers):
        return f"torch.compile needs a C++ compiler on the CPU; install g++ (looked for {', '.join(compilers)})"
    if not _is_one_word(home := os.path.dirname(torch.__file__)):
        return f"torch.compile cannot build against torch in {shown(home)}; install it below a folder without blanks"
    return code_folder_unusable()


def code_folder_unusable() -> str | None:
    """Why Inductor cannot keep its code where it would, or None where it can."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    remedy = "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written and executed from, without blanks in its name"
    try:
        folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()).absolute()
    except OSError as error:  # there is no temporary folder at all
        return f"torch.compile has no place for its code ({one_line(error)}); {remedy}"
    reason = no_place_for_code(folder)
    if reason is None and not _is_one_word(str(folder)):
        reason = f"the compiler takes {shown(folder)} for several names"
    return None if reason is None else f"torch.compile has no place for its code: {reason}; {remedy}"


def _is_one_word(path: str) -> bool:
    """Whether a path survives the command line that Inductor makes of it."""
    try:
        return os.name != "posix" or shlex.split(path) == [path]
    except ValueError:  # a quote without its other half
        return False


@contextmanager
def _told_in_short(name: str) -> Iterator[None]:
    """Makes a UserError of a failure of torch.compile, whose own reports are of a hundred lines."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except (TorchDynamoException, OSError) as error:
        told = str(getattr(error, "inner_exception", error)).strip()
        by_compiler = re.search(r"^Output:\n(.+)", told, re.MULTILINE)
        reason = by_compiler[1] if by_compiler else told.partition("\n")[0]
        raise UserError(
            f"--backend {name}: torch.compile failed ({reason}); choose another backend, "
            "or see all of it by TORCH_LOGS=inductor"
        ) from error


class _Compiled(Backend):
    """A backend that torch.compile serves: it needs a compiler, whose errors become one line."""

    @classmethod
    def unsupported(cls, config: Config, device: torch.device, shape: Shape | None, tape: Tape | None) -> str | None:
        return compiler_missing(device) or super().unsupported(config, device, shape, tape)

    def prepare(self) -> None:
        with _told_in_short(self.name):
            super().prepare()


class _CompiledLoss(_Compiled, AutogradLoop):
    """The loss is compiled, and by that the backward pass; AdamW, the batch and the loop stay eager."""

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
        self.parameters = {name: torch.empty(size, device=device) for name, size in self.shape.parameters.items()}
        super().build()

    @classmethod
    def unsupported(cls, config: Config, device: torch.device, shape: Shape | None, tape: Tape | None) -> str | None:
        reason = super().unsupported(config, device, shape, tape)
        if reason or shape is None:
            return reason
        if device.type == "cuda" and config.compile_mode in ("reduce-overhead", "max-autotune"):
            return f"--compile-mode {config.compile_mode} captures CUDA graphs of its own; {cls.name} takes default"
        return unsupported_by_torch(config.precision, device)

    def _step(self) -> None:
        self.compiled()

    def _update(self) -> None:
        contexts, targets = self.tape.batch(self.step, self.config.batch_size)
        loss, gradients = loss_and_gradients(self.parameters, contexts, targets, self.form)
        adamw_(self.parameters, gradients, self.exp_avg, self.exp_avg_sq, self.scalars.index_select(0, self.step)[0])
        self.losses.index_copy_(0, self.step % self.GRAPH_STEPS, loss.view(1))
        self.step += 1

    def logits(self, contexts: Tensor) -> Tensor:
        return forward(self.parameters, contexts)


def step_options(mode: str) -> dict[str, Any]:
    """What torch.compile needs besides a mode's options, to round where eager torch rounds.

    For CUDA Inductor writes Triton, which fuses products into sums. That would lose AdamW's decay, which is nothing but
    the rounding of a product (docs/numerics.md). A product in float64 does not help: LLVM finds that it is exact, and
    takes the float32 one. The C++ for the CPU is never fused.
    """
    return {**torch._inductor.list_mode_options(mode), "emulate_precision_casts": True}


def forward(parameters: Parameters, contexts: Tensor) -> Tensor:
    """Contexts (N, T), int64 -> logits (N, V), by the gather form."""
    emb = parameters[WTE][contexts].flatten(1)
    hidden = torch.tanh(emb @ parameters[W1].t() + parameters[B1])
    logits = hidden @ parameters[W2].t() + parameters[B2]
    return logits + emb @ parameters[DIRECT].t() if DIRECT in parameters else logits
