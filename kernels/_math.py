"""Arithmetic shared by the kernels: matrix products, AdamW's powers, and a tanh accurate for tiny arguments too.

    tanh(x) = x + x^3 P(x^2)              |x| < 1   odd polynomial
            = sign(x) (1 - 2e / (1 + e))  |x| >= 1  e = exp(-2|x|), which cannot overflow

The usual 2 sigmoid(2x) - 1 subtracts two nearly equal numbers when x is small and loses every digit of a tiny x;
libdevice's tanh does not run in Triton's interpreter. P is a minimax fit (Lawson's iteration in float64, relative
error 5e-9). In fp32 the relative error of the whole is below 1e-7 with correctly rounded exp and division, and
below 2.4e-7 if the hardware's approximate exp2 and division both err by their documented maximum.
"""

import triton
import triton.language as tl

from ._runtime import interpreting

INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def tanh(x):
    """tanh of an fp32 tensor; NaN stays NaN, infinities give +-1."""
    ax = tl.abs(x)
    s = tl.minimum(ax, 1.0)  # beyond 1 the polynomial is discarded: the cap keeps it from overflowing
    z = s * s
    p = -0.00035845183 * z + 0.0023013640
    p = p * z - 0.0079461056
    p = p * z + 0.021486657
    p = p * z - 0.053879803
    p = p * z + 0.13332345
    p = p * z - 0.33333295
    small = s + s * (z * p)
    e = tl.exp(-2.0 * ax)
    large = 1.0 - 2.0 * e / (1.0 + e)
    r = tl.where(ax < 1.0, small, large)  # NaN compares false and comes out of the exp form as NaN
    return tl.where(x < 0.0, -r, r)


@triton.jit
def load_dpre(dh_ptr, h_ptr, rows, cols, mask, H, stride_db, stride_dh):
    """The gradient through h = tanh(pre), fp32, at rows x cols, which broadcast; 0 where masked.

    dh has any strides, h is (any, H) contiguous.
    """
    dh = tl.load(dh_ptr + rows * stride_db + cols.to(tl.int64) * stride_dh, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + rows * H + cols, mask=mask, other=0.0).to(tl.float32)
    # dpre = dh (1 - h^2)
    return dh * (1.0 - h * h)


@triton.jit
def mul_rn(x, y):
    """x * y of fp32, rounded to fp32 by itself; the compiler may not fuse it into an addition, as it may `x * y + z`.

    CUDA's __fmul_rn. Inline PTX, for Triton has no operator for it: ptxas leaves a multiplication alone that names its
    rounding. The interpreter never fuses.
    """
    if INTERPRETED:
        return x * y
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """acc + a b with fp32 accumulation; fp32 operands by INPUT_PRECISION, 16-bit operands (of one type) exactly."""
    if INTERPRETED:
        # The interpreter would multiply the bit patterns of bf16. Products of 16-bit floats are exact in fp32.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=INPUT_PRECISION)


@triton.jit
def load_transposed(
    w_ptr, n0, k, in_k, N, stride_n, stride_k, INPUT_PRECISION: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The second operand of a dot, w^T (BLOCK_K, BLOCK_N): w[n0 + n, k] at (k, n), 0 past N and where not in_k.

    Without tensor cores a product reads this operand from shared memory, where it lies in the order in which threads
    have loaded it. Loaded along k, as w lies in memory, 16 threads would read 16 columns from one bank. So a thread
    loads two rows of w and joins them, and the copy is contiguous along n.
    """
    if INPUT_PRECISION == "ieee" and w_ptr.dtype.element_ty == tl.float32:
        n = n0 + 2 * tl.arange(0, BLOCK_N // 2)
        ptrs = w_ptr + n[:, None].to(tl.int64) * stride_n + k[None, :].to(tl.int64) * stride_k
        even = tl.load(ptrs, mask=(n < N)[:, None] & in_k[None, :], other=0.0)
        odd = tl.load(ptrs + stride_n, mask=(n + 1 < N)[:, None] & in_k[None, :], other=0.0)
        pairs = tl.permute(tl.join(even, odd), (1, 0, 2))  # (BLOCK_K, BLOCK_N / 2, 2)
        return tl.reshape(pairs, (k.shape[0], BLOCK_N))
    else:
        n = n0 + tl.arange(0, BLOCK_N)
        ptrs = w_ptr + n[None, :].to(tl.int64) * stride_n + k[:, None].to(tl.int64) * stride_k
        return tl.load(ptrs, mask=in_k[:, None] & (n < N)[None, :], other=0.0)


@triton.jit
def one_minus_power(base: tl.constexpr, exponent):
    """1 - base**exponent, fp32, for an int32 scalar exponent >= 0: AdamW's bias correction.

    By squaring, in fp64: in fp32 the difference would have lost four digits at 1 - 0.999**1.
    """
    power = tl.full((), 1.0, tl.float64)
    square = tl.full((), base, tl.float64)
    for _ in range(31):
        power = tl.where((exponent & 1) == 1, power * square, power)
        square = square * square
        exponent = exponent >> 1
    return (1.0 - power).to(tl.float32)
