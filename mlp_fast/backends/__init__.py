"""The registry: every backend by name, imported only when asked for; and which of them a run uses."""

import importlib
from dataclasses import dataclass

import torch

from mlp_fast import distributed, threads
from mlp_fast.backends.base import Backend
from mlp_fast.config import Config
from mlp_fast.errors import UserError
from mlp_fast.kernels._runtime import enable_interpreter
from mlp_fast.model.mlp import Shape
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape

# name -> "module:class" below mlp_fast.backends, in the order of the ladder from eager code to whole-run kernels
REGISTRY = {
    "eager-raw": "eager:EagerRaw",
    "eager": "eager:Eager",
    "compile-raw": "compiled:CompileRaw",
    "compile": "compiled:Compile",
    "compile-step": "compiled:CompileStep",
    "triton-op": "triton_op:TritonOp",
    "triton-step": "triton_step:TritonStep",
    "triton-persistent": "triton_persistent:TritonPersistent",
    "native": "native:Native",
}

# alias -> candidates, of which the first that is supported is used. triton-step stands before triton-persistent until
# a recording on a GPU shows which of them is faster.
_TRITON = ("triton-step", "triton-persistent", "triton-op")
ALIASES = {
    "triton": _TRITON,
    "auto": (*_TRITON, "native", "compile-step", "eager"),
}


@dataclass(frozen=True)
class Choice:
    """The backend that a run uses, and the device that it runs on.

    Attributes:
        note: why no better backend that is made for this device was chosen, as a run's title says it; or "".
    """

    cls: type[Backend]
    device: torch.device
    note: str

    def create(self, config: Config, shape: Shape, tape: Tape, state: TrainState) -> Backend:
        """The backend, at `state`."""
        threads.use(config.threads)
        return self.cls(config, shape, tape, state, self.device)


def names() -> list[str]:
    """Backends, then aliases: all that --backend takes."""
    return [*REGISTRY, *ALIASES]


def backend_class(name: str) -> type[Backend]:
    """The class behind a backend's name (not an alias)."""
    module, _, attribute = REGISTRY[name].partition(":")
    return getattr(importlib.import_module(f"mlp_fast.backends.{module}"), attribute)


def device_of(cls: type[Backend], requested: str) -> torch.device:
    """The device that a backend would use: `auto` is the first of its devices that this machine has."""
    if requested == "auto":
        return torch.device(next((d for d in cls.devices if d == "cpu" or torch.cuda.is_available()), cls.devices[0]))
    return torch.device(requested)


def unsupported(name: str, config: Config, shape: Shape | None = None, tape: Tape | None = None) -> str | None:
    """Why a backend cannot be used with these settings (and, once known, sizes and tape), or None where it can."""
    cls = backend_class(name)
    device = device_of(cls, config.device)
    if device.type not in cls.devices:
        return f"it does not run on {device.type}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device was found"
    if distributed.world().size > 1:
        if not cls.distributed:
            able = (other for other in REGISTRY if backend_class(other).distributed)
            return f"it computes in one process; under torchrun use {', '.join(able)}"
        if device.type == "cuda" and (reason := distributed.gpu_missing()):
            return f"{reason}; lower --nproc-per-node or add --device cpu"
    if tape is not None and tape.stays_on_host(device) and not cls.host_tape:
        size = tape.tokens.nbytes / 2**30
        return f"it needs the training tape on the GPU, and {size:,.0f} GiB are too large; use eager or compile"
    if config.direct and not cls.direct:
        return "it computes no direct connections; leave out --direct"
    if (reason := cls.missing(device)) or shape is None:
        return reason
    if config.form == "gather" and not cls.gather:
        return "its kernels have the table form only; --form gather is for triton-op and compile-step"
    return cls.unsupported_precision(config.precision, device) or cls.refused(config, device, shape, tape)


def available(config: Config, shape: Shape | None = None) -> list[str]:
    """The backends that this machine has with these settings, and, where they are given, sizes."""
    return [name for name in REGISTRY if unsupported(name, config, shape) is None]


def check(config: Config) -> None:
    """Raises UserError where the backend is unknown or cannot run here; before any data is read.

    With config.interpret it also switches Triton's interpreter on, for the whole process.
    """
    _candidates(config)
    if config.backend in REGISTRY and (reason := unsupported(config.backend, config)):
        raise UserError(
            f"--backend {config.backend} is unavailable: {reason}; available here: {', '.join(available(config))}"
        )


def resolve(config: Config, shape: Shape, tape: Tape | None = None) -> Choice:
    """The backend that config.backend means for these sizes and tape; UserError where there is none."""
    reasons: dict[str, str] = {}  # why the candidates before are unsupported
    for name in _candidates(config):
        cls = backend_class(name)
        reason = unsupported(name, config, shape, tape)
        if reason is None:
            device = device_of(cls, config.device)
            better = [f"{n}: {why}" for n, why in reasons.items() if backend_class(n).devices[0] == device.type]
            return Choice(cls, device, f" (not {'; '.join(better)})" if better else "")
        reasons[name] = reason
    if config.backend in REGISTRY:
        raise UserError(f"--backend {config.backend}: {reasons[config.backend]}")
    raise UserError(f"--backend {config.backend} found none; {'; '.join(f'{n}: {why}' for n, why in reasons.items())}")


def create(config: Config, shape: Shape, tape: Tape, state: TrainState) -> Backend:
    """The backend that config asks for, at `state`."""
    return resolve(config, shape, tape).create(config, shape, tape, state)


def listing(config: Config) -> str:
    """One line per backend for --list-backends: its name, what it is, and whether this machine has it or why not."""
    _switch_interpreter(config)
    reasons = {name: unsupported(name, config) for name in REGISTRY}
    lines = []
    for name, reason in reasons.items():
        cls = backend_class(name)
        status = f"unavailable: {reason}" if reason else f"available on {device_of(cls, config.device).type}"
        processes = "one or several processes" if cls.distributed else "one process"
        direct = "" if cls.direct else "; no --direct"
        lines.append(f"{name:18} {cls.summary:62} {status:22} takes {cls.limits}; {processes}{direct}")
    for alias, candidates in ALIASES.items():
        chosen = next((name for name in candidates if reasons[name] is None), "none")
        rule = f"the first that is available and takes the sizes: {', '.join(candidates)}"
        lines.append(f"{alias:18} {rule}; here {chosen}")
    return "\n".join(lines)


def _candidates(config: Config) -> tuple[str, ...]:
    """The backends that config.backend may mean, the best first; UserError where it is unknown, or no GPU is there."""
    _switch_interpreter(config)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device was found; choose --device cpu or auto")
    if config.backend in ALIASES:
        return ALIASES[config.backend]
    if config.backend not in REGISTRY:
        raise UserError(f"--backend {config.backend!r} is unknown; available here: {', '.join(available(config))}")
    return (config.backend,)


def _switch_interpreter(config: Config) -> None:
    if config.interpret:
        try:
            enable_interpreter()
        except RuntimeError as error:
            raise UserError(f"--interpret: {error}") from None
