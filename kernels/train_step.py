"""The whole training step in two to four kernels: forward, loss, backward and AdamW of the n-gram MLP.

    table[t, v] = wte[v] @ W1[:, t]^T               the first layer, factored: only T*V different rows enter it
    h[b]        = tanh(b1 + sum_t table[t, x_bt])
    logits      = h @ W2^T + b2;  loss = mean cross-entropy
    dlogits     = (softmax(logits) - onehot(y)) / B
    dW2 = dlogits^T @ h;  db2 = sum_b dlogits;  dpre = (dlogits @ W2) (1 - h^2);  db1 = sum_b dpre
    dtable[t, v] = sum of dpre[b] over the b with x_bt = v
    dW1[:, t] = dtable[t]^T @ wte;  dwte = sum_t dtable[t] @ W1[:, t]

wte (V, E), W1 (H, T*E), b1 (H), W2 (V, H), b2 (V), two AdamW moments each, all fp32. Batch element j of step s is
window (s*B + j) mod (n - T) of the token tape; learning rate and bias corrections are row s of a table made
beforehand, so a step needs nothing from the host and many of them fit one CUDA graph.

The hidden units are split into tiles over G programs, and each of these is R programs, which share the rows of the
batch: program p has the tiles of number p // R and the rows of group p % R. What crosses tiles are two sums, the logits
(B, V) and dwte (V, E). What crosses the groups of a tile are the gradients of its weights, as R partial sums; each of
the R programs then adds them up and updates a share of the tile: some rows of W2, and some columns of W1.

    forward kernel    [wte update of the step before] -> h -> partial logits, added up in `logits`
    softmax kernel    logits -> dlogits, by rows; left out where the backward kernel does it, for each tile again
    backward kernel   dlogits -> dpre -> dW2, db1 and dtable, summed over the rows of a group
    update kernel     dW2, db1, dW1 -> AdamW -> partial dwte, added up in `dwte`; of the backward kernel where R is 1

Where the vocabulary fits one block, dtable is loaded once for both of its products. Where, besides, a program has one
tile and makes no tables, it goes through its rows once, softmax to dtable, and keeps dlogits and dpre on chip.

h comes from the tables where a program has many rows. Where it has few beside the vocabulary's tokens (`gather`),
tables would save little, and h is the product of the rows' embeddings, gathered, and W1. W1 and W2 are stored
transposed as well, since operands of a product are read fastest along the dimension over which nothing is summed.

wte is updated by every program in a replica of its own at the start of the next forward kernel: the replicas see the
same sums and do the same arithmetic, so they stay equal to the bit, and the step saves a kernel (persistent_step.py: a
grid barrier). embedding_kernel does the update that is still due when a run of steps ends.

Sums across programs are added atomically, in one of two forms:

    deterministic   int64 fixed point, exact in any order: the same bits run after run
    fast            fp32, in the order of arrival

Each sum has two buffers, used in turns: while one is filled, the other, which nobody reads any more, is cleared.

A fixed-point sum cannot carry NaN or infinities. A partial sum that is not finite or is out of range (logits 2^15,
dwte 2^11) sets the flag of its sum in `fault`, and from then on that sum reads as NaN: a diverged run shows NaN losses,
as in eager mode. Each sum has a flag of its own, because programs that are ahead add to dwte while others still read
the logits: so a flag is set and read on different sides of a wait, and the outcome does not depend on who is ahead. A
dwte that does not fit makes wte NaN, and so the logits of the next step, not those of its own.

Versions: 1, one group of rows, R = 1. 2, this one. No time has been measured on a GPU yet; docs/kernels.md counts
what both execute.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _model
from ._math import tanh
from ._runtime import INPUT_PRECISION, MAX_REGISTERS, CompileTimeConfig, input_precision, interpreting
from .adamw import adamw_update

MAX_B, MAX_V, MAX_T, MAX_E, MAX_H = 8192, 256, 16, 256, 4096
DEFAULT_PROGRAMS = 64  # G, at most; the default sizes take 32
MAX_GROUPS = 4  # of rows
MAX_GATHERED = 12  # pairs of operands whose loads are in flight at once: they take registers
SHARED_BYTES = 2**16  # of shared memory that every GPU since sm_75 has for a program
MAX_PROGRAMS = 128  # so that the fixed-point sums below cannot overflow: 2^7 programs

BETA1: tl.constexpr = tl.constexpr(_model.BETA1)
BETA2: tl.constexpr = tl.constexpr(_model.BETA2)
EPS: tl.constexpr = tl.constexpr(_model.EPS)
# Fixed point: value * SCALE in int64. LIMIT * SCALE * MAX_PROGRAMS = 2^62.
LOGITS_SCALE: tl.constexpr = tl.constexpr(2.0**40)
LOGITS_LIMIT: tl.constexpr = tl.constexpr(2.0**15)
DWTE_SCALE: tl.constexpr = tl.constexpr(2.0**44)
DWTE_LIMIT: tl.constexpr = tl.constexpr(2.0**11)


# --- configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepConfig(CompileTimeConfig):
    """Sizes, tiles and arithmetic of a step: the one compile-time argument of its kernels.

    G tiles of hidden units are worked on at a time, each in R groups of rows: G * R programs. BLOCK_* are powers of
    two, at least 16. With `rows` the softmax is a phase of its own, by rows; without, it is computed for every tile
    again: no exchange, but G times the work. With `ahead` the embeddings of all positions are loaded before the first
    product, which hides latencies and takes registers. With `short_tape` a batch may wrap round the tape more than
    once; TrainStep finds out.
    """

    B: int
    V: int
    T: int
    E: int
    H: int
    G: int
    BLOCK_B: int
    BLOCK_V: int
    BLOCK_E: int
    BLOCK_H: int
    precision: str = "ieee"
    deterministic: bool = True
    rows: bool = False
    num_warps: int = 8
    R: int = 1
    ahead: bool = True
    short_tape: bool = False

    @property
    def PROGRAMS(self) -> int:
        """Programs in all: G tiles' owners in each of R groups of rows."""
        return self.G * self.R

    @property
    def exchanges(self) -> int:
        """How often a step has programs wait for each other: kernels, or grid barriers, of a step."""
        return 2 + self.rows + (self.R > 1)

    @property
    def GROUP(self) -> int:
        """Rows of a group; the last ones may have fewer."""
        return -(-self.B // self.R)

    @property
    def gather(self) -> bool:
        """Whether a group multiplies the embeddings of its rows, for want of rows that would make a table pay."""
        return self.R > 1 and self.GROUP <= 2 * self.VP and self.T * self.E_BLOCKS <= MAX_GATHERED

    def operand_bytes(self, positions: int) -> int:
        """Shared memory for the operands of so many positions, gathered embeddings and W1, and for W2."""
        return 4 * (positions * self.E_BLOCKS * self.BLOCK_E * (self.BLOCK_B + self.BLOCK_H) + self.VP * self.BLOCK_H)

    @property
    def whole(self) -> bool:
        """Whether a block has all of the vocabulary, so that what is summed over it or by it takes one pass."""
        return self.BLOCK_V == self.VP

    @property
    def one_pass(self) -> bool:
        """Whether a program goes through its rows once for all gradients, and so keeps dlogits and dpre on chip."""
        return self.gather and self.whole and not self.rows and self.OWNED == 1

    @property
    def E_BLOCKS(self) -> int:
        """Blocks of an embedding."""
        return -(-self.E // self.BLOCK_E)

    @property
    def SHARE_V(self) -> int:
        """Rows of W2 that one of R programs updates."""
        return -(-self.V // self.R)

    @property
    def SHARE_VP(self) -> int:
        """SHARE_V, padded to a power of two."""
        return triton.next_power_of_2(self.SHARE_V)

    @property
    def SHARE_E(self) -> int:
        """Numbers of an embedding, and columns of W1 at a position, that one of R programs updates; a power of two."""
        return max(16, triton.next_power_of_2(-(-self.E // self.R)))

    @property
    def BLOCK_S(self) -> int:
        """Columns of a share at a time."""
        return min(self.BLOCK_E, self.SHARE_E)

    @property
    def BLOCK_W(self) -> int:
        """Rows of W2 that are updated at a time."""
        return min(self.SHARE_VP, self.BLOCK_V)

    @property
    def TILES(self) -> int:
        """Tiles of hidden units; program p owns tiles p // R, p // R + G, ..."""
        return -(-self.H // self.BLOCK_H)

    @property
    def OWNED(self) -> int:
        """Tiles of a program at most; past the last tile there are no units."""
        return -(-self.TILES // self.G)

    @property
    def VP(self) -> int:
        """A row of logits, padded to a power of two."""
        return max(16, triton.next_power_of_2(self.V))

    @property
    def BLOCK_D(self) -> int:
        """Rows of dlogits that are added up at a time."""
        return max(1, min(triton.next_power_of_2(self.B), 4096 // self.VP))

    @property
    def BLOCK_R(self) -> int:
        """Rows of logits that are turned into dlogits at a time; with `rows` so few that every program has some."""
        share = max(1, self.B // self.PROGRAMS).bit_length() - 1
        return min(self.BLOCK_D, 2**share) if self.rows else min(self.BLOCK_D, triton.next_power_of_2(self.GROUP))

    @property
    def T_AHEAD(self) -> int:
        """Positions of which W1 and its gradient are loaded before the first of them is updated.

        Operands of tensor cores take more registers: there it is one at a time.
        """
        return self.T if self.T <= 4 and self.precision == "ieee" else 1

    @property
    def PIECE(self) -> int:
        """Numbers of an embedding table that are updated at a time: two a thread."""
        return 64 * self.num_warps

    @property
    def PIECES(self) -> int:
        """Pieces of the embedding table."""
        return -(-self.V * self.E // self.PIECE)

    @property
    def PIECES_AHEAD(self) -> int:
        """Pieces that are loaded before the first of them is updated."""
        return min(4, self.PIECES)

    @property
    def ROW(self) -> int:
        """Length of a row of the sum of the logits: V, padded so that several numbers are loaded at once."""
        return -(-self.V // 4) * 4

    # Where W1, b1, W2 and b2 begin in a plane of `state`, and its length, in floats; rounded up for alignment.
    @property
    def W1_OFFSET(self) -> int:
        """Offset of W1, (H, T*E)."""
        return 0

    @property
    def B1_OFFSET(self) -> int:
        """Offset of b1, (H,)."""
        return _aligned(self.H * self.T * self.E)

    @property
    def W2_OFFSET(self) -> int:
        """Offset of W2, (V, H)."""
        return self.B1_OFFSET + _aligned(self.H)

    @property
    def B2_OFFSET(self) -> int:
        """Offset of b2, (V,)."""
        return self.W2_OFFSET + _aligned(self.V * self.H)

    @property
    def PLANE(self) -> int:
        """Length of a plane."""
        return self.B2_OFFSET + _aligned(self.V)


def _aligned(count: int) -> int:
    return -(-count // 16) * 16


class Buffers(NamedTuple):
    """Pointers of a step, on one device. `sum` is int64 (deterministic) or float32 (fast)."""

    tape: Tensor  # (n,), integer: the tokens
    scalars: Tensor  # (N, 3), float32: decay factor, step size and root of the second bias correction by step
    clock: Tensor  # (2,), int64: the next step, written by the backward kernel; the same for it, by the forward kernel
    losses: Tensor  # (N,), float32: the batch loss of every step
    state: Tensor  # (3, PLANE), float32: W1, b1, W2, b2; their first moments; their second moments
    w1t: Tensor  # (T*E, H), float32: W1 transposed, so that products read it along its rows
    w2t: Tensor  # (H, V), float32: W2 transposed
    replicas: Tensor  # (PROGRAMS, 3, V, E), float32: wte and its moments, once per program
    table: Tensor  # (R, T, V, H), float32: the tables, later the partial sums of their gradient
    dw2: Tensor  # (R, V, H), float32: partial sums of the gradient of W2
    db1: Tensor  # (R, H), float32: partial sums of the gradient of b1
    hidden: Tensor  # (B, H), float32: h
    dpre: Tensor  # (B, H), float32
    logits: Tensor  # (2, B, ROW), sum
    dlogits: Tensor  # (B, V) with rows and in one pass, else (G, B, V), float32: a copy for every tile
    row_losses: Tensor  # (B,), float32
    dwte: Tensor  # (2, V, E), sum
    fault: Tensor  # (2,), int32: not 0 once a partial sum of the logits, of dwte did not fit


# --- device functions ----------------------------------------------------------------------------------------------


@triton.jit
def zero_of_step(s):
    """0, int32, of step s; every phase adds it to its ranges.

    s >> 62 is always 0, but it makes addresses depend on the step. So the compiler of the persistent kernel cannot
    compute the addresses of all phases before its loop over steps, where they would fill the registers and spill.
    """
    return tl.multiple_of((s >> 62).to(tl.int32), 16)


@triton.jit
def load_three(ptr, PLANE: tl.constexpr, offsets, mask):
    """Parameters and their moments, which lie one and two planes further."""
    param = tl.load(ptr + offsets, mask=mask, other=0.0)
    m = tl.load(ptr + PLANE + offsets, mask=mask, other=0.0)
    v = tl.load(ptr + 2 * PLANE + offsets, mask=mask, other=0.0)
    return param, m, v


@triton.jit
def adamw_of(three, grad, ptr, offsets, mask, scalars_ptr):
    """AdamW of parameters and moments in registers; the parameters are stored too, for the products to load."""
    decay, step_size, root = tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)
    three = adamw_update(three[0], grad, three[1], three[2], decay, step_size, root, BETA1, BETA2, EPS)
    tl.store(ptr + offsets, three[0], mask=mask)
    return three


@triton.jit
def store_moments(three, ptr, PLANE: tl.constexpr, offsets, mask):
    """Stores both moments, one and two planes behind the parameters."""
    tl.store(ptr + PLANE + offsets, three[1], mask=mask)
    tl.store(ptr + 2 * PLANE + offsets, three[2], mask=mask)


@triton.jit
def adamw_at(ptr, PLANE: tl.constexpr, offsets, mask, grad, scalars_ptr, REPLICATED: tl.constexpr = False):
    """AdamW of the parameters at ptr + offsets, whose moments lie one and two planes further.

    Blocks of fewer numbers than the program has threads are REPLICATED: several threads load a number, one stores it.
    """
    three = load_three(ptr, PLANE, offsets, mask)
    if REPLICATED:
        tl.debug_barrier()  # all threads have loaded before any of them stores
    three = adamw_of(three, grad, ptr, offsets, mask, scalars_ptr)
    store_moments(three, ptr, PLANE, offsets, mask)
    return three[0]


@triton.jit
def add_to_sum(sum_ptr, offsets, mask, value, fault_ptr, SCALE: tl.constexpr, LIMIT: tl.constexpr, C: tl.constexpr):
    """Adds a block to a sum across programs."""
    if C.deterministic:
        fits = tl.abs(value) < LIMIT  # false for NaN as well
        tl.store(fault_ptr + tl.zeros_like(offsets), 1, mask=mask & (fits == 0))
        # sum += int64(value * SCALE)
        fixed = (tl.where(fits, value, 0.0) * SCALE).to(tl.int64)
        tl.atomic_add(sum_ptr + offsets, fixed, mask=mask, sem="relaxed")
    else:
        tl.atomic_add(sum_ptr + offsets, value, mask=mask, sem="relaxed")


@triton.jit
def read_sum(sum_ptr, offsets, mask, fault_ptr, SCALE: tl.constexpr, C: tl.constexpr):
    """The value of a finished sum, fp32."""
    if C.deterministic:
        fault = tl.load(fault_ptr)
        # value = sum / SCALE
        value = tl.load(sum_ptr + offsets, mask=mask, other=0).to(tl.float32) * (1.0 / SCALE)
        return tl.where(fault != 0, float("nan"), value)
    else:
        return tl.load(sum_ptr + offsets, mask=mask, other=0)


@triton.jit
def clear_sum(p, sum_ptr, SIZE: tl.constexpr, C: tl.constexpr):
    """Clears a sum for its next use; the programs share the work."""
    for first in range(p * 1024, SIZE, C.PROGRAMS * 1024):
        offsets = first + tl.arange(0, 1024)
        tl.store(sum_ptr + offsets, tl.zeros((1024,), sum_ptr.dtype.element_ty), mask=offsets < SIZE)


@triton.jit
def rows_end(p, C: tl.constexpr):
    """Where the rows of program p's group end, which begin at p % R * GROUP."""
    return tl.minimum(p % C.R * C.GROUP + C.GROUP, C.B)


@triton.jit
def window_of_step(s, num_windows, C: tl.constexpr):
    """The number of the first window of step s, (s B) mod num_windows, int32."""
    return ((s * C.B) % num_windows).to(tl.int32)


@triton.jit
def window_starts(window, rows, num_windows, C: tl.constexpr):
    """Where on the tape the windows of these batch rows begin, int32; `window` is that of row 0."""
    # start = (window + b) mod num_windows
    start = window + rows
    if C.short_tape:
        return start % num_windows
    else:
        return tl.where(start < num_windows, start, start - num_windows)


@triton.jit
def dot(a, b, acc, C: tl.constexpr):
    """acc + a @ b, in the precision of the configuration."""
    return tl.dot(a, b, acc, input_precision=C.precision)


@triton.jit
def dot_one_hot(ones, x, acc, C: tl.constexpr):
    """ones @ x. A one-hot matrix is exact in TF32, so only x is split: two products where tf32x3 takes three."""
    if C.precision == "tf32x3":
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # the 10 mantissa bits of TF32
        acc = tl.dot(ones, x - high, acc, input_precision="tf32")
        return tl.dot(ones, high, acc, input_precision="tf32")
    else:
        return tl.dot(ones, x, acc, input_precision=C.precision)


@triton.jit
def cross_entropy(logits, is_target, C: tl.constexpr):
    """Row losses and the gradient of their mean over the batch, (softmax(logits) - onehot(y)) / B."""
    # loss = log(sum_v exp(z_v)) - z_y,  z = logits - max_v logits   (rows,)
    shifted = logits - tl.max(logits, axis=1)[:, None]
    exponential = tl.exp(shifted)
    total = tl.sum(exponential, axis=1)
    losses = tl.log(total) - tl.sum(tl.where(is_target, shifted, 0.0), axis=1)
    # dlogits = (exp(z) / sum_v exp(z_v) - onehot(y)) / B   (rows, VP)
    dlogits = (exponential * (1.0 / total)[:, None] - tl.where(is_target, 1.0, 0.0)) * (1.0 / C.B)
    return losses, dlogits


# --- phases, by the program's number p and the step's number s ---------------------------------------------------


@triton.jit
def load_replica(first, p, s, buf, C: tl.constexpr, PIECES: tl.constexpr):
    """wte and its moments in program p's replica, from number `first` on, in pieces of PIECE."""
    pieces = ()
    for i in tl.static_range(PIECES):
        offsets = first + i * C.PIECE + (zero_of_step(s) + tl.arange(0, C.PIECE))
        pieces += (load_three(buf.replicas + p * (3 * C.V * C.E), C.V * C.E, offsets, offsets < C.V * C.E),)
    return pieces


@triton.jit
def update_replica(pieces, first, p, s, buf, C: tl.constexpr, PIECES: tl.constexpr):
    """These pieces after AdamW with the finished gradient of step s; wte is stored too."""
    grads = ()
    for i in tl.static_range(PIECES):
        offsets = first + i * C.PIECE + (zero_of_step(s) + tl.arange(0, C.PIECE))
        sum_ptr = buf.dwte + (s % 2) * (C.V * C.E)
        grads += (read_sum(sum_ptr, offsets, offsets < C.V * C.E, buf.fault + 1, DWTE_SCALE, C),)
    new = ()
    for i in tl.static_range(PIECES):
        offsets = first + i * C.PIECE + (zero_of_step(s) + tl.arange(0, C.PIECE))
        wte = buf.replicas + p * (3 * C.V * C.E)
        new += (adamw_of(pieces[i], grads[i], wte, offsets, offsets < C.V * C.E, buf.scalars + 3 * s),)
    return new


@triton.jit
def store_replica_moments(pieces, first, p, s, buf, C: tl.constexpr, PIECES: tl.constexpr):
    """Stores both moments of these pieces."""
    for i in tl.static_range(PIECES):
        offsets = first + i * C.PIECE + (zero_of_step(s) + tl.arange(0, C.PIECE))
        store_moments(pieces[i], buf.replicas + p * (3 * C.V * C.E), C.V * C.E, offsets, offsets < C.V * C.E)


@triton.jit
def embedding_phase(p, s, buf, C: tl.constexpr):
    """AdamW of program p's replica of wte with the finished gradient of step s."""
    for first in range(0, C.V * C.E, C.PIECES_AHEAD * C.PIECE):
        pieces = load_replica(first, p, s, buf, C, C.PIECES_AHEAD)
        pieces = update_replica(pieces, first, p, s, buf, C, C.PIECES_AHEAD)
        store_replica_moments(pieces, first, p, s, buf, C, C.PIECES_AHEAD)
    tl.debug_barrier()  # the first layer reads what other threads of the program wrote


@triton.jit
def table_phase(p, s, buf, C: tl.constexpr):
    """table[t, v] = wte[v] @ W1[:, t]^T for program p's units."""
    zero = zero_of_step(s)
    wte = buf.replicas + p * (3 * C.V * C.E)
    table = buf.table + p % C.R * (C.T * C.V * C.H)
    for tile in range(p // C.R, C.TILES, C.G):
        unit = tile * C.BLOCK_H + (zero + tl.arange(0, C.BLOCK_H))
        for t in range(C.T):
            for v0 in range(0, C.V, C.BLOCK_V):
                v = v0 + (zero + tl.arange(0, C.BLOCK_V))
                acc = tl.full((C.BLOCK_V, C.BLOCK_H), 0.0, tl.float32)
                for e0 in range(0, C.E, C.BLOCK_E):
                    e = e0 + (zero + tl.arange(0, C.BLOCK_E))
                    rows = tl.load(
                        wte + v[:, None] * C.E + e[None, :], mask=(v[:, None] < C.V) & (e[None, :] < C.E), other=0.0
                    )
                    weight = tl.load(
                        buf.w1t + (t * C.E + e[:, None]) * C.H + unit[None, :],
                        mask=(unit[None, :] < C.H) & (e[:, None] < C.E),
                        other=0.0,
                    )
                    # table[t, v] += wte[v, e] @ W1[:, t, e]^T   (BLOCK_V, BLOCK_H)
                    acc = dot(rows, weight, acc, C)
                tl.store(
                    table + (t * C.V + v[:, None]) * C.H + unit[None, :],
                    acc,
                    mask=(v[:, None] < C.V) & (unit[None, :] < C.H),
                )
    tl.debug_barrier()


@triton.jit
def gathered_sum(acc, unit, start, first, p, s, buf, C: tl.constexpr, T: tl.constexpr, BLOCKS: tl.constexpr):
    """acc + sum_t wte[x_t] @ W1[:, t]^T of these units over T positions from `first`, for the windows at `start`.

    All loads come before all products, so that their latencies overlap.
    """
    zero = zero_of_step(s)
    wte = buf.replicas + p * (3 * C.V * C.E)
    tokens = ()
    for t in tl.static_range(T):
        tokens += (tl.load(buf.tape + start + first + t).to(tl.int32),)
    rows, weights = (), ()
    for t in tl.static_range(T):
        for i in tl.static_range(BLOCKS):
            e = i * C.BLOCK_E + (zero + tl.arange(0, C.BLOCK_E))
            rows += (tl.load(wte + tokens[t][:, None] * C.E + e[None, :], mask=e[None, :] < C.E, other=0.0),)
            weights += (
                tl.load(
                    buf.w1t + ((first + t) * C.E + e[:, None]) * C.H + unit[None, :],
                    mask=(unit[None, :] < C.H) & (e[:, None] < C.E),
                    other=0.0,
                ),
            )
    for i in tl.static_range(T * BLOCKS):
        # pre += wte[x_t, e] @ W1[:, t, e]^T   (BLOCK_B, BLOCK_H)
        acc = dot(rows[i], weights[i], acc, C)
    return acc


@triton.jit
def hidden_block(b, unit, start, mask, p, s, buf, C: tl.constexpr):
    """h = tanh(b1 + sum_t table[t, x_t]) of these rows, whose windows begin at `start`, and these units."""
    bias = tl.load(buf.state + C.B1_OFFSET + unit, mask=unit < C.H, other=0.0)
    # h = tanh(b1 + sum_t wte[x_t] @ W1[:, t]^T)   (BLOCK_B, BLOCK_H)
    pre = tl.full((C.BLOCK_B, C.BLOCK_H), 0.0, tl.float32) + bias[None, :]
    if C.gather and C.ahead:
        pre = gathered_sum(pre, unit, start, 0, p, s, buf, C, C.T, C.E_BLOCKS)
    elif C.gather:
        for t in range(C.T):
            pre = gathered_sum(pre, unit, start, t, p, s, buf, C, 1, C.E_BLOCKS)
    else:
        table = buf.table + p % C.R * (C.T * C.V * C.H)
        for t in range(C.T):
            token = tl.load(buf.tape + start + t).to(tl.int32)
            pre += tl.load(table + (t * C.V + token[:, None]) * C.H + unit[None, :], mask=mask, other=0.0)
    return tanh(pre)


@triton.jit
def hidden_phase(p, s, buf, window, num_windows, C: tl.constexpr):
    """h of program p's units and rows; adds h @ W2^T to the logits of step s, the first tile's programs b2 as well.

    Clears the other sum.
    """
    zero, end = zero_of_step(s), rows_end(p, C)
    sum_ptr = buf.logits + (s % 2) * (C.B * C.ROW)
    v = zero + tl.arange(0, C.VP)
    bias = tl.load(buf.state + C.B2_OFFSET + v, mask=(v < C.V) & (p < C.R), other=0.0)
    for b0 in range(0, C.GROUP, C.BLOCK_B):
        b = p % C.R * C.GROUP + b0 + (zero + tl.arange(0, C.BLOCK_B))
        start = window_starts(window, b, num_windows, C)
        acc = tl.full((C.BLOCK_B, C.VP), 0.0, tl.float32) + bias[None, :]
        for i in range(0, C.OWNED):
            unit = (p // C.R + i * C.G) * C.BLOCK_H + (zero + tl.arange(0, C.BLOCK_H))
            weight = tl.load(
                buf.w2t + unit[:, None] * C.V + v[None, :], mask=(v[None, :] < C.V) & (unit[:, None] < C.H), other=0.0
            )
            mask = (b[:, None] < end) & (unit[None, :] < C.H)
            h = hidden_block(b, unit, start, mask, p, s, buf, C)
            tl.store(buf.hidden + b[:, None] * C.H + unit[None, :], h, mask=mask)
            # logits += h @ W2^T over the tile   (BLOCK_B, VP)
            acc = dot(h, weight, acc, C)
        mask = (b[:, None] < end) & (v[None, :] < C.V)
        add_to_sum(sum_ptr, b[:, None] * C.ROW + v[None, :], mask, acc, buf.fault, LOGITS_SCALE, LOGITS_LIMIT, C)
    clear_sum(p, buf.logits + ((s + 1) % 2) * (C.B * C.ROW), C.B * C.ROW, C)


@triton.jit
def dlogits_for(p, buf, C: tl.constexpr):
    """The dlogits that program p works on: with `rows` there is one copy, else one for every tile in work."""
    if C.rows or C.one_pass:
        return buf.dlogits
    else:
        return buf.dlogits + p // C.R * (C.B * C.V)


@triton.jit
def softmax_block(b, end, first, s, buf, window, num_windows, C: tl.constexpr):
    """dlogits of these rows up to `end`, their offsets and mask; with `first` the losses are stored too."""
    zero = zero_of_step(s)
    v = zero + tl.arange(0, C.VP)
    target = tl.load(buf.tape + window_starts(window, b, num_windows, C) + C.T).to(tl.int32)
    logits = read_sum(
        buf.logits + (s % 2) * (C.B * C.ROW), b[:, None] * C.ROW + v[None, :],
        (b[:, None] < end) & (v[None, :] < C.ROW), buf.fault, LOGITS_SCALE, C,
    )  # fmt: skip
    logits = tl.where(v[None, :] < C.V, logits, float("-inf"))
    losses, dlogits = cross_entropy(logits, v[None, :] == target[:, None], C)
    tl.store(buf.row_losses + b, losses, mask=(b < end) & first)
    return dlogits, b[:, None] * C.V + v[None, :], (b[:, None] < end) & (v[None, :] < C.V)


@triton.jit
def softmax_phase(p, s, buf, window, num_windows, C: tl.constexpr):
    """Row losses and dlogits = (softmax(logits) - onehot(y)) / B: of program p's rows, once for each row.

    Without `rows`: of all rows of p's group, into a copy for p's tiles.
    """
    zero = zero_of_step(s)
    dlogits_ptr = dlogits_for(p, buf, C)
    if C.rows:
        for b0 in range(p * C.BLOCK_R, C.B, C.PROGRAMS * C.BLOCK_R):
            b = b0 + (zero + tl.arange(0, C.BLOCK_R))
            dlogits, offsets, mask = softmax_block(b, C.B, True, s, buf, window, num_windows, C)
            tl.store(dlogits_ptr + offsets, dlogits, mask=mask)
    else:
        for b0 in range(0, C.GROUP, C.BLOCK_R):
            b = p % C.R * C.GROUP + b0 + (zero + tl.arange(0, C.BLOCK_R))
            dlogits, offsets, mask = softmax_block(b, rows_end(p, C), p < C.R, s, buf, window, num_windows, C)
            tl.store(dlogits_ptr + offsets, dlogits, mask=mask)
    tl.debug_barrier()


@triton.jit
def output_bias_phase(s, buf, C: tl.constexpr):
    """The batch loss of step s, added in the order of the rows, and db2 with the update of b2; one program's share."""
    zero = zero_of_step(s)
    losses = tl.zeros((256,), tl.float32)
    for b0 in range(0, C.B, 256):
        b = b0 + (zero + tl.arange(0, 256))
        # loss = sum_b row_loss[b] / B
        losses += tl.load(buf.row_losses + b, mask=b < C.B, other=0.0)
    tl.store(buf.losses + s, tl.sum(losses, axis=0) / C.B)

    v = zero + tl.arange(0, C.VP)
    db2 = tl.full((C.VP,), 0.0, tl.float32)
    for b0 in range(0, C.B, C.BLOCK_D):
        b = b0 + (zero + tl.arange(0, C.BLOCK_D))
        mask = (b[:, None] < C.B) & (v[None, :] < C.V)
        # db2 = sum_b dlogits[b]   (VP,)
        db2 += tl.sum(tl.load(buf.dlogits + b[:, None] * C.V + v[None, :], mask=mask, other=0.0), axis=0)
    adamw_at(buf.state + C.B2_OFFSET, C.PLANE, v, v < C.V, db2, buf.scalars + 3 * s, REPLICATED=True)


@triton.jit
def output_phase(p, s, buf, C: tl.constexpr):
    """dpre = (dlogits @ W2) (1 - h^2) for program p's units and rows; their sums over the rows are db1's part."""
    zero, end = zero_of_step(s), rows_end(p, C)
    dlogits_ptr = dlogits_for(p, buf, C)
    for tile in range(p // C.R, C.TILES, C.G):
        unit = tile * C.BLOCK_H + (zero + tl.arange(0, C.BLOCK_H))
        db1 = tl.full((C.BLOCK_H,), 0.0, tl.float32)
        for b0 in range(0, C.GROUP, C.BLOCK_B):
            b = p % C.R * C.GROUP + b0 + (zero + tl.arange(0, C.BLOCK_B))
            dh = tl.full((C.BLOCK_B, C.BLOCK_H), 0.0, tl.float32)
            for v0 in range(0, C.V, C.BLOCK_V):
                v = v0 + (zero + tl.arange(0, C.BLOCK_V))
                dlogits = tl.load(
                    dlogits_ptr + b[:, None] * C.V + v[None, :],
                    mask=(b[:, None] < end) & (v[None, :] < C.V),
                    other=0.0,
                )
                weight = tl.load(
                    buf.state + C.W2_OFFSET + v[:, None] * C.H + unit[None, :],
                    mask=(v[:, None] < C.V) & (unit[None, :] < C.H),
                    other=0.0,
                )
                # dh += dlogits @ W2   (BLOCK_B, BLOCK_H)
                dh = dot(dlogits, weight, dh, C)
            mask = (b[:, None] < end) & (unit[None, :] < C.H)
            offsets = b[:, None] * C.H + unit[None, :]
            h = tl.load(buf.hidden + offsets, mask=mask, other=0.0)
            # dpre = dh (1 - h^2),  db1 = sum_b dpre[b]
            dpre = dh * (1.0 - h * h)
            tl.store(buf.dpre + offsets, dpre, mask=mask)
            db1 += tl.sum(dpre, axis=0)
        tl.store(buf.db1 + p % C.R * C.H + unit, db1, mask=unit < C.H)


@triton.jit
def output_gradient_phase(p, s, buf, C: tl.constexpr):
    """dW2 = dlogits^T @ h of program p's units, summed over its rows."""
    zero, end = zero_of_step(s), rows_end(p, C)
    dlogits_ptr = dlogits_for(p, buf, C)
    for tile in range(p // C.R, C.TILES, C.G):
        unit = tile * C.BLOCK_H + (zero + tl.arange(0, C.BLOCK_H))
        for v0 in range(0, C.V, C.BLOCK_V):
            v = v0 + (zero + tl.arange(0, C.BLOCK_V))
            dw2 = tl.full((C.BLOCK_V, C.BLOCK_H), 0.0, tl.float32)
            for b0 in range(0, C.GROUP, C.BLOCK_B):
                b = p % C.R * C.GROUP + b0 + (zero + tl.arange(0, C.BLOCK_B))
                dlogits = tl.load(
                    dlogits_ptr + b[None, :] * C.V + v[:, None],
                    mask=(b[None, :] < end) & (v[:, None] < C.V),
                    other=0.0,
                )
                h = tl.load(
                    buf.hidden + b[:, None] * C.H + unit[None, :],
                    mask=(b[:, None] < end) & (unit[None, :] < C.H),
                    other=0.0,
                )
                # dW2 += dlogits^T @ h   (BLOCK_V, BLOCK_H)
                dw2 = dot(dlogits, h, dw2, C)
            mask = (v[:, None] < C.V) & (unit[None, :] < C.H)
            tl.store(buf.dw2 + (p % C.R * C.V + v[:, None]) * C.H + unit[None, :], dw2, mask=mask)


@triton.jit
def table_gradient_phase(p, s, buf, window, num_windows, C: tl.constexpr):
    """dtable[t, v] = sum of dpre[b] over program p's rows with x_bt = v, as one-hot products; in the table's place."""
    zero, end = zero_of_step(s), rows_end(p, C)
    for tile in range(p // C.R, C.TILES, C.G):
        unit = tile * C.BLOCK_H + (zero + tl.arange(0, C.BLOCK_H))
        for v0 in range(0, C.V, C.BLOCK_V):
            v = v0 + (zero + tl.arange(0, C.BLOCK_V))
            for t in range(C.T):
                acc = tl.full((C.BLOCK_V, C.BLOCK_H), 0.0, tl.float32)
                for b0 in range(0, C.GROUP, C.BLOCK_B):
                    b = p % C.R * C.GROUP + b0 + (zero + tl.arange(0, C.BLOCK_B))
                    token = tl.load(buf.tape + window_starts(window, b, num_windows, C) + t).to(tl.int32)
                    mask = (b[:, None] < end) & (unit[None, :] < C.H)
                    dpre = tl.load(buf.dpre + b[:, None] * C.H + unit[None, :], mask=mask, other=0.0)
                    # dtable[t] += onehot(x_t)^T @ dpre   (BLOCK_V, BLOCK_H)
                    acc = dot_one_hot(one_hot(v, token), dpre, acc, C)
                store_table_gradient(t, v, unit, acc, p, buf, C)
    tl.debug_barrier()


@triton.jit
def one_hot(v, token):
    """1 where a row's token is v, (V, B)."""
    return tl.where(v[:, None] == token[None, :], 1.0, 0.0)


@triton.jit
def store_table_gradient(t, v, unit, gradient, p, buf, C: tl.constexpr):
    """Stores dtable[t] of these tokens and units, summed over program p's rows."""
    mask = (v[:, None] < C.V) & (unit[None, :] < C.H)
    table = buf.table + p % C.R * (C.T * C.V * C.H)
    tl.store(table + (t * C.V + v[:, None]) * C.H + unit[None, :], gradient, mask=mask)


@triton.jit
def row_gradients_phase(p, s, buf, window, num_windows, C: tl.constexpr, T: tl.constexpr):
    """What the phases from softmax to here do, in one pass over program p's rows: dlogits and dpre stay on chip."""
    zero, end = zero_of_step(s), rows_end(p, C)
    unit = p // C.R * C.BLOCK_H + (zero + tl.arange(0, C.BLOCK_H))
    v = zero + tl.arange(0, C.BLOCK_V)
    in_w2 = (v[:, None] < C.V) & (unit[None, :] < C.H)
    weight = tl.load(buf.state + C.W2_OFFSET + v[:, None] * C.H + unit[None, :], mask=in_w2, other=0.0)
    db1 = tl.full((C.BLOCK_H,), 0.0, tl.float32)
    dw2 = tl.full((C.BLOCK_V, C.BLOCK_H), 0.0, tl.float32)
    dtable = ()
    for _ in tl.static_range(T):
        dtable += (tl.full((C.BLOCK_V, C.BLOCK_H), 0.0, tl.float32),)
    for b0 in range(0, C.GROUP, C.BLOCK_B):
        b = p % C.R * C.GROUP + b0 + (zero + tl.arange(0, C.BLOCK_B))
        mask = (b[:, None] < end) & (unit[None, :] < C.H)
        h = tl.load(buf.hidden + b[:, None] * C.H + unit[None, :], mask=mask, other=0.0)
        start = window_starts(window, b, num_windows, C)
        tokens = ()
        for t in tl.static_range(T):
            tokens += (tl.load(buf.tape + start + t).to(tl.int32),)
        dlogits, offsets, mask = softmax_block(b, end, p < C.R, s, buf, window, num_windows, C)
        tl.store(buf.dlogits + offsets, dlogits, mask=mask & (p < C.R))
        dlogits = tl.where(b[:, None] < end, dlogits, 0.0)
        # dpre = (dlogits @ W2) (1 - h^2),  db1 = sum_b dpre[b],  dW2 = dlogits^T @ h
        dpre = dot(dlogits, weight, tl.full((C.BLOCK_B, C.BLOCK_H), 0.0, tl.float32), C) * (1.0 - h * h)
        db1 += tl.sum(dpre, axis=0)
        dw2 = dot(tl.trans(dlogits), h, dw2, C)
        added = ()
        for t in tl.static_range(T):
            # dtable[t] += onehot(x_t)^T @ dpre   (BLOCK_V, BLOCK_H)
            added += (dot_one_hot(one_hot(v, tokens[t]), dpre, dtable[t], C),)
        dtable = added
    tl.store(buf.db1 + p % C.R * C.H + unit, db1, mask=unit < C.H)
    tl.store(buf.dw2 + (p % C.R * C.V + v[:, None]) * C.H + unit[None, :], dw2, mask=in_w2)
    for t in tl.static_range(T):
        store_table_gradient(t, v, unit, dtable[t], p, buf, C)


@triton.jit
def sum_of_parts(ptr, offsets, SIZE: tl.constexpr, mask, R: tl.constexpr):
    """The sum of R partial sums, each SIZE numbers behind the last, in their order."""
    total = tl.load(ptr + offsets, mask=mask, other=0.0)
    for r in tl.static_range(1, R):
        total += tl.load(ptr + r * SIZE + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def hidden_bias_gradient(unit, buf, C: tl.constexpr):
    """db1 of these units."""
    return sum_of_parts(buf.db1, unit, C.H, unit < C.H, C.R)


@triton.jit
def output_weight_gradient(v, unit, buf, C: tl.constexpr):
    """dW2 of these rows and columns."""
    mask = (v[:, None] < C.V) & (unit[None, :] < C.H)
    return sum_of_parts(buf.dw2, v[:, None] * C.H + unit[None, :], C.V * C.H, mask, C.R)


@triton.jit
def output_weight_phase(p, s, buf, C: tl.constexpr):
    """The update of b1, and of program p's share of the rows of W2."""
    zero = zero_of_step(s)
    for tile in range(p // C.R, C.TILES, C.G):
        unit = tile * C.BLOCK_H + (zero + tl.arange(0, C.BLOCK_H))
        if p % C.R == 0:
            db1 = hidden_bias_gradient(unit, buf, C)
            adamw_at(buf.state + C.B1_OFFSET, C.PLANE, unit, unit < C.H, db1, buf.scalars + 3 * s, REPLICATED=True)
        for v0 in range(0, C.SHARE_V, C.BLOCK_W):
            share = v0 + (zero + tl.arange(0, C.BLOCK_W))
            v = p % C.R * C.SHARE_V + share
            mask = (share[:, None] < C.SHARE_V) & (v[:, None] < C.V) & (unit[None, :] < C.H)
            dw2 = output_weight_gradient(v, unit, buf, C)
            offsets = v[:, None] * C.H + unit[None, :]
            w2 = adamw_at(
                buf.state + C.W2_OFFSET, C.PLANE, offsets, mask, dw2, buf.scalars + 3 * s,
                REPLICATED=32 * C.num_warps > C.BLOCK_W * C.BLOCK_H,
            )  # fmt: skip
            tl.store(buf.w2t + unit[None, :] * C.V + v[:, None], w2, mask=mask)


@triton.jit
def table_gradient(t, v, unit, buf, C: tl.constexpr):
    """dtable[t] of these tokens and units."""
    mask = (v < C.V) & (unit < C.H)
    return sum_of_parts(buf.table, (t * C.V + v) * C.H + unit, C.T * C.V * C.H, mask, C.R)


@triton.jit
def embedding_gradient_phase(p, s, buf, C: tl.constexpr):
    """Adds program p's part of dwte to the sum of step s. Clears the other sum."""
    if p % C.R * C.SHARE_E < C.E:
        add_embedding_gradient(p, s, buf, C)
    clear_sum(p, buf.dwte + ((s + 1) % 2) * (C.V * C.E), C.V * C.E, C)
    tl.debug_barrier()  # W1 was read by all threads before any of them updates it


@triton.jit
def add_embedding_gradient(p, s, buf, C: tl.constexpr):
    """Adds sum_t dtable[t] @ W1[:, t] over program p's units, in its columns, to the sum of dwte of step s."""
    zero = zero_of_step(s)
    sum_ptr = buf.dwte + (s % 2) * (C.V * C.E)
    for v0 in range(0, C.V, C.BLOCK_V):
        v = v0 + (zero + tl.arange(0, C.BLOCK_V))
        for e0 in range(0, C.SHARE_E, C.BLOCK_S):
            e = p % C.R * C.SHARE_E + e0 + (zero + tl.arange(0, C.BLOCK_S))
            acc = tl.full((C.BLOCK_V, C.BLOCK_S), 0.0, tl.float32)
            for tile in range(p // C.R, C.TILES, C.G):
                unit = tile * C.BLOCK_H + (zero + tl.arange(0, C.BLOCK_H))
                for t in range(C.T):
                    dtable = table_gradient(t, v[:, None], unit[None, :], buf, C)
                    weight = tl.load(
                        buf.state + C.W1_OFFSET + unit[:, None] * (C.T * C.E) + t * C.E + e[None, :],
                        mask=(unit[:, None] < C.H) & (e[None, :] < C.E),
                        other=0.0,
                    )
                    # dwte += dtable[t] @ W1[:, t]   (BLOCK_V, BLOCK_S)
                    acc = dot(dtable, weight, acc, C)
            mask = (v[:, None] < C.V) & (e[None, :] < C.E)
            add_to_sum(sum_ptr, v[:, None] * C.E + e[None, :], mask, acc, buf.fault + 1, DWTE_SCALE, DWTE_LIMIT, C)


@triton.jit
def hidden_weight_gradient(t, unit, e, s, wte, buf, C: tl.constexpr):
    """dW1[:, t] = dtable[t]^T @ wte of these units and columns."""
    zero = zero_of_step(s)
    dw1 = tl.full((unit.shape[0], e.shape[0]), 0.0, tl.float32)
    for v0 in range(0, C.V, C.BLOCK_V):
        v = v0 + (zero + tl.arange(0, C.BLOCK_V))
        dtable = table_gradient(t, v[None, :], unit[:, None], buf, C)
        rows = tl.load(wte + v[:, None] * C.E + e[None, :], mask=(v[:, None] < C.V) & (e[None, :] < C.E), other=0.0)
        # dW1[:, t] += dtable[t]^T @ wte   (units, columns)
        dw1 = dot(dtable, rows, dw1, C)
    return dw1


@triton.jit
def hidden_weight_phase(p, s, buf, C: tl.constexpr):
    """The gradient and update of W1's rows, in program p's share of their columns."""
    zero = zero_of_step(s)
    wte = buf.replicas + p * (3 * C.V * C.E)
    for tile in range(p // C.R, C.TILES, C.G):
        unit = tile * C.BLOCK_H + (zero + tl.arange(0, C.BLOCK_H))
        for t in range(C.T):
            for e0 in range(0, C.SHARE_E, C.BLOCK_S):
                e = p % C.R * C.SHARE_E + e0 + (zero + tl.arange(0, C.BLOCK_S))
                dw1 = hidden_weight_gradient(t, unit, e, s, wte, buf, C)
                offsets = unit[:, None] * (C.T * C.E) + t * C.E + e[None, :]
                mask = (unit[:, None] < C.H) & (e[None, :] < C.E)
                w1 = adamw_at(buf.state + C.W1_OFFSET, C.PLANE, offsets, mask, dw1, buf.scalars + 3 * s)
                tl.store(buf.w1t + (t * C.E + e[None, :]) * C.H + unit[:, None], w1, mask=mask)


@triton.jit
def load_w1(first, unit, e, buf, C: tl.constexpr, T: tl.constexpr):
    """W1 and its moments, three tensors (units, e) for each of T positions from `first`."""
    w1 = ()
    for t in tl.static_range(T):
        offsets = unit[:, None] * (C.T * C.E) + (first + t) * C.E + e[None, :]
        mask = (unit[:, None] < C.H) & (e[None, :] < C.E)
        w1 += (load_three(buf.state + C.W1_OFFSET, C.PLANE, offsets, mask),)
    return w1


@triton.jit
def update_w1(w1, dwte, first, unit, e, p, s, buf, C: tl.constexpr, T: tl.constexpr):
    """W1 and its moments at these positions, units and columns after AdamW, and dwte + sum_t dtable[t] @ W1[:, t].

    dtable is loaded once, and before any of W1 is stored, so that the loads need not wait for each other.
    """
    zero = zero_of_step(s)
    v = zero + tl.arange(0, C.BLOCK_V)
    mask = (v[:, None] < C.V) & (e[None, :] < C.E)
    wte = tl.load(buf.replicas + p * (3 * C.V * C.E) + v[:, None] * C.E + e[None, :], mask=mask, other=0.0)
    dtable = ()
    for t in tl.static_range(T):
        dtable += (table_gradient(first + t, v[:, None], unit[None, :], buf, C),)
    new = ()
    for t in tl.static_range(T):
        # dwte += dtable[t] @ W1[:, t],  dW1[:, t] = dtable[t]^T @ wte
        dwte = dot(dtable[t], w1[t][0], dwte, C)
        dw1 = dot(tl.trans(dtable[t]), wte, tl.full((unit.shape[0], e.shape[0]), 0.0, tl.float32), C)
        offsets = unit[:, None] * (C.T * C.E) + (first + t) * C.E + e[None, :]
        mask = (unit[:, None] < C.H) & (e[None, :] < C.E)
        three = adamw_of(w1[t], dw1, buf.state + C.W1_OFFSET, offsets, mask, buf.scalars + 3 * s)
        tl.store(buf.w1t + ((first + t) * C.E + e[None, :]) * C.H + unit[:, None], three[0], mask=mask)
        new += (three,)
    return new, dwte


@triton.jit
def store_w1_moments(w1, first, unit, e, buf, C: tl.constexpr, T: tl.constexpr):
    """Stores both moments of W1 at these positions, units and columns."""
    for t in tl.static_range(T):
        offsets = unit[:, None] * (C.T * C.E) + (first + t) * C.E + e[None, :]
        store_moments(w1[t], buf.state + C.W1_OFFSET, C.PLANE, offsets, (unit[:, None] < C.H) & (e[None, :] < C.E))


@triton.jit
def add_dwte(dwte, e, s, buf, C: tl.constexpr):
    """Adds a program's part of dwte, of the columns e, to the sum of step s."""
    v = zero_of_step(s) + tl.arange(0, C.BLOCK_V)
    sum_ptr = buf.dwte + (s % 2) * (C.V * C.E)
    mask = (v[:, None] < C.V) & (e[None, :] < C.E)
    add_to_sum(sum_ptr, v[:, None] * C.E + e[None, :], mask, dwte, buf.fault + 1, DWTE_SCALE, DWTE_LIMIT, C)


@triton.jit
def first_layer_phase(p, s, buf, C: tl.constexpr):
    """embedding_gradient_phase and hidden_weight_phase in one pass over dtable, for a vocabulary in one block."""
    zero = zero_of_step(s)
    for e0 in range(0, C.SHARE_E if p % C.R * C.SHARE_E < C.E else 0, C.BLOCK_S):
        e = p % C.R * C.SHARE_E + e0 + (zero + tl.arange(0, C.BLOCK_S))
        dwte = tl.full((C.BLOCK_V, C.BLOCK_S), 0.0, tl.float32)
        for i in range(0, C.OWNED):
            unit = (p // C.R + i * C.G) * C.BLOCK_H + (zero + tl.arange(0, C.BLOCK_H))
            for t in range(0, C.T, C.T_AHEAD):
                w1 = load_w1(t, unit, e, buf, C, C.T_AHEAD)
                w1, dwte = update_w1(w1, dwte, t, unit, e, p, s, buf, C, C.T_AHEAD)
                store_w1_moments(w1, t, unit, e, buf, C, C.T_AHEAD)
        add_dwte(dwte, e, s, buf, C)
    clear_sum(p, buf.dwte + ((s + 1) % 2) * (C.V * C.E), C.V * C.E, C)


@triton.jit
def forward_phase(p, s, buf, window, num_windows, C: tl.constexpr):
    """From the parameters to the sum of the logits."""
    if not C.gather:
        table_phase(p, s, buf, C)
    hidden_phase(p, s, buf, window, num_windows, C)


@triton.jit
def gradient_phase(p, s, buf, window, num_windows, C: tl.constexpr):
    """From the sum of the logits to the gradients of b1, W2 and the table, each the sum over program p's rows."""
    if C.one_pass:
        row_gradients_phase(p, s, buf, window, num_windows, C, C.T)
    else:
        if not C.rows:
            softmax_phase(p, s, buf, window, num_windows, C)
        output_phase(p, s, buf, C)
        output_gradient_phase(p, s, buf, C)
        tl.debug_barrier()  # dpre is read by other threads than wrote it
        table_gradient_phase(p, s, buf, window, num_windows, C)


@triton.jit
def update_phase(p, s, buf, C: tl.constexpr):
    """From gradients by groups of rows to the updated parameters but for wte, and the sum of dwte."""
    if p == C.R - 1:  # of the first tile's programs the one with the smallest share
        output_bias_phase(s, buf, C)
    output_weight_phase(p, s, buf, C)
    if C.whole:
        first_layer_phase(p, s, buf, C)
    else:
        embedding_gradient_phase(p, s, buf, C)
        hidden_weight_phase(p, s, buf, C)


# --- kernels of a step, PROGRAMS programs each ----------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_windows"])
def forward_kernel(buf, num_windows, C: tl.constexpr, UPDATE: tl.constexpr):
    """The forward phase of the next step; with UPDATE, after the wte update of the step before it."""
    p = tl.program_id(0)
    s = tl.load(buf.clock)
    if UPDATE:
        embedding_phase(p, s - 1, buf, C)
    forward_phase(p, s, buf, window_of_step(s, num_windows, C), num_windows, C)
    if p == 0:
        # No kernel writes the word that it reads, so no program can see the clock move.
        tl.store(buf.clock + 1, s)


@triton.jit(do_not_specialize=["num_windows"])
def softmax_kernel(buf, num_windows, C: tl.constexpr):
    """The softmax phase by rows."""
    s = tl.load(buf.clock + 1)
    softmax_phase(tl.program_id(0), s, buf, window_of_step(s, num_windows, C), num_windows, C)


@triton.jit(do_not_specialize=["num_windows"])
def backward_kernel(buf, num_windows, C: tl.constexpr):
    """The gradients and, where there is one group of rows, the updates."""
    p = tl.program_id(0)
    s = tl.load(buf.clock + 1)
    gradient_phase(p, s, buf, window_of_step(s, num_windows, C), num_windows, C)
    if C.R == 1:
        update_phase(p, s, buf, C)
        if p == 0:
            tl.store(buf.clock, s + 1)


@triton.jit
def update_kernel(buf, C: tl.constexpr):
    """The updates, where the gradients are those of several groups of rows."""
    p = tl.program_id(0)
    s = tl.load(buf.clock + 1)
    update_phase(p, s, buf, C)
    if p == 0:
        tl.store(buf.clock, s + 1)


@triton.jit
def embedding_kernel(buf, C: tl.constexpr):
    """The wte update of the last step done."""
    embedding_phase(tl.program_id(0), tl.load(buf.clock) - 1, buf, C)


# --- launchers -----------------------------------------------------------------------------------------------------


def check_sizes(B: int, V: int, T: int, E: int, H: int) -> None:
    """Raises ValueError, naming triton-op, where a size lies outside of what these kernels take."""
    sizes = {"B": (B, MAX_B), "V": (V, MAX_V), "T": (T, MAX_T), "E": (E, MAX_E), "H": (H, MAX_H)}
    for name, (size, most) in sizes.items():
        if not 1 <= size <= most:
            raise ValueError(f"the step kernels take {name} from 1 to {most} (got {size}); triton-op takes any")


def check_tape(tokens: int) -> None:
    """Raises ValueError, naming triton-op, where windows of so long a tape have numbers past 32 bits."""
    if tokens > 2**31 - 2 * MAX_B:
        raise ValueError(
            f"the step kernels take tapes of up to {2**31 - 2 * MAX_B} tokens (got {tokens}); triton-op any"
        )


def default_config(
    B: int, V: int, T: int, E: int, H: int, *, precision: str = "fp32", deterministic: bool = True,
    processors: int = DEFAULT_PROGRAMS,
) -> StepConfig:  # fmt: skip
    """The configuration for these sizes: tiles that spill no register, or, in the interpreter, few large ones.

    The softmax becomes a phase of its own where doing it G times would take longer than a launch or a grid barrier.

    Args:
        processors: the device's multiprocessors. A program takes one for itself, so there are no more programs; on a
            device with fewer multiprocessors than tiles of hidden units, as slices of an A100 are, each has several.
    """
    arithmetic = input_precision(precision)
    rows = B * V > 8192
    if interpreting():
        # The interpreter's time is a price per operation, whatever its size: one program, one tile of everything.
        return StepConfig(
            B, V, T, E, H, 1, _block(B, MAX_B), _block(V, MAX_V), _block(E, MAX_E), _block(H, MAX_H),
            arithmetic, deterministic, rows,
        )  # fmt: skip
    block_h = 16
    programs = min(DEFAULT_PROGRAMS, processors, -(-H // block_h))
    groups = max(1, min(MAX_GROUPS, processors // programs, B // 32))
    # One block for a small group's rows: its loads are all under way at once. Larger models lack the registers for it.
    block_b = _block(-(-B // groups), 64 if groups > 1 and 64 * groups >= B and V <= 32 and E <= 128 else 32)
    # Blocks of 16 fit E = 48 better; tf32x3 would have more operands to split for them.
    block_e = _block(E, 16 if V > 32 or (E % 32 and (groups > 1 or arithmetic == "ieee")) else 32)
    config = StepConfig(
        B, V, T, E, H, programs, block_b, _block(V, 32), block_e, block_h, arithmetic, deterministic, rows, R=groups
    )
    return replace(config, ahead=config.operand_bytes(T) <= SHARED_BYTES)


def _block(size: int, most: int) -> int:
    return max(16, min(triton.next_power_of_2(size), most))


class TrainStep:
    """A model in training on one device: its buffers, and the launches that move it from step to step.

    Args:
        config: sizes and tiles, as from default_config().
        tape: (n,), integer, n > T: the training tokens, each in 0..V-1.
        scalars: (N, 3), float32: decay factor 1 - lr*wd, step size lr / (1 - beta1^(s+1)) and sqrt(1 - beta2^(s+1)) of
            every step s.

    Attributes:
        launches: kernel launches so far; a captured launch counts once, when it is captured.

    Raises:
        ValueError: a size is out of range, or the tape is too short.
    """

    def __init__(self, config: StepConfig, tape: Tensor, scalars: Tensor) -> None:
        C = config
        check_sizes(C.B, C.V, C.T, C.E, C.H)
        if not 1 <= C.G <= MAX_PROGRAMS:
            raise ValueError(f"the number of programs must lie in 1..{MAX_PROGRAMS} (got {C.G})")
        check_tape(len(tape))
        if len(tape) <= C.T:
            raise ValueError(f"the tape has {len(tape)} tokens: too few for one window of {C.T} and its target")
        self.num_windows = len(tape) - C.T
        # A row's window wraps round at most once where there are as many windows as rows, with those of padding.
        rows = C.R * C.GROUP + max(C.BLOCK_B, C.BLOCK_R)
        self.config = replace(C, short_tape=self.num_windows < rows)
        self.launches = 0
        self.buffers = self._allocate(tape, scalars)

    def _allocate(self, tape: Tensor, scalars: Tensor) -> Buffers:
        C, device = self.config, tape.device
        sum_type = torch.int64 if C.deterministic else torch.float32

        def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        return Buffers(
            tape=tape,
            scalars=scalars.to(device).contiguous(),
            clock=empty(2, dtype=torch.int64),
            losses=empty(len(scalars)),
            state=empty(3, C.PLANE),
            w1t=empty(C.T * C.E, C.H),
            w2t=empty(C.H, C.V),
            replicas=empty(C.PROGRAMS, 3, C.V, C.E),
            table=empty(C.R, C.T, C.V, C.H),
            dw2=empty(C.R, C.V, C.H),
            db1=empty(C.R, C.H),
            hidden=empty(C.B, C.H),
            dpre=empty(C.B, C.H),
            logits=empty(2, C.B, C.ROW, dtype=sum_type),
            dlogits=empty(C.B, C.V) if C.rows or C.one_pass else empty(C.G, C.B, C.V),
            row_losses=empty(C.B),
            dwte=empty(2, C.V, C.E, dtype=sum_type),
            fault=empty(2, dtype=torch.int32),
        )

    def planes(self) -> list[list[Tensor]]:
        """Views of the parameters, their first and their second moments: three lists of wte, W1, b1, W2, b2."""
        C, buf = self.config, self.buffers
        planes = []
        for k in range(3):
            plane = buf.state[k]
            w1 = plane[C.W1_OFFSET : C.W1_OFFSET + C.H * C.T * C.E].view(C.H, C.T * C.E)
            w2 = plane[C.W2_OFFSET : C.W2_OFFSET + C.V * C.H].view(C.V, C.H)
            b1, b2 = plane[C.B1_OFFSET : C.B1_OFFSET + C.H], plane[C.B2_OFFSET : C.B2_OFFSET + C.V]
            planes.append([buf.replicas[0, k], w1, b1, w2, b2])
        return planes

    def load(self, planes: Sequence[Sequence[Tensor]], step: int) -> None:
        """Copies in parameters and moments, ordered as in planes(), and the number of the next step."""
        for held, given in zip(self.planes(), planes, strict=True):
            for target, source in zip(held, given, strict=True):
                target.copy_(source)
        buf = self.buffers
        buf.replicas[1:] = buf.replicas[0]
        _, w1, _, w2, _ = self.planes()[0]
        buf.w1t.copy_(w1.T)
        buf.w2t.copy_(w2.T)
        buf.logits.zero_()
        buf.dwte.zero_()
        buf.fault.zero_()
        buf.clock.fill_(step)

    def run(self, steps: int) -> None:
        """Enqueues so many steps: config.exchanges launches each, two to four, and one more at the end.

        It neither waits nor reads the device, so it can be captured in a CUDA graph. The losses come to stand in
        buffers.losses at the numbers of the steps; the caller sees to it that these stay below N.
        """
        if steps < 1:
            return
        C, buf = self.config, self.buffers
        grid, options = (C.PROGRAMS,), {"num_warps": C.num_warps, "num_stages": 1, "maxnreg": MAX_REGISTERS}
        for i in range(steps):
            forward_kernel[grid](buf, self.num_windows, C, UPDATE=i > 0, **options)
            if C.rows:
                softmax_kernel[grid](buf, self.num_windows, C, **options)
            backward_kernel[grid](buf, self.num_windows, C, **options)
            if C.R > 1:
                update_kernel[grid](buf, C, **options)
        embedding_kernel[grid](buf, C, **options)
        self.launches += steps * C.exchanges + 1


def shipped_launches(launcher, config_on):
    """Two recorded steps of a launcher: the default model in every precision, with fast sums, in a batch that has the
    softmax by rows, and the largest of everything; a configuration that several devices have comes once.

    Args:
        config_on: a device's compute capability and multiprocessors -> default_config() for it.
    """
    from ._aot import CAPABILITIES, PROCESSORS, recorded

    default, many, largest = (128, 27, 3, 48, 512), (1024, 27, 3, 48, 512), (MAX_B, MAX_V, MAX_T, MAX_E, MAX_H)
    wide = (128, 27, 3, 128, 512)
    cases = [(default, precision, True) for precision in INPUT_PRECISION]
    cases += [(default, "fp32", False), (many, "fp32", True), (largest, "fp32", True), (wide, "fp32", True)]
    tape, scalars = torch.empty(10_007, dtype=torch.int32, device="meta"), torch.empty(1000, 3, device="meta")
    different = {}
    for capability in CAPABILITIES:
        for sizes, precision, deterministic in cases:
            # Of large sizes each architecture has one number of programs.
            default_config = config_on(capability, PROCESSORS[90 if sizes in (many, largest) else capability])
            with recorded(precision) as launches:
                launcher(default_config(*sizes, precision=precision, deterministic=deterministic), tape, scalars).run(2)
            for launch in launches:
                if capability in launch.capabilities:
                    different.setdefault(launch.key, (launch, {}))[1][capability] = True
    for launch, capabilities in different.values():
        yield replace(launch, capabilities=tuple(capabilities))


def shipped():
    """See _aot."""
    yield from shipped_launches(TrainStep, lambda _, processors: partial(default_config, processors=processors))
