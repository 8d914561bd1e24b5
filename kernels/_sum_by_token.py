"""Sums of rows by token, in a fixed order: the backward pass of an embedding lookup.

    dP[t, v] = sum of dpre[b] over the b with idx[b, t] = v
    dwte[v] = sum of demb[b, t] over the (b, t) with idx[b, t] = v

Two ways: a product with a one-hot matrix, for a small vocabulary; or a stable sort, which brings the rows of a sum
together, as a segment. Either sum is cut into parts, which are then added in their order (_sum.py).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import dot, load_dpre
from ._sum import MAX_PART_NUMBERS, MAX_PARTS, parts_of, sum_parts
from ._tile import load_tile, span, store_tile, wide_tile

# Up to this vocabulary dP is a product with a one-hot matrix; beyond it sorting is cheaper.
ONE_HOT_V = 64
# Columns of its tile, which also holds the tokens: it spills at 64.
ONE_HOT_N = 32
SEGMENT_ROWS, SEGMENT_COLUMNS = 8, 256  # of a tile
# One token may have nearly all rows, so a segment is summed in parts: one for this many rows of all segments together.
SEGMENT_PART = 4096


@triton.jit
def dtable_one_hot_kernel(
    idx_ptr, h_ptr, dh_ptr, parts_ptr, B, V, H, stride_db, stride_dh, rows_per_part,
    T: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One part of a dP tile (BLOCK_M rows r = t V + v, BLOCK_N hidden units), summed over its samples.

    dP = one_hot^T dpre, where one_hot[b, r] = 1 if idx[b, t] = v.
    """
    part = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # int32, of which a division is short
    in_r = r < T * V
    t, v = r // V, r % V
    cols, in_cols = span(tl.program_id(1) * BLOCK_N, H, BLOCK_N)
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, B)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for b0 in range(begin, end, BLOCK_K):
        b, in_b = span(b0, end, BLOCK_K)
        # one_hot^T: 1 where idx[b, t] = v
        mask = in_r[:, None] & in_b[None, :]
        tokens = tl.load(idx_ptr + b[None, :] * T + t[:, None], mask=mask, other=0).to(tl.int64)
        one_hot = tl.where(mask & (tokens == v[:, None]), 1.0, 0.0)
        # dP[r] += one_hot[:, r]^T dpre
        mask = in_b[:, None] & in_cols[None, :]
        dpre = load_dpre(dh_ptr, h_ptr, b[:, None], cols[None, :], mask, H, stride_db, stride_dh)
        operand = h_ptr.dtype.element_ty
        acc = dot(one_hot.to(operand), dpre.to(operand), acc, INPUT_PRECISION)
    store_tile(parts_ptr, wide_tile(part * (T * V) + r, cols, in_r, in_cols, H), acc)


@triton.jit(do_not_specialize=["num_parts"])  # for sm_100 the code of one part alone spills
def segment_sum_kernel(
    order_ptr, starts_ptr, x_ptr, h_ptr, parts_ptr, R, D, stride_xr, stride_xd, num_parts,
    T: tl.constexpr, OF_DPRE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One part of the sum of segment r = program_id(0), BLOCK_D columns; the sums are (R, D).

    out[r] = sum of x[order[i]] over starts[r] <= i < starts[r + 1].
    With OF_DPRE, order holds occurrences b T + t and the rows are dpre[b], made of x = dh and h.
    """
    r = tl.program_id(0).to(tl.int64)
    cols, in_cols = span(tl.program_id(1) * BLOCK_D, D, BLOCK_D)
    part = tl.program_id(2)
    first, last = tl.load(starts_ptr + r), tl.load(starts_ptr + r + 1)
    length = tl.cdiv(last - first, num_parts)
    begin = first + part * length
    end = tl.minimum(begin + length, last)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for i0 in range(begin, end, BLOCK_ROWS):
        i, in_i = span(i0, end, BLOCK_ROWS)
        row = tl.load(order_ptr + i, mask=in_i, other=0)
        # out[r] += the rows x[order[i]], or dpre[order[i] / T]
        if OF_DPRE:
            mask = in_i[:, None] & in_cols[None, :]
            x = load_dpre(x_ptr, h_ptr, (row // T)[:, None], cols[None, :], mask, D, stride_xr, stride_xd)
        else:
            x = load_tile(x_ptr, wide_tile(row, cols, in_i, in_cols, stride_xr, stride_xd))
        acc += tl.sum(x, axis=0)
    tl.store(parts_ptr + (part.to(tl.int64) * R + r) * D + cols, acc, mask=in_cols)


def dtable_sums(dh: Tensor, h: Tensor, idx: Tensor, V: int, options: dict[str, Any]) -> Tensor:
    """dP (T*V, H) fp32 of dpre = dh (1 - h^2), for idx (B, T). options: of a product's launch."""
    (B, T), H = idx.shape, h.shape[1]
    if V > ONE_HOT_V:
        keys = valid_tokens(idx, V) + torch.arange(T, device=idx.device) * V
        return segment_sums(keys, dh, h, T * V, T)
    parts, rows_per_part = parts_of(B, T * V * H, options["BLOCK_K"])
    partial = torch.empty((parts, T * V, H), dtype=torch.float32, device=h.device)
    dtable_one_hot_kernel[(triton.cdiv(T * V, options["BLOCK_M"]), triton.cdiv(H, ONE_HOT_N), parts)](
        idx, h, dh, partial, B, V, H, *dh.stride(), rows_per_part, T=T, **(options | {"BLOCK_N": ONE_HOT_N})
    )
    return sum_parts(partial)


def valid_tokens(idx: Tensor, V: int) -> Tensor:
    """Tokens as int64, 0 where invalid, as in the forward pass: the NaN of such a row must end up in some sum."""
    tokens = idx.long()  # before the comparison, in which a V of 256 would wrap around to an uint8 0
    return torch.where((tokens >= 0) & (tokens < V), tokens, 0)


def segment_sums(keys: Tensor, x: Tensor, h: Tensor | None, R: int, T: int) -> Tensor:
    """out[r] = sum over the occurrences b T + t with keys[b, t] = r of x's row, or of dpre's row b where h is given.

    keys are in [0, R). Sorting (stable, so in a fixed order) brings the rows of one sum together. Returns (R, D) fp32.
    """
    keys, order = keys.flatten().sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(R + 1, device=keys.device))
    D = x.shape[1]
    parts = max(1, min(keys.numel() // SEGMENT_PART, MAX_PARTS, MAX_PART_NUMBERS // (R * D)))
    partial = torch.empty((parts, R, D), dtype=torch.float32, device=x.device)
    segment_sum_kernel[(R, triton.cdiv(D, SEGMENT_COLUMNS), parts)](
        order, starts, x, x if h is None else h, partial, R, D, *x.stride(), parts,
        T=T, OF_DPRE=h is not None, BLOCK_ROWS=SEGMENT_ROWS, BLOCK_D=SEGMENT_COLUMNS, num_warps=4,
    )  # fmt: skip
    return sum_parts(partial)
