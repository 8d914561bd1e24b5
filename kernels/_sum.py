"""Sums over a batch in a fixed order: cut into parts, summed apart by many programs, then added here, part by part."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import interpreting

# Below this many programs a device idles, so work is cut finer even where that means computing something again.
# The interpreter has no programs side by side.
MIN_PROGRAMS = 1 if interpreting() else 128
SUM_BLOCK = 512
AHEAD: tl.constexpr = tl.constexpr(8)  # parts that are loaded at a time
# A part for every PART_ROWS rows, at most MAX_PARTS, and at most MAX_PART_NUMBERS numbers in all parts together.
PART_ROWS, MAX_PARTS, MAX_PART_NUMBERS = 64, 64, 1 << 24


@triton.jit
def sum_parts_kernel(parts_ptr, out_ptr, N, num_parts, BLOCK: tl.constexpr):
    """out[i] = parts[0, i] + parts[1, i] + ..., in this order; parts is (num_parts, N) fp32."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < N
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_parts, AHEAD):
        loaded = ()  # all before the first is added, so that their latencies overlap
        for j in tl.static_range(AHEAD):
            ptrs = parts_ptr + (first + j) * N + i
            loaded += (tl.load(ptrs, mask=mask & (first + j < num_parts), other=0.0),)
        # out[i] += parts[first, i], then parts[first + 1, i], ...
        for j in tl.static_range(AHEAD):
            acc += loaded[j]
    tl.store(out_ptr + i, acc, mask=mask)


def parts_of(rows: int, size: int, multiple: int, part_rows: int = PART_ROWS) -> tuple[int, int]:
    """How many parts a sum of so many rows, with results of `size` numbers, is cut into, and the rows of each part.

    The rows of a part are a multiple of `multiple`, about part_rows. No part is empty, but for the one of no rows.
    """
    rows = max(rows, 1)
    parts = max(1, min(triton.cdiv(rows, part_rows), MAX_PARTS, MAX_PART_NUMBERS // max(size, 1)))
    rows_per_part = triton.cdiv(triton.cdiv(rows, parts), multiple) * multiple
    return triton.cdiv(rows, rows_per_part), rows_per_part


def sum_parts(parts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """parts (num_parts, ...) fp32 -> their sum (...), of the given dtype."""
    if parts.shape[0] == 1:
        return parts[0].to(dtype)
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    N = out.numel()
    if N > 0:
        sum_parts_kernel[(triton.cdiv(N, SUM_BLOCK),)](parts, out, N, parts.shape[0], BLOCK=SUM_BLOCK, num_warps=4)
    return out
