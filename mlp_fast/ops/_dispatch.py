"""Which implementation computes an operator, and what all differentiable operators register.

A public operator is composed of others: of an opaque one, which runs the Triton kernels and which compilers take as it
is, or of plain torch. Plain torch computes wherever there is no kernel, and every derivative that the kernels lack.
"""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mlp_fast.kernels._runtime import interpreting
from mlp_fast.ops._checks import FLOATS

_library = torch.library.Library("mlp_fast", "FRAGMENT")


def use_kernels(t: Tensor) -> bool:
    """Whether a tensor's computation is done by the Triton kernels, else by plain torch."""
    return t.dtype != torch.float64 and (t.is_cuda or (t.is_cpu and interpreting()))


def kernels(name: str) -> ModuleType:
    """A module of kernels/, imported at its first use: it needs Triton."""
    try:
        return importlib.import_module(f"mlp_fast.kernels.{name}")
    except ModuleNotFoundError as error:
        raise RuntimeError(f"the fused operators need Triton on CUDA tensors: {error}") from None


def transformed(tensors: Sequence[Tensor | None]) -> bool:
    """Whether forward-mode AD or a transform of torch.func is at work, which opaque operators cannot follow."""
    # Only within a level of forward-mode AD have tensors tangents; to ask each of them takes microseconds.
    return torch._C._are_functorch_transforms_active() or (
        forward_ad._current_level >= 0
        and any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    )


def use_opaque(*operands: Tensor | None) -> bool:
    """Whether a public operator calls its opaque one, else plain torch; the first operand decides on the kernels.

    Compiled code calls it on the CPU too, so that it computes what eager code computes, to the bit.
    """
    assert operands[0] is not None
    return (use_kernels(operands[0]) or torch.compiler.is_compiling()) and not transformed(operands)


def wide(t: Tensor) -> Tensor:
    """16-bit tensors as fp32, in which plain torch computes as the kernels do."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def plain_gradients(
    f: Callable[..., Tensor], operands: Sequence[Tensor | None], needs: Sequence[bool], dout: Tensor
) -> list[Tensor | None]:
    """The gradients that are needed of f(*operands), by torch; they can be differentiated again."""
    leaves = [t for t, need in zip(operands, needs, strict=True) if t is not None and need]

    def of(*leaves: Tensor) -> Tensor:
        given = iter(leaves)
        return f(*(next(given) if need else t for t, need in zip(operands, needs, strict=True)))

    gradients = iter(torch.func.vjp(of, *leaves)[1](dout))
    return [next(gradients) if need else None for need in needs]


def differentiated_again(dout: Tensor) -> bool:
    """In a backward pass: whether its result will be differentiated too, which the kernels' cannot be."""
    return torch.is_grad_enabled() or transformed([dout])


def or_empty(gradients: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An opaque operator cannot return None: gradients that are not needed become empty tensors."""
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


def or_none(gradients: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """The reverse of or_empty."""
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


def fake_gradients(operands: Sequence[Tensor | None], needs: Sequence[bool], like: Tensor) -> tuple[Tensor, ...]:
    """What a backward operator returns, without its numbers."""
    needed = [t if need else None for t, need in zip(operands, needs, strict=True)]
    return or_empty([None if t is None else t.new_empty(t.shape) for t in needed], like)


def call(name: str, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Calls a public operator, or its function alone where no compiler, autocast or torch.func has to see the operator:
    the way through torch's dispatcher and back takes as long as a small model's forward pass."""
    seen = (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
    )
    return (getattr(torch.ops.mlp_fast, name) if seen else function)(*args)


def register(name: str, function: Callable[..., Tensor], operands: slice) -> None:
    """Makes the function the public operator mlp_fast::name.

    Under autocast those arguments that are floating-point are cast to its dtype of the moment.
    """
    _library.define(f"{name}{torch.library.infer_schema(function, mutates_args=())}")
    for key in ("CompositeImplicitAutograd", "FuncTorchBatched"):
        _library.impl(name, function, key)
    op: Callable[..., Tensor] = getattr(torch.ops.mlp_fast, name)

    def under_autocast(device: str) -> Callable[..., Tensor]:
        def cast_and_call(*args: Any) -> Tensor:
            dtype, cast = torch.get_autocast_dtype(device), list(args)
            cast[operands] = [a.to(dtype) if a is not None and a.dtype in FLOATS[:3] else a for a in args[operands]]
            with torch.autocast(device, enabled=False):
                return op(*cast)

        return cast_and_call

    for device in ("cpu", "cuda"):
        _library.impl(name, under_autocast(device), f"Autocast{device.upper()}")
