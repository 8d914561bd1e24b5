"""The operator linear_cross_entropy.

The kernels compute the mean cross-entropy; or, with coefficients r and s of each row b, the losses

    loss[b] = r[b] nll[b] + s[b] lse[b];   lse = logsumexp(logits), nll = lse - logits[target]

All options are plain torch around the latter, differentiated by autograd. With w the classes' weights,
sigma = label_smoothing / V, and share = 0 where a row is ignored, else 1:

    loss[b] = share ((1 - label_smoothing) w[target] nll[b] + sigma (sum(w) lse[b] - w . logits[b]))

and w . logits = input . (w linear_weight) + w . linear_bias needs no logits. The mean is their sum over the sum of
share w[target].
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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

REDUCTIONS = ("mean", "sum", "none")
# What plain torch is told to ignore where nothing is ignored.
_NO_TARGET = torch.iinfo(torch.int64).min


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    precision: str = "fp32",
) -> Tensor:
    """F.cross_entropy(F.linear(input, linear_weight, linear_bias), target), without writing the logits to memory.

    The arguments have the names and meanings of torch's own F.linear_cross_entropy, but for what `None` ignores.

    Args:
        input: (B, H); float32, bfloat16, float16 or float64, as linear_weight and linear_bias. B may be 0: the mean
            of nothing is NaN.
        linear_weight: (V, H), any strides.
        linear_bias: (V,), or None.
        target: classes (B,), any integer dtype, in [0, V) or ignore_index. Probabilities of classes are not taken.
        weight: of each class in the loss, (V,), floating-point, without a gradient; None weighs all alike.
        reduction: `mean` over the rows, by the weights of their targets; `sum`; or `none`, a loss for every row.
        ignore_index: rows with this target have no loss and no gradient; None ignores no row (torch's None: -100).
        label_smoothing: the share, in [0, 1], of each target that is spread evenly over all classes. With 16-bit inputs
            on CUDA it keeps a float32 copy of input until the backward pass, and its part of a gradient is rounded to
            16 bits before it is added.
        precision: as in embed_linear_tanh.

    Returns:
        In nats, a scalar or (B,): float32, or float64 for float64. Gradients reach input, linear_weight and
        linear_bias; they have the same bits on every run. Gradients of gradients, forward-mode AD and torch.func are
        computed by plain torch, which does write the logits.

    Raises:
        TypeError, ValueError: a dtype, shape, device, number or name is not as above, or the GPU lacks it; on the CPU
            also a target out of range. On CUDA such a target makes its loss and all gradients NaN.

    Example::

        loss = linear_cross_entropy(h, model.mlp[2].weight, model.mlp[2].bias, targets)
        loss.backward()
    """
    operands = input, linear_weight, linear_bias, target
    return call("linear_cross_entropy", _public, *operands, weight, reduction, ignore_index, label_smoothing, precision)


def _check(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    reduction: str, label_smoothing: float, precision: str,
) -> None:  # fmt: skip
    one_of("precision", precision, INPUT_PRECISION)
    one_of("reduction", reduction, REDUCTIONS)
    check_dtype("target", [target], INTEGERS)
    operands = [input, linear_weight] if linear_bias is None else [input, linear_weight, linear_bias]
    check_dtype("input, linear_weight and linear_bias", operands, FLOATS)
    check_device("input, linear_weight, linear_bias and target", [target, *operands])
    B = target.numel()
    V, H = linear_weight.shape if linear_weight.dim() == 2 else (0, 0)
    if (
        0 in (V, H)
        or input.shape != (B, H)
        or target.shape != (B,)
        or (linear_bias is not None and linear_bias.shape != (V,))
    ):
        raise ValueError(
            "shapes must be input (B, H), linear_weight (V, H), linear_bias (V,), target (B,), none but B zero, "
            f"not {shapes(input, linear_weight, linear_bias, target)}"
        )
    if weight is not None:
        check_dtype("weight", [weight], FLOATS)
        check_device("weight and linear_weight", [weight, linear_weight])
        if weight.shape != (V,):
            raise ValueError(f"weight must be of the shape (V,) = ({V},), not {shapes(weight)}")
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError("weight must not require a gradient: the loss has none with respect to it; detach it")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], not {label_smoothing}")


def _public(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None = None,
    reduction: str = "mean", ignore_index: int | None = None, label_smoothing: float = 0.0, precision: str = "fp32",
) -> Tensor:  # fmt: skip
    _check(input, linear_weight, linear_bias, target, weight, reduction, label_smoothing, precision)
    operands = input, linear_weight, linear_bias
    if not use_opaque(*operands):
        return _cross_entropy(_logits(*operands), target, weight, reduction, ignore_index, label_smoothing)
    forward = torch.ops.mlp_fast.linear_cross_entropy_forward
    if weight is None and (reduction, ignore_index, label_smoothing) == ("mean", None, 0):
        return forward(target, *operands, None, precision)[0]
    V, dtype = linear_weight.shape[0], torch.promote_types(input.dtype, torch.float32)
    w = input.new_ones(V, dtype=dtype) if weight is None else weight.to(dtype)
    target = target.long()
    counts = None if ignore_index is None else target != ignore_index

    def counting(values: Tensor) -> Tensor:
        """share * values; 0 also for an ignored row whose value is not finite."""
        return values if counts is None else torch.where(counts, values, 0)

    target = counting(target)
    # Clamped, since the kernels answer for an invalid target, with NaN.
    target_weight = counting(w[target.clamp(0, V - 1)])
    sigma = counting(w.new_full(target.shape, label_smoothing / V))
    coefficients = torch.stack([(1 - label_smoothing) * target_weight, sigma * w.sum()])
    loss, _ = forward(target, *operands, coefficients, precision)
    if label_smoothing > 0:
        dot = wide(input) @ (w @ wide(linear_weight))
        loss = loss - sigma * (dot if linear_bias is None else dot + w @ wide(linear_bias))
    loss = counting(loss)
    if reduction == "none":
        return loss
    return loss.sum() / target_weight.sum() if reduction == "mean" else loss.sum()


def _logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    return F.linear(wide(input), wide(linear_weight), None if linear_bias is None else wide(linear_bias))


def _cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean",
    ignore_index: int | None = None, label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    weight = None if weight is None else weight.to(logits.dtype)
    target = target.long()
    ignored = _NO_TARGET if ignore_index is None else ignore_index
    try:
        return F.cross_entropy(
            logits, target, weight, reduction=reduction, ignore_index=ignored, label_smoothing=label_smoothing
        )
    except IndexError:
        check_in_range("targets", target[target != ignored], logits.shape[1])
        raise


# ---------------------------------------------------------------------------------------------------------------
# What compilers take as it is: the mean, or with the coefficients (r, s), (2, B), the loss of every row.


def _plain(
    target: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, coefficients: Tensor | None
) -> Tensor:
    logits = _logits(input, linear_weight, linear_bias)
    if coefficients is None:
        return _cross_entropy(logits, target)
    r, s = coefficients
    return r * _cross_entropy(logits, target, reduction="none") + s * logits.logsumexp(1)


def _forward(
    target: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, coefficients: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss; and what the kernels need of every row, the maximum of its logits and lse less that, (2, B)."""
    if not use_kernels(input):
        return _plain(target, input, linear_weight, linear_bias, coefficients), input.new_empty(0)
    check_capability(input, precision)
    check_in_range("targets", target, linear_weight.shape[0])
    forward = kernels("linear_cross_entropy").linear_cross_entropy_fwd
    return forward(input, linear_weight, linear_bias, target, precision, coefficients)


def _fake(
    target: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, coefficients: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B = input.shape[0]
    loss = input.new_empty(() if coefficients is None else (B,), dtype=wide(input).dtype)
    return loss, loss.new_empty((2, B)) if use_kernels(input) else input.new_empty(0)


def _backward(
    dloss: Tensor, lse: Tensor, need_input: bool, need_weight: bool, target: Tensor, input: Tensor,
    linear_weight: Tensor, linear_bias: Tensor | None, coefficients: Tensor | None, precision: str,
) -> Sequence[Tensor | None]:  # fmt: skip
    operands = input, linear_weight, linear_bias
    if use_kernels(input):
        backward = kernels("linear_cross_entropy").linear_cross_entropy_bwd
        return backward(dloss, lse, *operands, target, precision, need_input, need_weight, coefficients)
    # By the functions that autograd calls in _plain: compiled code computes the bits of eager code.
    logits = _logits(*operands)
    log_softmax = logits.log_softmax(1)
    r = dloss / len(target) if coefficients is None else dloss * coefficients[0]
    # g = r (softmax - onehot) + s softmax
    g = torch.zeros_like(logits).scatter_add_(1, target.long()[:, None], -r.expand(target.shape)[:, None])
    g = torch.ops.aten._log_softmax_backward_data(g, log_softmax, 1, logits.dtype)
    if coefficients is not None:
        g += (dloss * coefficients[1])[:, None] * log_softmax.exp()
    dinput = (g @ wide(linear_weight)).to(input.dtype) if need_input else None
    if not need_weight:
        return dinput, None, None
    return dinput, (g.t() @ wide(input)).to(linear_weight.dtype), g.sum(0).to(linear_weight.dtype)


register(
    "linear_cross_entropy", _public, operands=slice(0, 3),
    forward=_forward, fake=_fake, backward=_backward, plain=_plain,
)  # fmt: skip
