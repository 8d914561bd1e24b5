"""The operator adamw_."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mlp_fast.ops._checks import FLOATS, check_device, check_dtype, shapes
from mlp_fast.ops._dispatch import kernels, transformed, use_kernels


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> None:
    """One step of torch.optim.AdamW, in place, all tensors in one launch (one for every 64).

    Args:
        params, exp_avgs, exp_avg_sqs: updated; all tensors of one dtype (float32, bfloat16, float16, float64) and
            device. The tensors of an index have one shape; on CUDA params and moments also one dense layout.
        grads: of the same shapes and dtype, any strides.
        step: the number of this update, counted from 1; one number, float32, int32 or int64, on the device.
        lr: the learning rate; one number, float32 or float64, on the device. Neither is read by the host on CUDA, so
            a captured graph follows both.
        betas, eps, weight_decay: as in torch.optim.AdamW.

    Raises:
        TypeError, ValueError: a dtype, shape, device or layout is not as above, a gradient is None, or a number is
            out of its range; of step and lr only on the CPU, where reading them costs no synchronisation.
        RuntimeError: inside a transform of torch.func or under forward-mode AD. An update in place has no derivative.

    Example::

        step.add_(1)
        adamw_(params, [p.grad for p in params], exp_avgs, exp_avg_sqs, step, lr)
    """
    for i, grad in enumerate(grads):
        if grad is None:
            raise ValueError(f"grads[{i}] is None: backward() has not reached params[{i}]; leave this parameter out")
    if transformed([*params, *grads, *exp_avgs, *exp_avg_sqs, step, lr]):
        raise RuntimeError(
            "adamw_ updates in place and has no derivative: call it outside of torch.func and of forward-mode AD"
        )
    with torch.no_grad():
        torch.ops.mlp_fast.adamw_(
            list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), step, lr, *betas, eps, weight_decay
        )


def _check(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], step: Tensor,
    lr: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    names = "params, grads, exp_avgs and exp_avg_sqs"
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs):
        lengths = f"{len(params)}, {len(grads)}, {len(exp_avgs)}, {len(exp_avg_sqs)}"
        raise ValueError(f"{names} must have one length, not {lengths}")
    check_dtype(names, [*params, *grads, *exp_avgs, *exp_avg_sqs], FLOATS)
    check_device(f"{names}, step and lr", [*params, *grads, *exp_avgs, *exp_avg_sqs, step, lr])
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        if not p.shape == g.shape == m.shape == v.shape:
            raise ValueError(f"{names}: the shapes at index {i} differ: {shapes(p, g, m, v)}")
    if step.numel() != 1 or lr.numel() != 1:
        raise ValueError(f"step and lr must hold one number each, not {step.numel()} and {lr.numel()}")
    check_dtype("step", [step], (torch.float32, torch.int32, torch.int64))
    check_dtype("lr", [lr], (torch.float32, torch.float64))
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas must be in [0, 1), not {beta1} and {beta2}")
    if not (eps >= 0 and weight_decay >= 0):
        raise ValueError(f"eps and weight_decay must not be negative: {eps} and {weight_decay}")


@torch.library.custom_op("mlp_fast::adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs"))
def _adamw_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], step: Tensor,
    lr: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    _check(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps, weight_decay)
    if step.device.type == "cpu" and not (step.item() >= 1 and lr.item() >= 0):
        raise ValueError(f"step counts from 1 and lr must not be negative: {step.item():g} and {lr.item():g}")
    if params and use_kernels(params[0]):
        for i, (p, m, v) in enumerate(zip(params, exp_avgs, exp_avg_sqs, strict=True)):
            if not (_is_dense(p) and _layout(p) == _layout(m) == _layout(v)):
                raise ValueError(
                    f"params, exp_avgs and exp_avg_sqs must have one dense layout each, but the strides at index {i} "
                    f"are {p.stride()}, {m.stride()}, {v.stride()}"
                )
        grads = [
            g if _layout(g) == _layout(p) else torch.empty_like(p).copy_(g) for p, g in zip(params, grads, strict=True)
        ]
        with torch.cuda.device_of(params[0]):
            kernels("adamw").adamw(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps, weight_decay)
        return
    update, rate = step.item(), lr.item()
    step_size, sqrt_bias2 = rate / (1 - beta1**update), math.sqrt(1 - beta2**update)
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.mul_(1 - rate * weight_decay).addcdiv_(m, v.sqrt().div_(sqrt_bias2).add_(eps), value=-step_size)


_adamw_.register_fake(_check)


def _is_dense(t: Tensor) -> bool:
    """Whether the tensor's numbers fill a stretch of memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(_layout(t)):
        if stride != expected:
            return False
        expected *= size
    return True


def _layout(t: Tensor) -> list[tuple[int, int]]:
    """The strides and sizes that say where a tensor's numbers lie: a dimension of one may have any stride."""
    return [pair for pair in zip(t.stride(), t.shape, strict=True) if pair[1] > 1] if t.numel() else []
