"""AdamW (Loshchilov and Hutter 2019) for all tensors of a model in one launch.

    p <- p (1 - lr weight_decay);   m <- m + (1 - beta1)(g - m);   v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

p, g, m, v have one shape and layout each, and one dtype; arithmetic is fp32. The learning rate and the step are read on
the device, so a captured graph goes through a schedule. Two versions:

1. naive: a launch updates one tensor.
2. a launch updates all tensors. It removes all launches but one. The tensors come as tuples of arguments: a table of
   their pointers would have to be copied to the device before each launch. A program selects the pointers of its tensor
   by its number, so the kernel's code does not grow with the number of tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import mul_rn, one_minus_power

BLOCK = 1024
# Tensors a launch: the arguments of a kernel have 4 KiB, a tensor takes four pointers and a length.
MAX_TENSORS = 64


@triton.jit
def adamw_update(
    p, g, m, v, decay, step_size, bias_correction2_sqrt, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr
):  # fmt: skip
    """New (p, m, v), fp32, with the operations of torch.optim.AdamW in its order, rounded where it rounds.

    decay = 1 - lr weight_decay, step_size = lr / (1 - beta1^step), bias_correction2_sqrt = sqrt(1 - beta2^step).

    p * decay is rounded by itself: decay is one ulp below 1, so rounding takes a whole ulp off p, and that is the
    weight decay. Fused into the subtraction it would be less (docs/numerics.md). The other two sums are fused as they
    are in torch.
    """
    # m = m + (1 - beta1)(g - m)
    m = m + (g - m) * (1.0 - BETA1)
    # v = beta2 v + (1 - beta2) g^2
    v = mul_rn(v, BETA2) + ((1.0 - BETA2) * g) * g
    # p = p decay - step_size m / (sqrt(v) / bias_correction2_sqrt + eps)
    denominator = tl.sqrt_rn(v) / bias_correction2_sqrt + EPS
    p = mul_rn(p, decay) - step_size * m / denominator
    return p, m, v


@triton.jit
def _update_block(
    p_ptr, g_ptr, m_ptr, v_ptr, block, numel, step_ptr, lr_ptr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, WEIGHT_DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates block number `block` of a tensor of numel numbers."""
    step = tl.load(step_ptr).to(tl.int32)
    lr = tl.load(lr_ptr).to(tl.float64)
    # The decay factor is 1 - 7e-8: rounded once, from fp64, as in torch.
    decay = (1.0 - lr * tl.full((), WEIGHT_DECAY, tl.float64)).to(tl.float32)
    step_size = lr.to(tl.float32) / one_minus_power(BETA1, step)
    bias_correction2_sqrt = tl.sqrt_rn(one_minus_power(BETA2, step))
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    p = tl.load(p_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    p, m, v = adamw_update(p, g, m, v, decay, step_size, bias_correction2_sqrt, BETA1, BETA2, EPS)
    tl.store(p_ptr + offsets, p, mask=mask)
    tl.store(m_ptr + offsets, m, mask=mask)
    tl.store(v_ptr + offsets, v, mask=mask)


# --- 1: naive ---------------------------------------------------------------------------------------------------------


@triton.jit
def adamw_1_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr, numel, step_ptr, lr_ptr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of one tensor."""
    _update_block(
        p_ptr, g_ptr, m_ptr, v_ptr, tl.program_id(0), numel, step_ptr, lr_ptr,
        BETA1, BETA2, EPS, WEIGHT_DECAY, BLOCK,
    )  # fmt: skip


# --- 2: all tensors ---------------------------------------------------------------------------------------------------


@triton.jit
def adamw_kernel(
    param_ptrs, grad_ptrs, exp_avg_ptrs, exp_avg_sq_ptrs, numels, step_ptr, lr_ptr, N: tl.constexpr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, WEIGHT_DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of one of N tensors; each program takes the block of its number, counted through all tensors.

    None of the arguments may be called `params`: Triton's launcher has a local variable of that name.
    """
    block = tl.program_id(0)
    p_ptr, g_ptr, m_ptr, v_ptr = param_ptrs[0], grad_ptrs[0], exp_avg_ptrs[0], exp_avg_sq_ptrs[0]
    numel = numels[0]
    start = 0
    first = block * 0
    # The last tensor whose first block is not past this one.
    for i in tl.static_range(1, N):
        start += tl.cdiv(numels[i - 1], BLOCK)
        reached = block >= start
        p_ptr = tl.where(reached, param_ptrs[i], p_ptr)
        g_ptr = tl.where(reached, grad_ptrs[i], g_ptr)
        m_ptr = tl.where(reached, exp_avg_ptrs[i], m_ptr)
        v_ptr = tl.where(reached, exp_avg_sq_ptrs[i], v_ptr)
        numel = tl.where(reached, numels[i], numel)
        first = tl.where(reached, start, first)
    _update_block(
        p_ptr, g_ptr, m_ptr, v_ptr, block - first, numel, step_ptr, lr_ptr, BETA1, BETA2, EPS, WEIGHT_DECAY, BLOCK
    )


def adamw_1(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], step: Tensor,
    lr: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """adamw() by the naive kernel, a launch for every tensor."""
    options = _options(beta1, beta2, eps, weight_decay)
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        adamw_1_kernel[(triton.cdiv(p.numel(), BLOCK),)](p, g, m, v, p.numel(), step, lr, **options)


def adamw(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], step: Tensor,
    lr: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Updates params, exp_avgs and exp_avg_sqs in place; one launch for every 64 tensors.

    The four tensors of an index share a dense layout; checked, like everything else, in mlp_fast.ops.
    """
    options = _options(beta1, beta2, eps, weight_decay)
    for i in range(0, len(params), MAX_TENSORS):
        p, g, m, v = (tuple(tensors[i : i + MAX_TENSORS]) for tensors in (params, grads, exp_avgs, exp_avg_sqs))
        numels = tuple(t.numel() for t in p)
        blocks = sum(triton.cdiv(numel, BLOCK) for numel in numels)
        adamw_kernel[(blocks,)](p, g, m, v, numels, step, lr, N=len(p), **options)


def _options(beta1: float, beta2: float, eps: float, weight_decay: float) -> dict[str, float]:
    return {
        "BETA1": beta1, "BETA2": beta2, "EPS": eps, "WEIGHT_DECAY": weight_decay, "BLOCK": BLOCK, "num_warps": 4
    }  # fmt: skip


def shipped():
    """The default model's five tensors, and as many as a launch takes; step and rate as loops keep them; see _aot."""
    from ._aot import recorded

    default, most = ((27, 48), (512, 144), (512,), (27, 512), (27,)), ((32, 32),) * MAX_TENSORS
    for shapes, scalars in (
        (default, (torch.float32, torch.float32)),
        (default, (torch.int64, torch.float64)),
        (most, (torch.float32, torch.float32)),
    ):
        p = [torch.empty(shape, device="meta") for shape in shapes]
        step, lr = (torch.empty((), dtype=dtype, device="meta") for dtype in scalars)
        with recorded() as launches:
            adamw(p, p, p, p, step, lr, 0.9, 0.999, 1e-8, 1e-4)
            if shapes is default:
                adamw_1(p, p, p, p, step, lr, 0.9, 0.999, 1e-8, 1e-4)
        yield from launches
