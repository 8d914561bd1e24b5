"""The operator embed_linear_tanh."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlp_fast.kernels._model import FORMS
from mlp_fast.kernels._runtime import INPUT_PRECISION
from mlp_fast.ops._checks import (
    INTEGERS,
    check_capability,
    check_dtype,
    check_in_range,
    check_operands,
    one_of,
    shapes,
)
from mlp_fast.ops._dispatch import (
    call,
    differentiated_again,
    fake_gradients,
    kernels,
    or_empty,
    or_none,
    plain_gradients,
    register,
    use_kernels,
    use_opaque,
    wide,
)


def embed_linear_tanh(
    idx: Tensor, wte: Tensor, weight: Tensor, bias: Tensor | None, *, form: str = "auto", precision: str = "fp32"
) -> Tensor:
    """tanh(F.linear(F.embedding(idx, wte).flatten(1), weight, bias)), without writing the embeddings to memory.

    Args:
        idx: tokens (B, T), any integer dtype, in [0, V). B may be 0.
        wte: embeddings (V, E); float32, bfloat16, float16 or float64, as weight and bias.
        weight: (H, T*E), any strides.
        bias: (H,), or None.
        form: `gather` multiplies gathered rows; `table` multiplies every row of wte once and gathers products;
            `auto` takes the table while V < B. The same function, but for the order of additions, and that the table
            form reads every row of wte: one that is not finite makes gradients NaN even if no token names it.
        precision: of fp32 products on CUDA: `fp32`, `tf32x3` (about as accurate, on tensor cores), `tf32`.
            16-bit inputs are multiplied on tensor cores. Sums are always fp32. GPUs before sm_80 have neither TF32
            nor bfloat16.

    Returns:
        (B, H), of weight's dtype. Gradients reach wte, weight and bias; they have the same bits on every run.
        Gradients of gradients, forward-mode AD and torch.func are computed by plain torch.

    Raises:
        TypeError, ValueError: a dtype, shape, device or name is not as above, or the GPU lacks it; on the CPU also a
            token out of range. On CUDA such a token would cost a synchronisation to report: it reads nothing and makes
            its row NaN, and with it the gradients.

    Example::

        h = embed_linear_tanh(idx, model.wte.weight, model.mlp[0].weight, model.mlp[0].bias)
    """
    return call("embed_linear_tanh", _public, idx, wte, weight, bias, form, precision)


def _check(idx: Tensor, wte: Tensor, weight: Tensor, bias: Tensor | None, form: str, precision: str) -> None:
    one_of("form", form, FORMS)
    one_of("precision", precision, INPUT_PRECISION)
    check_dtype("idx", [idx], INTEGERS)
    check_operands("wte, weight and bias", "idx, wte, weight and bias", idx, wte, weight, bias)
    if (
        (idx.dim(), wte.dim(), weight.dim()) != (2, 2, 2)
        or weight.shape[1] != idx.shape[1] * wte.shape[1]
        or (bias is not None and bias.shape != weight.shape[:1])
        or 0 in (idx.shape[1], *wte.shape, *weight.shape)
    ):
        raise ValueError(
            "shapes must be idx (B, T), wte (V, E), weight (H, T*E), bias (H,), none but B zero, "
            f"not {shapes(idx, wte, weight, bias)}"
        )


def _plain(idx: Tensor, wte: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    try:
        emb = F.embedding(idx.long(), wide(wte)).flatten(1)
    except IndexError:
        check_in_range("tokens of idx", idx, wte.shape[0])
        raise
    return F.linear(emb, wide(weight), None if bias is None else wide(bias)).tanh().to(weight.dtype)


def _public(
    idx: Tensor, wte: Tensor, weight: Tensor, bias: Tensor | None, form: str = "auto", precision: str = "fp32"
) -> Tensor:
    _check(idx, wte, weight, bias, form, precision)
    if use_opaque(wte, weight, bias):
        return torch.ops.mlp_fast.embed_linear_tanh_forward(idx, wte, weight, bias, form, precision)
    return _plain(idx, wte, weight, bias)


@torch.library.custom_op("mlp_fast::embed_linear_tanh_forward", mutates_args=())
def _forward(idx: Tensor, wte: Tensor, weight: Tensor, bias: Tensor | None, form: str, precision: str) -> Tensor:
    if not use_kernels(weight):
        return _plain(idx, wte, weight, bias)
    check_capability(weight, precision)
    check_in_range("tokens of idx", idx, wte.shape[0])
    with torch.cuda.device_of(weight):
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return kernels("embed_linear_tanh").embed_linear_tanh_fwd(idx, wte, weight, bias, form, precision)


@_forward.register_fake
def _(idx: Tensor, wte: Tensor, weight: Tensor, bias: Tensor | None, form: str, precision: str) -> Tensor:
    return weight.new_empty(idx.shape[0], weight.shape[0])


@torch.library.custom_op("mlp_fast::embed_linear_tanh_backward", mutates_args=())
def _backward(
    dh: Tensor, h: Tensor, idx: Tensor, wte: Tensor, weight: Tensor, form: str, precision: str,
    need_wte: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dwte, dweight, dbias), the last two together; what is not needed is empty."""
    if use_kernels(weight):
        with torch.cuda.device_of(weight):
            gradients = kernels("embed_linear_tanh").embed_linear_tanh_bwd(
                dh, h, idx, wte, weight, form, precision, need_wte, need_weight
            )
    else:
        gradients = _plain_backward(dh, h, idx, wte, weight, need_wte, need_weight)
    dwte, dweight, dbias = or_empty(gradients, weight)
    return dwte, dweight, dbias


def _plain_backward(
    dh: Tensor, h: Tensor, idx: Tensor, wte: Tensor, weight: Tensor, need_wte: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """By the functions that autograd calls in _plain: compiled code computes the bits of eager code."""
    dwte = dweight = dbias = None
    dpre = torch.ops.aten.tanh_backward(wide(dh), wide(h))
    tokens = idx.long()
    if need_weight:
        emb = F.embedding(tokens, wide(wte)).flatten(1)
        dweight, dbias = (dpre.t() @ emb).to(weight.dtype), dpre.sum(0).to(weight.dtype)
    if need_wte:
        demb = (dpre @ wide(weight)).view(*idx.shape, wte.shape[1])
        dwte = torch.ops.aten.embedding_dense_backward(demb, tokens, wte.shape[0], -1, False).to(wte.dtype)
    return dwte, dweight, dbias


@_backward.register_fake
def _(
    dh: Tensor, h: Tensor, idx: Tensor, wte: Tensor, weight: Tensor, form: str, precision: str,
    need_wte: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    needs = need_wte, need_weight, need_weight
    dwte, dweight, dbias = fake_gradients((wte, weight, weight[:, 0]), needs, weight)
    return dwte, dweight, dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    idx, wte, weight, bias, ctx.form, ctx.precision = inputs
    ctx.save_for_backward(output, idx, wte, weight, bias)


def _autograd(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    h, idx, wte, weight, bias = ctx.saved_tensors
    needs = ctx.needs_input_grad[1:4]
    if differentiated_again(dh):
        gradients = plain_gradients(partial(_plain, idx), (wte, weight, bias), needs, dh)
    else:
        found = torch.ops.mlp_fast.embed_linear_tanh_backward(
            dh, h, idx, wte, weight, ctx.form, ctx.precision, needs[0], needs[1] or needs[2]
        )
        gradients = or_none(found, needs)
    return None, *gradients, None, None


_forward.register_autograd(_autograd, setup_context=_setup)
register("embed_linear_tanh", _public, operands=slice(1, 4))
