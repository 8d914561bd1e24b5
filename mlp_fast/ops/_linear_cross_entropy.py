"""The operator linear_cross_entropy."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

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
        label_smoothing: the share, in [0, 1], of each target that is spread evenly over all classes.
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
    options = weight, reduction, ignore_index, label_smoothing, precision
    return call("linear_cross_entropy", _public, input, linear_weight, linear_bias, target, *options)


class _Options(NamedTuple):
    """What the loss is beyond the mean cross-entropy; as linear_cross_entropy's arguments of these names."""

    weight: Tensor | None
    reduction: str
    ignore_index: int | None
    label_smoothing: float

    @property
    def are_default(self) -> bool:
        """Whether the kernels compute the loss and its gradients alone."""
        return self[0] is None and self[1:] == ("mean", None, 0)


def _check(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, options: _Options, precision: str
) -> None:
    weight = options.weight
    one_of("precision", precision, INPUT_PRECISION)
    one_of("reduction", options.reduction, REDUCTIONS)
    check_dtype("target", [target], INTEGERS)
    floats = "input, linear_weight and linear_bias"
    check_operands(floats, "input, linear_weight, linear_bias and target", target, input, linear_weight, linear_bias)
    if (
        (input.dim(), linear_weight.dim(), target.dim()) != (2, 2, 1)
        or linear_weight.shape[1] != input.shape[1]
        or (linear_bias is not None and linear_bias.shape != linear_weight.shape[:1])
        or target.shape[0] != input.shape[0]
        or 0 in linear_weight.shape
    ):
        raise ValueError(
            "shapes must be input (B, H), linear_weight (V, H), linear_bias (V,), target (B,), none but B zero, "
            f"not {shapes(input, linear_weight, linear_bias, target)}"
        )
    if weight is not None:
        check_dtype("weight", [weight], FLOATS)
        check_device("weight and linear_weight", [weight, linear_weight])
        if weight.shape != linear_weight.shape[:1]:
            raise ValueError(f"weight must be of the shape (V,) = {shapes(linear_weight[:, 0])}, not {shapes(weight)}")
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError("weight must not require a gradient: the loss has none with respect to it; detach it")
    if not 0 <= options.label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], not {options.label_smoothing}")


def _logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    return F.linear(wide(input), wide(linear_weight), None if linear_bias is None else wide(linear_bias))


