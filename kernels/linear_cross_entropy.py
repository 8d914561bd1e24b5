"""Linear layer and mean cross-entropy as one operation; logits never leave the chip.

    logits = h weight^T + bias;   loss = mean over b of logsumexp(logits[b]) - logits[b, targets[b]]
    g = softmax(logits) - onehot(targets);   s = dloss / B
    dh = s g weight;   dweight = s g^T h;   dbias = s sum_b g[b]

h (B, H), weight (V, H) of any strides, bias (V), targets (B) integer, all sums fp32. Forward, three versions:

1. naive: a program computes all logits of one row, one multiply-add a load. Every program reads all of weight.
2. tiles: a program computes logits of 32 rows, 16 where these would make too few programs, 32 tokens at a time, as
   matrix products, so a number loaded serves as many rows or tokens. An online softmax (Milakov and Gimelshein 2018)
   goes from one block of tokens to the next.
3. parts: where there are too few blocks of rows for a device, V is cut into parts, a program each, and a second kernel
   puts their sums together. The operator takes 2 or 3.

They keep two numbers of a row for the backward pass: the maximum, and the logarithm of the sum of exponentials above
it; apart, because their sum would round away digits of large logits. Backward computes each tile of logits again and
multiplies it at once: one kernel goes through V for dh, another through rows for dweight. No two programs add to the
same numbers: no atomics, the same bits on every run. A target outside [0, V) makes the loss and the gradients NaN.

In place of the mean the losses of all rows may be asked for, weighted by two coefficients of each row, r and s:

    loss[b] = r[b] nll[b] + s[b] lse[b];   lse = logsumexp(logits[b]), nll = lse - logits[b, targets[b]]
    g[b] = dloss[b] (a[b] softmax(logits[b]) - r[b] onehot(targets[b])),   a = r + s

No time has been measured on a GPU yet.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import dot, load_transposed
from ._runtime import INPUT_PRECISION
from ._sum import MIN_PROGRAMS, parts_of, sum_parts
from ._tile import load_tile, product_options, span, wide_tile

# Tiles of logits: tokens, and hidden units a step; and the hidden units of a gradient tile. More would spill.
BLOCK_V, BLOCK_K, BLOCK_H = 32, 32, 32
FEW_ROWS, MANY_ROWS = 16, 32  # of a tile of logits; 64 would be faster, but Triton does not compile them for sm_100
COMBINE_ROWS = 128


# --- 1: naive, forward ------------------------------------------------------------------------------------------------


@triton.jit
def linear_cross_entropy_1_kernel(
    h_ptr, weight_ptr, bias_ptr, targets_ptr, loss_ptr, V, H,
    stride_wv, stride_wh, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The loss of one row."""
    b = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_V)
    in_v = v < V
    # logits = h[b] weight^T + bias
    logits = tl.load(bias_ptr + v, mask=in_v, other=float("-inf"))
    for i in range(H):
        ptrs = weight_ptr + v * stride_wv + i * stride_wh
        weight = tl.load(ptrs, mask=in_v, other=0.0)
        logits += weight * tl.load(h_ptr + b * H + i)
    # loss = logsumexp(logits) - logits[target], of logits - max
    logits -= tl.max(logits, axis=0)
    log_sum = tl.log(tl.sum(tl.exp(logits), axis=0))
    target = tl.load(targets_ptr + b).to(tl.int64)
    target_logit = tl.sum(tl.where(v == target, logits, 0.0), axis=0)
    tl.store(loss_ptr + b, log_sum - target_logit)


# --- 2 and 3: tiles, and parts of V -----------------------------------------------------------------------------------


