"""The operator embed_linear_tanh."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mlp_fast.kernels._model import FORMS
from mlp_fast.kernels._runtime import INPUT_PRECISION
from mlp_fast.ops._checks import (
    FLOATS,
    INTEGERS,
    check_capability,
    check_device,
    check_dtype,
    check_in_range,
    one_of,
    shapes,
)
from mlp_fast.ops._dispatch import call, kernels, register, use_kernels, use_opaque, wide


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
    operands = [wte, weight] if bias is None else [wte, weight, bias]
    check_dtype("wte, weight and bias", operands, FLOATS)
    check_device("idx, wte, weight and bias", [idx, *operands])
    V, E = wte.shape if wte.dim() == 2 else (0, 0)
    H, TE = weight.shape if weight.dim() == 2 else (0, 0)
    if 0 in (V, H, TE) or idx.dim() != 2 or idx.shape[1] * E != TE or (bias is not None and bias.shape != (H,)):
        raise ValueError(
            "shapes must be idx (B, T), wte (V, E), weight (H, T*E), bias (H,), none but B zero, "
            f"not {shapes(idx, wte, weight, bias)}"
        )


def _public(
    idx: Tensor, wte: Tensor, weight: Tensor, bias: Tensor | None, form: str = "auto", precision: str = "fp32"
) -> Tensor:
    _check(idx, wte, weight, bias, form, precision)
    if use_opaque(wte, weight, bias):
        return torch.ops.mlp_fast.embed_linear_tanh_forward(idx, wte, weight, bias, form, precision)
    return _plain(idx, wte, weight, bias)


def _plain(idx: Tensor, wte: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    try:
        emb = F.embedding(idx.long(), wide(wte)).flatten(1)
    except IndexError:
        check_in_range("tokens of idx", idx, wte.shape[0])
        raise
    return F.linear(emb, wide(weight), None if bias is None else wide(bias)).tanh().to(weight.dtype)


def _forward(idx: Tensor, wte: Tensor, weight: Tensor, bias: Tensor | None, form: str, precision: str) -> Tensor:
    if not use_kernels(weight):
        return _plain(idx, wte, weight, bias)
    check_capability(weight, precision)
    check_in_range("tokens of idx", idx, wte.shape[0])
    return kernels("embed_linear_tanh").embed_linear_tanh_fwd(idx, wte, weight, bias, form, precision)


def _fake(idx: Tensor, wte: Tensor, weight: Tensor, *rest: object) -> Tensor:
    return weight.new_empty(idx.shape[0], weight.shape[0])


def _backward(
    dh: Tensor, h: Tensor, need_wte: bool, need_weight: bool,
    idx: Tensor, wte: Tensor, weight: Tensor, bias: Tensor | None, form: str, precision: str,
) -> Sequence[Tensor | None]:  # fmt: skip
    if use_kernels(weight):
        backward = kernels("embed_linear_tanh").embed_linear_tanh_bwd
        return backward(dh, h, idx, wte, weight, form, precision, need_wte, need_weight)
    # By the functions that autograd calls in _plain: compiled code computes the bits of eager code.
    dwte = dweight = dbias = None
    tokens = idx.long()
    dpre = torch.ops.aten.tanh_backward(wide(dh), wide(h))
    if need_weight:
        emb = F.embedding(tokens, wide(wte)).flatten(1)
        dweight, dbias = (dpre.t() @ emb).to(weight.dtype), dpre.sum(0).to(weight.dtype)
    if need_wte:
        demb = (dpre @ wide(weight)).view(*idx.shape, wte.shape[1])
        dwte = torch.ops.aten.embedding_dense_backward(demb, tokens, wte.shape[0], -1, False).to(wte.dtype)
    return dwte, dweight, dbias


register(
    "embed_linear_tanh", _public, operands=slice(1, 4), forward=_forward, fake=_fake, backward=_backward, plain=_plain
)
