"""xorshift64*: the one source of random numbers, in scalar form and as a vectorised fill.

Marsaglia's xorshift (2003) with Vigna's multiplicative scrambler (2014). A step is linear over GF(2), so a jump of
any length is one 64x64 bit matrix: the fill starts many lanes at evenly spaced places of the one stream and steps
them together. Both forms give the same bits.
"""

import math

import numpy as np
import numpy.typing as npt
import torch

MASK64 = (1 << 64) - 1
MULTIPLIER = 0x2545F4914F6CDD1D
_LANES = 4096
_BITS = np.arange(64, dtype=np.uint64)

U64 = npt.NDArray[np.uint64]
F64 = npt.NDArray[np.float64]


class RNG:
    """A xorshift64* stream.

    Args:
        seed: the initial 64-bit state; not 0, the one state that xorshift never leaves.
    """

    def __init__(self, seed: int) -> None:
        if not 0 < seed <= MASK64:
            raise ValueError(f"the seed must lie in 1..2^64-1 (got {seed})")
        self.state = seed

    def random_u32(self) -> int:
        """The next draw: bits 32..63 of state * MULTIPLIER mod 2^64."""
        x = self.state
        x ^= x >> 12
        x ^= (x << 25) & MASK64
        x ^= x >> 27
        self.state = x
        return ((x * MULTIPLIER) & MASK64) >> 32

    def random(self) -> float:
        """The next uniform in [0, 1): the upper 24 bits of a draw over 2^24, exact in float32."""
        return (self.random_u32() >> 8) / 2**24

    def fill_u32(self, n: int) -> npt.NDArray[np.uint32]:
        """The next n draws, bit-identical to n calls of random_u32(); shape (n,), uint32."""
        lanes = min(_LANES, max(1, n))
        rows = -(-n // lanes)  # draws per lane
        states = _evenly_spaced_states(self.state, lanes, rows)
        draws = np.empty((rows, lanes), np.uint32)
        scratch = np.empty_like(states)
        # Lane j holds draws j*rows .. j*rows + rows - 1, so the stream ends in lane (n-1) // rows, at row (n-1) % rows.
        last_lane, last_row = divmod(n - 1, rows) if n else (0, 0)
        for row in range(rows):
            _step(states, scratch)
            np.multiply(states, np.uint64(MULTIPLIER), out=scratch)
            np.right_shift(scratch, np.uint64(32), out=scratch)
            draws[row] = scratch
            if row == last_row:
                self.state = int(states[last_lane])
        return np.ascontiguousarray(draws.T).reshape(-1)[:n]

    def fill_uniform(self, n: int) -> F64:
        """The next n uniforms in [0, 1), as n calls of random(); shape (n,), float64."""
        return (self.fill_u32(n) >> np.uint32(8)).astype(np.float64) * 2.0**-24

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> torch.Tensor:
        """Row-major U(low, high): u * (high - low) + low in float64, rounded to float32."""
        values = self.fill_uniform(math.prod(shape)) * (high - low) + low
        return torch.from_numpy(values.astype(np.float32)).reshape(shape)

    def normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Row-major N(0, 1) by Box-Muller in float64, rounded to float32; an odd count drops the last half of a pair.

        A first uniform of 0 (probability 2^-24) would be log(0); 2^-25, half the smallest other value, stands in.
        """
        n = math.prod(shape)
        u = self.fill_uniform(n + n % 2).reshape(-1, 2)
        u1 = np.where(u[:, 0] == 0.0, 2.0**-25, u[:, 0])
        angle = (2.0 * math.pi * u[:, 1]).tolist()
        # log, cos and sin from the C library, one by one: vectorised ones may differ in the last bit.
        radius = np.sqrt(-2.0 * np.array(list(map(math.log, u1.tolist())), np.float64))
        z = np.empty_like(u)
        z[:, 0] = radius * np.array(list(map(math.cos, angle)), np.float64)
        z[:, 1] = radius * np.array(list(map(math.sin, angle)), np.float64)
        return torch.from_numpy(z.reshape(-1)[:n].astype(np.float32)).reshape(shape)


def _step(states: U64, scratch: U64) -> None:
    """One xorshift step of every lane, in place."""
    for shift, operation in ((12, np.right_shift), (25, np.left_shift), (27, np.right_shift)):
        operation(states, np.uint64(shift), out=scratch)
        np.bitwise_xor(states, scratch, out=states)


def _apply(matrix: U64, vectors: U64) -> U64:
    """matrix @ vectors over GF(2), (n,); the matrix is its 64 columns, each a 64-bit word.

    By the method of the four Russians: for each of the 8 bytes of a vector, the products with all of its 256 values.
    """
    columns = matrix.reshape(8, 8)
    products = np.zeros((8, 256), np.uint64)
    for bit in range(8):
        products[:, 1 << bit : 2 << bit] = products[:, : 1 << bit] ^ columns[:, bit, None]
    result = np.zeros_like(vectors)
    for byte in range(8):
        result ^= products[byte][(vectors >> _BITS[8 * byte]) & np.uint64(255)]
    return result


def _jump_matrix(distance: int) -> U64:
    """The bit matrix of `distance` steps, by repeated squaring."""
    square = np.uint64(1) << _BITS  # the unit vectors: one step of each gives the columns of the one-step matrix
    result = square.copy()
    _step(square, np.empty_like(square))
    while distance:
        if distance & 1:
            result = _apply(square, result)
        square = _apply(square, square)
        distance >>= 1
    return result


def _evenly_spaced_states(state: int, lanes: int, spacing: int) -> U64:
    """The states 0, spacing, 2*spacing, ... steps after `state`; shape (lanes,), by doubling the known part."""
    states = np.array([state], np.uint64)
    jump = _jump_matrix(spacing)
    while len(states) < lanes:
        states = np.concatenate([states, _apply(jump, states)])
        jump = _apply(jump, jump)
    return states[:lanes].copy()
