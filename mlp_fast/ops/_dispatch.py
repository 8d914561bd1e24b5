"""Which implementation computes an operator, and how torch learns of a differentiable one.

A differentiable operator is mlp_fast::NAME_v2. It is composed of others: of mlp_fast::NAME_forward, which runs the
Triton kernels and which compilers take as it is; or of plain torch, wherever there is no kernel and for every
derivative that the kernels lack.
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
# torch.compile finds a compiled graph on disk by the names and arguments of the operators in the user's code. So these
# have a version, which changes with the schemas of NAME_forward and NAME_backward, which the graph calls.
_VERSION = "v2"


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


def use_opaque(first: Tensor, *others: Tensor | None) -> bool:
    """Whether an operator on these operands calls its NAME_forward, else plain torch.

    Compiled code calls it on the CPU too, so that without options it computes what eager code computes, to the bit.
    """
    return (use_kernels(first) or torch.compiler.is_compiling()) and not transformed((first, *others))


def wide(t: Tensor) -> Tensor:
    """16-bit tensors as fp32, in which plain torch computes as the kernels do."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def call(name: str, public: Callable[..., Tensor], *args: Any) -> Tensor:
    """Calls an operator, or its function alone where no compiler, autocast or torch.func has to see the operator: the
    way through torch's dispatcher and back takes as long as a small model's forward pass."""
    seen = (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
    )
    return (getattr(torch.ops.mlp_fast, f"{name}_{_VERSION}") if seen else public)(*args)


def register(
    name: str,
    public: Callable[..., Tensor],
    operands: slice,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Sequence[Tensor | None]],
    plain: Callable[..., Tensor],
) -> None:
    """Registers the operators mlp_fast::NAME_v2, NAME_forward and NAME_backward. Type hints become schemas.

    Args:
        name: NAME.
        public: what NAME_v2 computes, composed of NAME_forward or of plain torch.
        operands: which of its arguments autocast casts to its dtype of the moment, where they are floating-point.
        forward: what NAME_forward computes, with kernels or without: (index, x, weight, bias, ...) -> out, or
            (out, kept). The arguments after bias are tensors without a gradient, and then strings. The backward pass
            gets kept, or else out.
        fake: the same with results that have no numbers.
        backward: its gradients, with kernels or without: (dout, kept, need_x, need_weight, *arguments of forward) ->
            (dx, dweight, dbias), of which those are None that are not needed. dweight and dbias come together.
        plain: (index, x, weight, bias, ...) -> out in plain torch, without the strings. Gradients that are to be
            differentiated again, or in batches, are its gradients.
    """
    _register_public(f"{name}_{_VERSION}", public, operands)
    schema = torch.library.infer_schema(forward, mutates_args=())
    forward_op = torch.library.custom_op(
        f"mlp_fast::{name}_forward", _on_device(forward), mutates_args=(), schema=schema
    )
    forward_op.register_fake(fake)

    @torch.library.custom_op(
        f"mlp_fast::{name}_backward",
        mutates_args=(),
        schema=f"(Tensor dout, Tensor kept, bool[] needs, {schema[1:].split(') -> ')[0]}) -> Tensor[]",
    )
    @_on_device
    def backward_op(dout: Tensor, kept: Tensor, needs: Sequence[bool], *inputs: Any) -> list[Tensor]:
        gradients = backward(dout, kept, needs[0], needs[1] or needs[2], *inputs)
        return [g for g, need in zip(gradients, needs, strict=True) if need and g is not None]

    @backward_op.register_fake
    def _(dout: Tensor, kept: Tensor, needs: Sequence[bool], index: Tensor, *inputs: Any) -> list[Tensor]:
        return [t.new_empty(t.shape) for t, need in zip(inputs, needs, strict=False) if need]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kept = output
        if not isinstance(output, Tensor):
            kept = output[1]
            ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept, *(a for a in inputs if not isinstance(a, str)))
        ctx.strings = [a for a in inputs if isinstance(a, str)]

    def differentiate(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        kept, *tensors = ctx.saved_tensors
        # Gradients that will be differentiated too, or of a batch of dout (is_grads_batched) at a time.
        batched = torch._C._functorch.is_legacy_batchedtensor(dout)
        if torch.is_grad_enabled() or transformed([dout]) or batched:
            found = _gradients_of_plain(plain, tensors, ctx.needs_input_grad, dout)
        else:
            found = backward_op(dout, kept, ctx.needs_input_grad[1:4], *tensors, *ctx.strings)
        gradients = iter(found)
        return tuple(next(gradients) if need else None for need in ctx.needs_input_grad)

    forward_op.register_autograd(differentiate, setup_context=save)


def _register_public(name: str, public: Callable[..., Tensor], operands: slice) -> None:
    _library.define(f"{name}{torch.library.infer_schema(public, mutates_args=())}")
    for key in ("CompositeImplicitAutograd", "FuncTorchBatched"):
        _library.impl(name, public, key)
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


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run with the device of its first argument as the current one: Triton launches there."""

    def run(*args: Any) -> Any:
        with torch.cuda.device_of(args[0]):
            return function(*args)

    return run


def _gradients_of_plain(
    plain: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], dout: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of plain(*inputs) that are needed; they can be differentiated again."""
    leaves = [t for t, need in zip(inputs, needs, strict=False) if need]

    def of(*leaves: Tensor | None) -> Tensor:
        given = iter(leaves)
        return plain(*(next(given) if need else t for t, need in zip(inputs, needs, strict=False)))

    gradients: tuple[Tensor, ...] = torch.func.vjp(of, *leaves)[1](dout)
    return gradients
