"""Tiles of matrices: positions, loads and stores, and how a kernel of matrix products is launched."""

from typing import Any

import triton
import triton.language as tl

from ._runtime import MAX_REGISTERS, input_precision


@triton.jit
def span(first, size, BLOCK: tl.constexpr):
    """first, first + 1, ..., BLOCK positions along an axis; and which of them lie below its size."""
    i = first + tl.arange(0, BLOCK)
    return i, i < size


@triton.jit
def load_tile(ptr, rows, cols, in_rows, in_cols, stride_row, stride_col):
    """x[rows, cols] of a matrix x; 0 where a row or a column is not in it."""
    ptrs = ptr + rows[:, None].to(tl.int64) * stride_row + cols[None, :].to(tl.int64) * stride_col
    return tl.load(ptrs, mask=in_rows[:, None] & in_cols[None, :], other=0.0)


@triton.jit
def store_tile(ptr, rows, cols, in_rows, in_cols, stride_row, tile):
    """x[rows, cols] = tile, in a matrix x whose rows are contiguous."""
    ptrs = ptr + rows[:, None].to(tl.int64) * stride_row + cols[None, :]
    tl.store(ptrs, tile, mask=in_rows[:, None] & in_cols[None, :])


def product_options(precision: str, num_stages: int, **blocks: int) -> dict[str, Any]:
    """The options that kernels of matrix products are launched with, their tile sizes among them."""
    return {
        "INPUT_PRECISION": input_precision(precision), **blocks,
        "num_warps": 4, "num_stages": num_stages, "maxnreg": MAX_REGISTERS,
    }  # fmt: skip
