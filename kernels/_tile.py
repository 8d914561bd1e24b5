"""Blocks and tiles: the indices of what a program loads, computes and stores at a time.

A tile of a matrix in memory is three tensors, which broadcast: offsets of its rows, offsets within a row, and the mask
of what lies within the matrix. One tile serves all matrices of one shape, as parameters and their moments have it.
"""

from typing import Any

import triton
import triton.language as tl

from ._runtime import MAX_REGISTERS, input_precision


def block_size(size: int, most: int) -> int:
    """The length of a block for so many numbers: a power of two, at least 16 as products need it, at most `most`."""
    return max(16, min(triton.next_power_of_2(size), most))


def product_options(precision: str, num_stages: int, **blocks: int) -> dict[str, Any]:
    """The options that kernels of matrix products are launched with, their block sizes among them."""
    return {
        "INPUT_PRECISION": input_precision(precision), **blocks,
        "num_warps": 4, "num_stages": num_stages, "maxnreg": MAX_REGISTERS,
    }  # fmt: skip


@triton.jit
def span(first, size, BLOCK: tl.constexpr):
    """The BLOCK indices from `first` on along an axis, and which of them lie below its size."""
    i = first + tl.arange(0, BLOCK)
    return i, i < size


@triton.jit
def tile(i, j, rows, columns, stride=None, first=0):
    """The tile (i, j) of a matrix (rows, columns).

    Args:
        i, j: the tile's rows and columns, each a block of indices.
        stride: numbers from one row to the next; by default `columns`.
        first: offset of the matrix's first number, where several lie one behind the other.
    """
    step = columns if stride is None else stride
    return i[:, None] * step + first, j[None, :], (i[:, None] < rows) & (j[None, :] < columns)


@triton.jit
def transposed_tile(i, j, rows, columns, stride=None, first=0):
    """The same numbers as of tile(), as a tile (j, i): what is loaded or stored there is the transposed matrix."""
    step = columns if stride is None else stride
    return i[None, :] * step + first, j[:, None], (i[None, :] < rows) & (j[:, None] < columns)


@triton.jit
def wide_tile(i, j, in_rows, in_columns, row_stride, column_stride=None):
    """The tile (i, j) of a matrix of any size and strides, with offsets of 64 bits.

    Args:
        in_rows, in_columns: which of i, of j lie within the matrix.
        column_stride: numbers from one column to the next; by default 1.
    """
    columns = j[None, :] if column_stride is None else j[None, :].to(tl.int64) * column_stride
    return i[:, None].to(tl.int64) * row_stride, columns, in_rows[:, None] & in_columns[None, :]


@triton.jit
def vector(i, length):
    """The tile i of a vector."""
    return i, 0, i < length


@triton.jit
def flat(tile):
    """The same tile with its offsets added up, once for several loads and stores."""
    return tile[0] + tile[1], 0, tile[2]


@triton.jit
def load_tile(ptr, tile):
    """The numbers of a tile; 0 outside of the matrix."""
    return tl.load(ptr + tile[0] + tile[1], mask=tile[2], other=0.0)


@triton.jit
def store_tile(ptr, tile, value):
    """Stores the numbers of a tile."""
    tl.store(ptr + tile[0] + tile[1], value, mask=tile[2])
