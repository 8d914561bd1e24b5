"""The registry: every backend by name, imported only when asked for."""

import importlib

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

# alias -> candidates; the first that is available here and takes the sizes is meant. triton-step stands before
# triton-persistent until a recording on a GPU shows which of them is faster.
_TRITON = ("triton-step", "triton-persistent", "triton-op")
ALIASES = {
    "triton": _TRITON,
    "auto": (*_TRITON, "native", "compile-step", "eager"),
}


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


def obstacle(name: str, config: Config, shape: Shape | None = None, tape: Tape | None = None) -> str | None:
    """Why a backend cannot be used with these settings (and, once known, sizes and tape), or None where it can."""
    cls = backend_class(name)
    device = device_of(cls, config.device)
    if device.type not in cls.devices:
        return f"it does not run on {device.type}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device was found"
    if distributed.world().size > 1:
        if not cls.distributed:
            return f"it computes in one process; under torchrun use {', '.join(_distributed())}"
        if device.type == "cuda" and (reason := distributed.gpu_missing()):
            return f"{reason}; lower --nproc-per-node or add --device cpu"
    if tape is not None and tape.stays_on_host(device) and not cls.host_tape:
        size = tape.tokens.nbytes / 2**30
        return f"it needs the training tape on the GPU, and {size:,.0f} GiB are too large; use eager or compile"
    if config.direct and not cls.direct:
        return "it computes no direct connections; leave out --direct"
    reason = cls.unavailable(device)
    if reason is None and shape is not None:
        reason = cls.rejects(config, shape, device)
    if reason is None and tape is not None:
        reason = cls.rejects_tape(tape)
    return reason


def check(config: Config) -> None:
    """Raises UserError where the backend is unknown or cannot run here; before any data is read.

    With config.interpret it also switches Triton's interpreter on, for the whole process.
    """
    _switch_interpreter(config)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device was found; choose --device cpu or auto")
    if config.backend in ALIASES:
        return
    if config.backend not in REGISTRY:
        raise UserError(f"--backend {config.backend!r} is unknown; available here: {', '.join(_available(config))}")
    reason = obstacle(config.backend, config)
    if reason:
        raise UserError(
            f"--backend {config.backend} is unavailable: {reason}; available here: {', '.join(_available(config))}"
        )


def resolve(config: Config, shape: Shape, tape: Tape | None = None) -> str:
    """The backend's name that config.backend means for these sizes and tape; UserError where there is none."""
    check(config)
    if config.backend in REGISTRY:
        reason = obstacle(config.backend, config, shape, tape)
        if reason:
            raise UserError(f"--backend {config.backend}: {reason}")
        return config.backend
    reasons = []
    for name in ALIASES[config.backend]:
        reason = obstacle(name, config, shape, tape)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise UserError(f"--backend {config.backend} found none; {'; '.join(reasons)}")


def passed_over(config: Config, shape: Shape, tape: Tape, chosen: type[Backend]) -> str:
    """Why an alias does not mean a backend that is better than the chosen one, and made for its device; or ""."""
    device = device_of(chosen, config.device).type
    reasons = []
    for name in ALIASES.get(config.backend, ()):
        if name == chosen.name:
            break
        if backend_class(name).devices[0] == device:
            reasons.append(f"{name}: {obstacle(name, config, shape, tape)}")
    return f" (not {'; '.join(reasons)})" if reasons else ""


def create(config: Config, shape: Shape, tape: Tape, state: TrainState) -> Backend:
    """The backend that config asks for, at `state`."""
    cls = backend_class(resolve(config, shape, tape))
    threads.use(config.threads)
    return cls(config, shape, tape, state, device_of(cls, config.device))


def listing(config: Config) -> str:
    """One line per backend for --list-backends: its name, what it is, and whether this machine has it or why not."""
    _switch_interpreter(config)
    lines = []
    for name in REGISTRY:
        cls = backend_class(name)
        reason = obstacle(name, config)
        status = f"unavailable: {reason}" if reason else f"available on {device_of(cls, config.device).type}"
        processes = "one or several processes" if cls.distributed else "one process"
        direct = "" if cls.direct else "; no --direct"
        lines.append(f"{name:18} {cls.summary:62} {status:22} takes {cls.limits}; {processes}{direct}")
    for alias, candidates in ALIASES.items():
        chosen = next((name for name in candidates if obstacle(name, config) is None), None)
        rule = f"the first that is available and takes the sizes: {', '.join(candidates)}"
        lines.append(f"{alias:18} {rule}; here {chosen or 'none'}")
    return "\n".join(lines)


def _switch_interpreter(config: Config) -> None:
    if config.interpret:
        try:
            enable_interpreter()
        except RuntimeError as error:
            raise UserError(f"--interpret: {error}") from None


def _distributed() -> list[str]:
    return [name for name in REGISTRY if backend_class(name).distributed]


def _available(config: Config) -> list[str]:
    return [name for name in REGISTRY if obstacle(name, config) is None]
