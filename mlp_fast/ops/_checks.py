"""Checks that the operators share. An error names the arguments, what they must be, and what they are."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mlp_fast.kernels._runtime import LEAST_CAPABILITY, interpreting

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def one_of(what: str, name: str, names: Iterable[str]) -> str:
    """The name, if it is one of `names`."""
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(names)}")
    return name


def check_dtype(names: str, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> None:
    """All tensors have the same dtype, one of `dtypes`."""
    for t in tensors:  # as loops, for these checks are a noticeable part of a small operator's time
        if t.dtype is not tensors[0].dtype or t.dtype not in dtypes:
            found = _listed(t.dtype for t in tensors)
            raise TypeError(f"{names} must have one dtype of {_listed(dtypes)}, not {found}")


def check_device(names: str, tensors: Sequence[Tensor]) -> None:
    """All tensors are on one device."""
    device = tensors[0].device
    for t in tensors:
        if t.device != device:
            raise ValueError(f"{names} must be on one device, not on {_listed(t.device for t in tensors)}")


def _listed(things: Iterable[torch.dtype | torch.device]) -> str:
    return ", ".join(sorted({str(thing).removeprefix("torch.") for thing in things}))


def check_capability(t: Tensor, precision: str) -> None:
    """The GPU has the arithmetic of the kernels for such operands: TF32, or that of t's own 16 bits."""
    if interpreting():
        return
    asked = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(t.dtype, precision)
    major, minor = torch.cuda.get_device_capability(t.device)
    if 10 * major + minor < LEAST_CAPABILITY[asked]:
        what = f"precision {asked!r} needs" if asked == precision else f"{asked} operands need"
        raise ValueError(f"{what} a GPU from sm_{LEAST_CAPABILITY[asked]} on, not sm_{major}{minor}; use fp32")


def check_in_range(what: str, t: Tensor, V: int) -> None:
    """On the CPU, where it costs no synchronisation; on CUDA the kernels mask."""
    if t.device.type == "cpu" and t.numel() > 0:
        low, high = (int(x) for x in t.aminmax())
        if low < 0 or high >= V:
            raise ValueError(f"{what} must be in [0, {V}), but reach from {low} to {high}")


def shapes(*tensors: Tensor | None) -> str:
    """The tensors' shapes, to print."""
    return ", ".join("None" if t is None else str(tuple(t.shape)) for t in tensors)