def _plain(
    target: Tensor, options: _Options, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> Tensor:
    weight, reduction, ignore_index, label_smoothing = options
    logits = _logits(input, linear_weight, linear_bias)
    try:
        return F.cross_entropy(
            logits,
            target.long(),
            None if weight is None else weight.to(logits.dtype),
            reduction=reduction,
            ignore_index=_NO_TARGET if ignore_index is None else ignore_index,
            label_smoothing=label_smoothing,
        )
    except IndexError:
        _check_targets(target, linear_weight, ignore_index)
        raise


def _check_targets(target: Tensor, linear_weight: Tensor, ignore_index: int | None) -> None:
    counted = target if ignore_index is None or target.device.type != "cpu" else target[target.long() != ignore_index]
    check_in_range("targets", counted, linear_weight.shape[0])


def _public(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None = None,
    reduction: str = "mean", ignore_index: int | None = None, label_smoothing: float = 0.0, precision: str = "fp32",
) -> Tensor:  # fmt: skip
    options = _Options(weight, reduction, ignore_index, label_smoothing)
    _check(input, linear_weight, linear_bias, target, options, precision)
    if use_opaque(input, linear_weight, linear_bias):
        return torch.ops.mlp_fast.linear_cross_entropy_forward(
            input, linear_weight, linear_bias, target, *options, precision
        )[0]
    return _plain(target, options, input, linear_weight, linear_bias)


# ---------------------------------------------------------------------------------------------------------------
# The options in terms of one row b of the default's, with w the classes' weights, sigma = label_smoothing / V, and
# share = 0 where the row is ignored, else 1:
#
#   loss = share ((1 - label_smoothing) w[target] (lse - logits[target]) + sigma (sum(w) lse - w . logits))
#   dlogits = a softmax(logits) - r onehot(target) - d sigma w
#   r = d (1 - label_smoothing) w[target];   a = r + d sigma sum(w)
#   d = share dloss, or of a mean share dloss / sum(share w[target])
#
# where lse = logsumexp(logits), and w . logits = h . (w linear_weight) + w . linear_bias needs no logits.


class _Rows:
    """What the options make of each row.

    Attributes:
        target: classes (B,), int64, 0 where the row is ignored.
        counts: whether the row is not ignored, (B,), or None where all count.
        weight: share w[target], (B,).
        class_weight: w (V,).
        sigma, sharpness: label_smoothing / V and 1 - label_smoothing.
    """

    def __init__(self, target: Tensor, V: int, dtype: torch.dtype, options: _Options) -> None:
        weight, self.reduction, ignore_index, label_smoothing = options
        self.target = target.long()
        self.counts = None if ignore_index is None else self.target != ignore_index
        self.class_weight = torch.ones(V, dtype=dtype, device=target.device) if weight is None else weight.to(dtype)
        if self.counts is not None:
            self.target = torch.where(self.counts, self.target, 0)
        # Clamped, since the kernels answer for an invalid target, with NaN.
        self.weight = self.counting(self.class_weight[self.target.clamp(0, V - 1)])
        self.sigma, self.sharpness = label_smoothing / V, 1 - label_smoothing

    def counting(self, values: Tensor) -> Tensor:
        """The rows' values, 0 where a row is ignored."""
        return values if self.counts is None else torch.where(self.counts, values, 0)

    def coefficients(self, dloss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(a, r, d sigma), each (B,)."""
        d = self.counting(dloss / self.weight.sum() if self.reduction == "mean" else dloss).expand(self.target.shape)
        r = d * (self.sharpness * self.weight)
        return r + d * (self.sigma * self.class_weight.sum()), r, d * self.sigma


def _kernel_forward(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor, target: Tensor, options: _Options, precision: str
) -> tuple[Tensor, Tensor]:
    forward = kernels("linear_cross_entropy").linear_cross_entropy_fwd
    if options.are_default:
        return forward(input, linear_weight, linear_bias, target, precision)
    rows = _Rows(target, linear_weight.shape[0], torch.float32, options)
    nll, lse = forward(input, linear_weight, linear_bias, rows.target, precision, mean=False)
    loss = rows.sharpness * rows.weight * nll
    if options.label_smoothing > 0:
        w = rows.class_weight
        dot = input.float() @ (w @ linear_weight.float()) + w @ linear_bias.float()
        loss += rows.sigma * (w.sum() * lse.sum(0) - dot)
    loss = rows.counting(loss)
    if options.reduction == "none":
        return loss, lse
    return (loss.sum() / rows.weight.sum() if options.reduction == "mean" else loss.sum()), lse


def _kernel_backward(
    dloss: Tensor, lse: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor, target: Tensor,
    options: _Options, precision: str, need_input: bool, need_weight: bool,
) -> Sequence[Tensor | None]:  # fmt: skip
    backward = kernels("linear_cross_entropy").linear_cross_entropy_bwd
    needs = need_input, need_weight
    if options.are_default:
        return backward(dloss, lse, input, linear_weight, linear_bias, target, precision, *needs)
    rows = _Rows(target, linear_weight.shape[0], torch.float32, options)
    a, r, d_sigma = rows.coefficients(dloss)
    # The kernels round g to 16 bits where the operands have no more: so its largest is about 1, and comes in after.
    largest = torch.cat([a.abs(), a.new_full((1,), torch.finfo(a.dtype).tiny)]).amax()
    by_row = torch.stack([a, r]) / largest
    gradients = backward(largest, lse, input, linear_weight, linear_bias, rows.target, precision, *needs, by_row)
    if options.label_smoothing == 0:
        return gradients
    w = rows.class_weight
    smoothing = (
        torch.outer(d_sigma, w @ linear_weight.float()) if need_input else None,
        torch.outer(w, d_sigma @ input.float()) if need_weight else None,
        w * d_sigma.sum() if need_weight else None,
    )
    return [None if g is None else (g - s).to(g.dtype) for g, s in zip(gradients, smoothing, strict=True)]


def _plain_backward(
    dloss: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor,
    options: _Options, need_input: bool, need_weight: bool,
) -> Sequence[Tensor | None]:  # fmt: skip
    """By the functions that autograd calls in _plain: compiled code computes the bits of eager code."""
    logits = _logits(input, linear_weight, linear_bias)
    rows = _Rows(target, linear_weight.shape[0], logits.dtype, options)
    _, r, d_sigma = rows.coefficients(dloss)
    g = torch.outer(d_sigma, -rows.class_weight) if options.label_smoothing > 0 else torch.zeros_like(logits)
    g.scatter_add_(1, rows.target[:, None], -r[:, None])
    g = torch.ops.aten._log_softmax_backward_data(g, logits.log_softmax(1), 1, logits.dtype)
    dinput = (g @ wide(linear_weight)).to(input.dtype) if need_input else None
    if not need_weight:
        return dinput, None, None
    return dinput, (g.t() @ wide(input)).to(linear_weight.dtype), g.sum(0).to(linear_weight.dtype)


# ---------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("mlp_fast::linear_cross_entropy_forward", mutates_args=())
def _forward(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    reduction: str, ignore_index: int | None, label_smoothing: float, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss; and what the kernels need of every row, the maximum of its logits and lse less that, (2, B)."""
    options = _Options(weight, reduction, ignore_index, label_smoothing)
    if not use_kernels(input):
        return _plain(target, options, input, linear_weight, linear_bias), input.new_empty(0)
    check_capability(input, precision)
    _check_targets(target, linear_weight, ignore_index)
    with torch.cuda.device_of(input):
        bias = linear_weight.new_zeros(linear_weight.shape[0]) if linear_bias is None else linear_bias
        return _kernel_forward(input, linear_weight, bias, target, options, precision)


@_forward.register_fake
def _(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    reduction: str, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B = input.shape[0]
    loss = input.new_empty((B,) if reduction == "none" else (), dtype=wide(input).dtype)
    return loss, loss.new_empty((2, B)) if use_kernels(input) else input.new_empty(0)


@torch.library.custom_op("mlp_fast::linear_cross_entropy_backward", mutates_args=())
def _backward(
    dloss: Tensor, lse: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor,
    weight: Tensor | None, reduction: str, ignore_index: int | None, label_smoothing: float, precision: str,
    need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dinput, dlinear_weight, dlinear_bias), the last two together; what is not needed is empty."""
    options, needs = _Options(weight, reduction, ignore_index, label_smoothing), (need_input, need_weight)
    if use_kernels(input):
        with torch.cuda.device_of(input):
            bias = linear_weight.new_zeros(linear_weight.shape[0]) if linear_bias is None else linear_bias
            gradients = _kernel_backward(dloss, lse, input, linear_weight, bias, target, options, precision, *needs)
    else:
        gradients = _plain_backward(dloss, input, linear_weight, linear_bias, target, options, *needs)
    dinput, dweight, dbias = or_empty(gradients, linear_weight)
    return dinput, dweight, dbias


@_backward.register_fake
def _(dloss: Tensor, lse: Tensor, input: Tensor, linear_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_input, need_weight = rest
    needs = need_input, need_weight, need_weight
    dinput, dweight, dbias = fake_gradients((input, linear_weight, linear_weight[:, 0]), needs, linear_weight)
    return dinput, dweight, dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, linear_weight, linear_bias, target, weight, *ctx.options, ctx.precision = inputs
    ctx.save_for_backward(output[1], input, linear_weight, linear_bias, target, weight)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, dloss: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 9
    lse, input, linear_weight, linear_bias, target, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    operands = input, linear_weight, linear_bias
    if differentiated_again(dloss):
        gradients = plain_gradients(partial(_plain, target, _Options(weight, *ctx.options)), operands, needs, dloss)
    else:
        needed = needs[0], needs[1] or needs[2]
        found = torch.ops.mlp_fast.linear_cross_entropy_backward(
            dloss, lse, *operands, target, weight, *ctx.options, ctx.precision, *needed
        )
        gradients = or_none(found, needs)
    return *gradients, None, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup)
register("linear_cross_entropy", _public, operands=slice(0, 3))