@triton.jit
def _logits_tile(
    layer, rows, in_rows, v0, INPUT_PRECISION: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Logits of rows x (v0, v0 + 1, ...), fp32; -inf in columns past V."""
    h_ptr, weight_ptr, bias_ptr, V, H, stride_wv, stride_wh = layer
    acc = tl.zeros((rows.shape[0], BLOCK_V), tl.float32)
    for h0 in range(0, H, BLOCK_K):
        i, in_h = span(h0, H, BLOCK_K)
        # logits += h[rows, i] weight[cols, i]^T
        h = load_tile(h_ptr, wide_tile(rows, i, in_rows, in_h, H, 1))
        weight = load_transposed(weight_ptr, v0, i, in_h, V, stride_wv, stride_wh, INPUT_PRECISION, BLOCK_V)
        acc = dot(h, weight, acc, INPUT_PRECISION)
    cols, in_cols = span(v0, V, BLOCK_V)
    bias = tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
    return tl.where(in_cols[None, :], acc + bias[None, :], float("-inf"))


@triton.jit
def _g_tile(
    layer, targets_ptr, lse_ptr, rows, in_rows, v0, B,
    BY_ROW: tl.constexpr, INPUT_PRECISION: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """g of rows x (v0, v0 + 1, ...), fp32; 0 outside the matrix, NaN in rows whose target is invalid.

    a = r = 1, or BY_ROW after the two numbers of each row in lse: lse is (2, B), or (4, B).
    """
    logits = _logits_tile(layer, rows, in_rows, v0, INPUT_PRECISION, BLOCK_V, BLOCK_K)
    V = layer[3]
    cols, in_cols = span(v0, V, BLOCK_V)
    highest = tl.load(lse_ptr + rows, mask=in_rows, other=0.0)
    log_sum = tl.load(lse_ptr + B + rows, mask=in_rows, other=0.0)
    targets = tl.load(targets_ptr + rows, mask=in_rows, other=0).to(tl.int64)
    # p = softmax(logits) = exp(logits - max - ln sum)
    # Rows past the end have no maximum of their own to subtract: zero their logits lest exp overflow.
    p = tl.exp(tl.where(in_rows[:, None], logits - highest[:, None], float("-inf")) - log_sum[:, None])
    one_hot = tl.where(cols[None, :] == targets[:, None], 1.0, 0.0)
    if BY_ROW:
        p *= tl.load(lse_ptr + 2 * B + rows, mask=in_rows, other=0.0)[:, None]
        one_hot *= tl.load(lse_ptr + 3 * B + rows, mask=in_rows, other=0.0)[:, None]
    # g = a p - r one_hot
    g = p - one_hot
    g = tl.where(((targets >= 0) & (targets < V))[:, None], g, float("nan"))
    return tl.where(in_rows[:, None] & in_cols[None, :], g, 0.0)


@triton.jit
def _base(highest):
    """What to subtract before exponentials: the maximum, but 0 while all logits were -inf, for inf - inf is NaN."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def _store_loss(lse_ptr, loss_ptr, targets_ptr, rows, in_rows, highest, total, target_logit, B, V):
    """What the backward pass needs of a row, and the row's loss."""
    targets = tl.load(targets_ptr + rows, mask=in_rows, other=0).to(tl.int64)
    valid = (targets >= 0) & (targets < V)
    # loss = max + ln sum - logits[target]
    log_sum = tl.log(total)
    tl.store(lse_ptr + rows, highest, mask=in_rows)
    tl.store(lse_ptr + B + rows, log_sum, mask=in_rows)
    tl.store(loss_ptr + rows, tl.where(valid, (highest - target_logit) + log_sum, float("nan")), mask=in_rows)


@triton.jit
def linear_cross_entropy_fwd_kernel(
    h_ptr, weight_ptr, bias_ptr, targets_ptr, lse_ptr, loss_ptr, parts_ptr, B, V, H, stride_wv, stride_wh,
    blocks_per_part, SINGLE_PART: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """2: row losses (BLOCK_B); 3: of one part of V, each row's maximum, sum of exponentials and target logit."""
    layer = (h_ptr, weight_ptr, bias_ptr, V, H, stride_wv, stride_wh)
    part = tl.program_id(1)
    rows, in_rows = span(tl.program_id(0) * BLOCK_B, B, BLOCK_B)
    targets = tl.load(targets_ptr + rows, mask=in_rows, other=0).to(tl.int64)
    highest = tl.full((BLOCK_B,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_B,), tl.float32)
    target_logit = tl.zeros((BLOCK_B,), tl.float32)
    begin = part * blocks_per_part
    for block in range(begin, tl.minimum(begin + blocks_per_part, tl.cdiv(V, BLOCK_V))):
        v0 = block * BLOCK_V
        cols = v0 + tl.arange(0, BLOCK_V)
        logits = _logits_tile(layer, rows, in_rows, v0, INPUT_PRECISION, BLOCK_V, BLOCK_K)
        # total = sum of exp(logits - highest) so far: what was summed under a lower maximum is scaled down
        new_highest = tl.maximum(highest, tl.max(logits, axis=1))
        base = _base(new_highest)
        total = total * tl.exp(highest - base) + tl.sum(tl.exp(logits - base[:, None]), axis=1)
        highest = new_highest
        # target_logit = logits[target], which is in one of the blocks
        target_logit += tl.sum(tl.where(cols[None, :] == targets[:, None], logits, 0.0), axis=1)
    if SINGLE_PART:
        _store_loss(lse_ptr, loss_ptr, targets_ptr, rows, in_rows, highest, total, target_logit, B, V)
    else:
        parts_ptr += part.to(tl.int64) * 3 * B
        tl.store(parts_ptr + rows, highest, mask=in_rows)
        tl.store(parts_ptr + B + rows, total, mask=in_rows)
        tl.store(parts_ptr + 2 * B + rows, target_logit, mask=in_rows)


@triton.jit
def combine_parts_kernel(parts_ptr, targets_ptr, lse_ptr, loss_ptr, B, V, num_parts, BLOCK: tl.constexpr):
    """3: row losses from the parts of V, in their order."""
    rows, in_rows = span(tl.program_id(0) * BLOCK, B, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    target_logit = tl.zeros((BLOCK,), tl.float32)
    for _ in range(num_parts):
        part_highest = tl.load(parts_ptr + rows, mask=in_rows, other=0.0)
        part_total = tl.load(parts_ptr + B + rows, mask=in_rows, other=1.0)
        target_logit += tl.load(parts_ptr + 2 * B + rows, mask=in_rows, other=0.0)
        # total = sum over parts of part_total exp(part_highest - highest)
        new_highest = tl.maximum(highest, part_highest)
        base = _base(new_highest)
        total = total * tl.exp(highest - base) + part_total * tl.exp(part_highest - base)
        highest = new_highest
        parts_ptr += 3 * B
    _store_loss(lse_ptr, loss_ptr, targets_ptr, rows, in_rows, highest, total, target_logit, B, V)


@triton.jit
def linear_cross_entropy_dh_kernel(
    h_ptr, weight_ptr, bias_ptr, targets_ptr, lse_ptr, dloss_ptr, dh_ptr, B, V, H, stride_wv, stride_wh,
    blocks_per_part, BY_ROW: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dh (BLOCK_B samples, one part of the hidden units), fp32, summed over blocks of V in their order."""
    layer = (h_ptr, weight_ptr, bias_ptr, V, H, stride_wv, stride_wh)
    rows, in_rows = span(tl.program_id(0) * BLOCK_B, B, BLOCK_B)
    # s = dloss / B
    scale = tl.load(dloss_ptr).to(tl.float32) / (1 if BY_ROW else B)
    begin = tl.program_id(1) * blocks_per_part
    end = tl.minimum(begin + blocks_per_part, tl.cdiv(H, BLOCK_H))
    for v0 in range(0, V, BLOCK_V):
        cols, in_cols = span(v0, V, BLOCK_V)
        g = _g_tile(layer, targets_ptr, lse_ptr, rows, in_rows, v0, B, BY_ROW, INPUT_PRECISION, BLOCK_V, BLOCK_K)
        for block in range(begin, end):
            i, in_h = span(block * BLOCK_H, H, BLOCK_H)
            # dh += s g weight
            weight = load_tile(weight_ptr, wide_tile(cols, i, in_cols, in_h, stride_wv, stride_wh))
            dh_ptrs = dh_ptr + rows[:, None].to(tl.int64) * H + i[None, :]
            mask = in_rows[:, None] & in_h[None, :]
            so_far = tl.load(dh_ptrs, mask=mask & (v0 > 0), other=0.0)
            product = dot(g.to(weight.dtype), weight, tl.zeros((BLOCK_B, BLOCK_H), tl.float32), INPUT_PRECISION)
            tl.store(dh_ptrs, so_far + scale * product, mask=mask)
        # The next block of V reads these tiles back, perhaps by other threads of this program.
        tl.debug_barrier()


@triton.jit
def linear_cross_entropy_dweight_kernel(
    h_ptr, weight_ptr, bias_ptr, targets_ptr, lse_ptr, dloss_ptr, parts_ptr, bias_parts_ptr, B, V, H,
    stride_wv, stride_wh, rows_per_part, blocks_per_part, BY_ROW: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One part of dweight (BLOCK_V tokens, one part of the hidden units) and dbias, fp32, over its samples in order."""
    layer = (h_ptr, weight_ptr, bias_ptr, V, H, stride_wv, stride_wh)
    part = tl.program_id(2).to(tl.int64)
    v0 = tl.program_id(0) * BLOCK_V
    cols, in_cols = span(v0, V, BLOCK_V)
    # s = dloss / B
    scale = tl.load(dloss_ptr).to(tl.float32) / (1 if BY_ROW else B)
    begin = tl.program_id(1) * blocks_per_part
    end = tl.minimum(begin + blocks_per_part, tl.cdiv(H, BLOCK_H))
    first = part * rows_per_part
    last = tl.minimum(first + rows_per_part, B)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for b0 in range(first, last, BLOCK_B):
        rows, in_rows = span(b0, last, BLOCK_B)
        g = _g_tile(layer, targets_ptr, lse_ptr, rows, in_rows, v0, B, BY_ROW, INPUT_PRECISION, BLOCK_V, BLOCK_K)
        # dbias += s g
        total += tl.sum(g, axis=0)
        for block in range(begin, end):
            i, in_h = span(block * BLOCK_H, H, BLOCK_H)
            # dweight += s g^T h
            h = load_tile(h_ptr, wide_tile(rows, i, in_rows, in_h, H, 1))
            part_ptrs = parts_ptr + (part * V + cols[:, None]) * H + i[None, :]
            mask = in_cols[:, None] & in_h[None, :]
            so_far = tl.load(part_ptrs, mask=mask & (b0 > first), other=0.0)
            product = dot(tl.trans(g).to(h.dtype), h, tl.zeros((BLOCK_V, BLOCK_H), tl.float32), INPUT_PRECISION)
            tl.store(part_ptrs, so_far + scale * product, mask=mask)
        # The next block of samples reads these tiles back, perhaps by other threads of this program.
        tl.debug_barrier()
    tl.store(bias_parts_ptr + part * V + cols, scale * total, mask=in_cols & (tl.program_id(1) == 0))


# --- launchers --------------------------------------------------------------------------------------------------------


def linear_cross_entropy_1(h: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """The mean loss, a scalar, by the naive kernel. Arguments as in the module's docstring, fp32, valid targets."""
    (B, H), V = h.shape, weight.shape[0]
    loss = torch.empty((B,), dtype=torch.float32, device=h.device)
    linear_cross_entropy_1_kernel[(B,)](
        h.contiguous(), weight, bias.contiguous(), targets.contiguous(), loss, V, H, *weight.stride(),
        BLOCK_V=triton.next_power_of_2(V), num_warps=1,
    )  # fmt: skip
    return loss.mean()


def _tiles(B: int, V: int, precision: str) -> tuple[int, dict[str, Any]]:
    """The rows of a tile of logits; and the options of the launch."""
    # Many rows, since a number of weight that is loaded serves all of them, unless a device would idle.
    enough = triton.cdiv(B, MANY_ROWS) * triton.cdiv(V, BLOCK_V) >= MIN_PROGRAMS
    block_b = MANY_ROWS if enough else FEW_ROWS
    # One stage: the software pipeline would load a gradient tile before the previous round has stored it.
    return block_b, product_options(precision, num_stages=1, BLOCK_B=block_b, BLOCK_V=BLOCK_V, BLOCK_K=BLOCK_K)


def _cut(blocks: int, programs: int) -> tuple[int, int]:
    """How many parts to cut so many blocks into, given that many programs a part, and the blocks of each."""
    parts = max(1, min(blocks, triton.cdiv(MIN_PROGRAMS, max(programs, 1))))
    blocks_per_part = triton.cdiv(blocks, parts)
    return triton.cdiv(blocks, blocks_per_part), blocks_per_part


def linear_cross_entropy_fwd(
    h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, precision: str, coefficients: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(loss, the mean or with coefficients (B,); lse (2, B) for the backward pass), both fp32.

    coefficients: r and s of each row, (2, B) fp32. Arguments already checked: see mlp_fast.ops.
    """
    (B, H), V = h.shape, weight.shape[0]
    h, targets = h.contiguous(), targets.contiguous()
    bias = weight.new_zeros(V) if bias is None else bias.contiguous()
    lse = torch.empty((2, B), dtype=torch.float32, device=h.device)
    nll = torch.empty((B,), dtype=torch.float32, device=h.device)
    block_b, options = _tiles(B, V, precision)
    row_blocks = triton.cdiv(B, block_b)
    num_parts, blocks_per_part = _cut(triton.cdiv(V, BLOCK_V), row_blocks)
    parts = lse if num_parts == 1 else torch.empty((num_parts, 3, B), dtype=torch.float32, device=h.device)
    linear_cross_entropy_fwd_kernel[(row_blocks, num_parts)](
        h, weight, bias, targets, lse, nll, parts, B, V, H, *weight.stride(), blocks_per_part,
        SINGLE_PART=num_parts == 1, **options,
    )  # fmt: skip
    if num_parts > 1:
        combine_parts_kernel[(triton.cdiv(B, COMBINE_ROWS),)](
            parts, targets, lse, nll, B, V, num_parts, BLOCK=COMBINE_ROWS, num_warps=4
        )
    if coefficients is None:
        return nll.mean(), lse
    # loss[b] = r[b] nll[b] + s[b] lse[b]
    r, s = coefficients
    return r * nll + s * lse.sum(0), lse


def linear_cross_entropy_bwd(
    dloss: Tensor, lse: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, precision: str,
    need_h: bool, need_weight: bool, coefficients: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dh, dweight, dbias), each of its input's dtype, or None where it is not needed; the last two go together.

    Arguments as in the forward pass, which has returned lse; dloss is of the mean, or with coefficients (B,).
    """
    (B, H), V = h.shape, weight.shape[0]
    h, targets = h.contiguous(), targets.contiguous()
    bias = weight.new_zeros(V) if bias is None else bias.contiguous()
    if B == 0:
        return h.new_zeros(h.shape), weight.new_zeros(weight.shape), bias.new_zeros(V)
    by_row = coefficients is not None
    if by_row:
        # g[b] = dloss[b] ((r[b] + s[b]) softmax(logits[b]) - r[b] onehot(targets[b]))
        r, s = dloss * coefficients
        # g is rounded to 16 bits where the operands have no more: so its largest is about 1, and comes in after.
        dloss = torch.cat([(r + s).abs(), r.new_full((1,), torch.finfo(r.dtype).tiny)]).amax()
        lse = torch.cat([lse, torch.stack([r + s, r]) / dloss])
    block_b, options = _tiles(B, V, precision)
    options |= {"BY_ROW": by_row, "BLOCK_H": BLOCK_H}
    row_blocks, blocks_v, blocks_h = triton.cdiv(B, block_b), triton.cdiv(V, BLOCK_V), triton.cdiv(H, BLOCK_H)
    dh = dweight = dbias = None
    if need_h:
        # dh = s g weight, fp32 although h may be 16 bits: it is added to once for every block of V.
        dh = torch.empty((B, H), dtype=torch.float32, device=h.device)
        num_parts, blocks_per_part = _cut(blocks_h, row_blocks)
        linear_cross_entropy_dh_kernel[(row_blocks, num_parts)](
            h, weight, bias, targets, lse, dloss, dh, B, V, H, *weight.stride(), blocks_per_part, **options
        )  # fmt: skip
        dh = dh.to(h.dtype)
    if need_weight:
        # dweight = s g^T h;   dbias = s sum_b g[b]
        # Few rows a part: to compute their logits again takes longer than to add up more parts.
        parts, rows_per_part = parts_of(B, V * H, block_b, part_rows=block_b)
        partial = torch.empty((parts, V, H), dtype=torch.float32, device=h.device)
        bias_partial = torch.empty((parts, V), dtype=torch.float32, device=h.device)
        num_parts, blocks_per_part = _cut(blocks_h, blocks_v * parts)
        linear_cross_entropy_dweight_kernel[(blocks_v, num_parts, parts)](
            h, weight, bias, targets, lse, dloss, partial, bias_partial, B, V, H, *weight.stride(),
            rows_per_part, blocks_per_part, **options,
        )  # fmt: skip
        dweight, dbias = sum_parts(partial, weight.dtype), sum_parts(bias_partial, weight.dtype)
    return dh, dweight, dbias


def shipped():
    """Every precision; the default batch, sizes as in embed_linear_tanh, and a large V, cut into parts; see _aot."""
    from ._aot import DTYPES, recorded

    usual = ((128, 27, 512), (65536, 27, 512), (65537, 27, 65))
    cases = [*itertools.product(DTYPES, usual), ("fp32", (1024, 100_000, 512))]
    for name, (B, V, H) in cases:
        stride = 1 if H % 16 == 0 else 2
        precision = name if name in INPUT_PRECISION else "fp32"
        h, bias = (torch.empty(shape, dtype=DTYPES[name], device="meta") for shape in ((B, H), (V,)))
        weight = torch.empty((V, stride * H), dtype=DTYPES[name], device="meta")[:, ::stride]
        targets = torch.empty((B,), dtype=torch.int64 if stride == 1 else torch.uint8, device="meta")
        dloss = torch.empty((), dtype=torch.float32, device="meta")
        with recorded(name) as launches:
            _, lse = linear_cross_entropy_fwd(h, weight, bias, targets, precision)
            linear_cross_entropy_bwd(dloss, lse, h, weight, bias, targets, precision, True, True)
            if name == "fp32" and V == 27:
                linear_cross_entropy_1(h, weight, bias, targets)
        yield from launches
