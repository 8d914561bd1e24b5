"""Kernels that must not be shipped, one for each fault that bench.resources looks for, and one without fault."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from mlp_fast.kernels._aot import Shipped


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, P: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(c_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision=P))


def shipped() -> Iterator[Shipped]:
    pointer = torch.empty(0)
    arguments = {"a_ptr": pointer, "b_ptr": pointer, "c_ptr": pointer}
    for sizes, P in (
        ({"M": 32, "N": 32, "K": 16}, "ieee"),
        ({"M": 64, "N": 64, "K": 64}, "ieee"),  # too much for the registers
        ({"M": 32, "N": 32, "K": 32}, "tf32"),  # tensor cores, though it says fp32
        ({"M": 128, "N": 128, "K": 128}, "tf32"),  # operands of 128 KiB
    ):
        yield Shipped(product_kernel, arguments | sizes | {"P": P}, {"num_warps": 4}, "fp32")
