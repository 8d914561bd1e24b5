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
from ._math import dot, tanh
from ._runtime import INPUT_PRECISION, MAX_REGISTERS, CompileTimeConfig, input_precision, interpreting
from ._tile import block_size, flat, load_tile, store_tile, tile, transposed_tile, vector
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
        return min(triton.next_power_of_2(self.SHARE_V), self.BLOCK_V)

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
        return block_size(self.V, MAX_V)

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
    def PIECES_AHEAD(self) -> int:
        """Pieces that are loaded before the first of them is updated."""
        return min(4, -(-self.V * self.E // self.PIECE))

    @property
    def ROW(self) -> int:
        """Length of a row of the sum of the logits: V, padded so that several numbers are loaded at once."""
        return -(-self.V // 4) * 4


class Buffers(NamedTuple):
    """Pointers of a step, on one device. `sum` is int64 (deterministic) or float32 (fast)."""

    tape: Tensor  # (n,), integer: the tokens
    scalars: Tensor  # (N, 3), float32: decay factor, step size and root of the second bias correction by step
    clock: Tensor  # (2,), int64: the next step, written by the backward kernel; the same for it, by the forward kernel
    losses: Tensor  # (N,), float32: the batch loss of every step
    w1: Tensor  # (3, H, T*E), float32: W1 and its two moments
    b1: Tensor  # (3, H), float32: the same of b1
    w2: Tensor  # (3, V, H), float32
    b2: Tensor  # (3, VP), float32: V of them, padded so that the moments are aligned
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
def block(first, SIZE: tl.constexpr, s):
    """The SIZE indices from `first` on, int32.

    s >> 62 is always 0, but it makes addresses depend on the step s. So the compiler of the persistent kernel cannot
    compute the addresses of all phases before its loop over steps, where they would fill the registers and spill.
    """
    zero = tl.multiple_of((s >> 62).to(tl.int32), 16)
    return first + (zero + tl.arange(0, SIZE))


@triton.jit
def units(n, s, C: tl.constexpr):
    """The hidden units of tile n; program p has the tiles p // R, p // R + G, ..."""
    return block(n * C.BLOCK_H, C.BLOCK_H, s)


@triton.jit
def group_rows(first, SIZE: tl.constexpr, p, s, C: tl.constexpr):
    """SIZE batch rows of program p's group, from number `first` of the group on, and the row where the group ends."""
    # b = (p mod R) GROUP + first + 0, 1, ...;  end = min((p mod R + 1) GROUP, B)
    begin = p % C.R * C.GROUP
    return block(begin + first, SIZE, s), tl.minimum(begin + C.GROUP, C.B)


@triton.jit
def replica_of(p, buf, C: tl.constexpr):
    """Program p's replica of wte, (V, E); its moments lie one and two planes further."""
    return buf.replicas + p * (3 * C.V * C.E)


@triton.jit
def tables_of(p, buf, C: tl.constexpr):
    """The tables of program p's group, (T, V, H), later their gradient, summed over its rows."""
    return buf.table + p % C.R * (C.T * C.V * C.H)


@triton.jit
def table_tile(t, v, unit, C: tl.constexpr):
    """Tokens and units of table[t], of tables (T, V, H)."""
    return tile(v, unit, C.V, C.H, first=t * C.V * C.H)


@triton.jit
def w1_tile(t, unit, e, C: tl.constexpr):
    """Units and numbers of the embedding of W1[:, t], (H, E); W1 is (H, T*E)."""
    return tile(unit, e, C.H, C.E, C.T * C.E, first=t * C.E)


@triton.jit
def w1t_tile(t, e, unit, C: tl.constexpr):
    """The transposed of these, in `w1t`, (T*E, H)."""
    return tile(e, unit, C.E, C.H, first=t * C.E * C.H)


@triton.jit
def store_w1t(w1, t, unit, e, buf, C: tl.constexpr):
    """Stores new numbers of W1[:, t], (units, e), in `w1t` too."""
    store_tile(buf.w1t, transposed_tile(e, unit, C.E, C.H, first=t * C.E * C.H), w1)


@triton.jit
def dlogits_of(p, buf, C: tl.constexpr):
    """The dlogits, (B, V), that program p works on: with `rows` and in one pass the only ones, else its tile's."""
    if C.rows or C.one_pass:
        return buf.dlogits
    else:
        return buf.dlogits + p // C.R * (C.B * C.V)


@triton.jit
def window_of_step(s, num_windows, C: tl.constexpr):
    """The number of the first window of step s, int32."""
    # window = (s B) mod num_windows
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
def tokens_at(start, t, buf):
    """x_bt: the tokens at position t of the windows that begin at `start`; the targets are at position T."""
    return tl.load(buf.tape + start + t).to(tl.int32)


@triton.jit
def load_three(ptr, PLANE: tl.constexpr, at):
    """A tile of parameters and of their two moments, which lie one and two planes further."""
    at = flat(at)
    return load_tile(ptr, at), load_tile(ptr + PLANE, at), load_tile(ptr + 2 * PLANE, at)


@triton.jit
def update_three(three, grad, ptr, PLANE: tl.constexpr, at, s, buf):
    """AdamW of what load_three() has loaded there, with the scalars of step s; stores it, returns the parameters."""
    scalars = buf.scalars + 3 * s
    decay, step_size, root = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    # param, m, v = AdamW(param, grad, m, v), adamw.py
    param, m, v = adamw_update(three[0], grad, three[1], three[2], decay, step_size, root, BETA1, BETA2, EPS)
    at = flat(at)
    store_tile(ptr, at, param)
    store_tile(ptr + PLANE, at, m)
    store_tile(ptr + 2 * PLANE, at, v)
    return param


@triton.jit
def adamw_at(ptr, PLANE: tl.constexpr, at, grad, s, buf, C: tl.constexpr):
    """AdamW of a tile of parameters, whose moments lie one and two planes further; returns the new parameters."""
    three = load_three(ptr, PLANE, at)
    if grad.numel < 32 * C.num_warps:
        tl.debug_barrier()  # several threads load the same number: all have loaded before any of them stores
    return update_three(three, grad, ptr, PLANE, at, s, buf)


@triton.jit
def add_to_sum(value, sum_ptr, at, fault_ptr, SCALE: tl.constexpr, LIMIT: tl.constexpr, C: tl.constexpr):
    """Adds a tile to a sum across programs."""
    offsets, mask = at[0] + at[1], at[2]
    if C.deterministic:
        fits = tl.abs(value) < LIMIT  # false for NaN as well
        tl.store(fault_ptr + tl.zeros_like(offsets), 1, mask=mask & (fits == 0))
        # sum += int64(value * SCALE)
        fixed = (tl.where(fits, value, 0.0) * SCALE).to(tl.int64)
        tl.atomic_add(sum_ptr + offsets, fixed, mask=mask, sem="relaxed")
    else:
        tl.atomic_add(sum_ptr + offsets, value, mask=mask, sem="relaxed")


@triton.jit
def read_sum(sum_ptr, at, fault_ptr, SCALE: tl.constexpr, C: tl.constexpr):
    """A tile of a finished sum, fp32."""
    offsets, mask = at[0] + at[1], at[2]
    if C.deterministic:
        fault = tl.load(fault_ptr)
        # value = sum / SCALE
        value = tl.load(sum_ptr + offsets, mask=mask, other=0).to(tl.float32) * (1.0 / SCALE)
        return tl.where(fault != 0, float("nan"), value)
    else:
        return tl.load(sum_ptr + offsets, mask=mask, other=0)


@triton.jit
def sum_of(ptr, SIZE: tl.constexpr, s):
    """The buffer, SIZE numbers, that a sum across programs has for step s: two are used in turns."""
    return ptr + (s % 2) * SIZE


@triton.jit
def clear_sum(sum_ptr, SIZE: tl.constexpr, p, C: tl.constexpr):
    """Clears a sum for its next use; the programs share the work."""
    # sum = 0, in blocks p, p + PROGRAMS, ... of 1,024 numbers
    for first in range(p * 1024, SIZE, C.PROGRAMS * 1024):
        offsets = first + tl.arange(0, 1024)
        tl.store(sum_ptr + offsets, tl.zeros((1024,), sum_ptr.dtype.element_ty), mask=offsets < SIZE)


@triton.jit
def sum_of_parts(ptr, SIZE: tl.constexpr, at, C: tl.constexpr):
    """A tile of the sum of the R groups' partial sums, SIZE numbers each, added in their order."""
    R: tl.constexpr = C.R
    at = flat(at)
    # total = part[0] + ... + part[R - 1]
    total = load_tile(ptr, at)
    for r in tl.static_range(1, R):
        total += load_tile(ptr + r * SIZE, at)
    return total


@triton.jit
def add_rows_by_token(acc, v, tokens, x, C: tl.constexpr):
    """acc[v] + the sum of the rows x[b] whose token is v, as a product with a one-hot matrix.

    That matrix is exact in TF32, so only x is split: two products where tf32x3 takes three.
    """
    # acc[v] += sum of x[b] over the b with tokens[b] = v   (BLOCK_V, BLOCK_H)
    ones = tl.where(v[:, None] == tokens[None, :], 1.0, 0.0)
    if C.precision == "tf32x3":
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # the 10 mantissa bits of TF32
        acc = tl.dot(ones, x - high, acc, input_precision="tf32")
        return tl.dot(ones, high, acc, input_precision="tf32")
    else:
        return dot(ones, x, acc, C.precision)


# --- phases, by the program's number p and the step's number s -----------------------------------------------------


@triton.jit
def embedding_phase(p, s, buf, C: tl.constexpr):
    """AdamW of program p's replica of wte with the finished gradient of step s."""
    AHEAD: tl.constexpr = C.PIECES_AHEAD
    wte = replica_of(p, buf, C)
    for first in range(0, C.V * C.E, AHEAD * C.PIECE):
        # All loads come before the first store, so that their latencies overlap.
        three, dwte = (), ()
        for i in tl.static_range(AHEAD):
            offsets = block(first + i * C.PIECE, C.PIECE, s)
            three += (load_three(wte, C.V * C.E, vector(offsets, C.V * C.E)),)
        for i in tl.static_range(AHEAD):
            offsets = block(first + i * C.PIECE, C.PIECE, s)
            # dwte, added up over all programs
            at = vector(offsets, C.V * C.E)
            dwte += (read_sum(sum_of(buf.dwte, C.V * C.E, s), at, buf.fault + 1, DWTE_SCALE, C),)
        for i in tl.static_range(AHEAD):
            offsets = block(first + i * C.PIECE, C.PIECE, s)
            # wte = AdamW(wte, dwte), in pieces of PIECE numbers
            update_three(three[i], dwte[i], wte, C.V * C.E, vector(offsets, C.V * C.E), s, buf)
    tl.debug_barrier()  # the first layer reads what other threads of the program wrote


@triton.jit
def table_phase(p, s, buf, C: tl.constexpr):
    """table[t, v] = wte[v] @ W1[:, t]^T for program p's units."""
    wte = replica_of(p, buf, C)
    for n in range(p // C.R, C.TILES, C.G):
        unit = units(n, s, C)
        for t in range(C.T):
            for v0 in range(0, C.V, C.BLOCK_V):
                v = block(v0, C.BLOCK_V, s)
                acc = tl.full((C.BLOCK_V, C.BLOCK_H), 0.0, tl.float32)
                for e0 in range(0, C.E, C.BLOCK_E):
                    e = block(e0, C.BLOCK_E, s)
                    rows = load_tile(wte, tile(v, e, C.V, C.E))
                    weight = load_tile(buf.w1t, w1t_tile(t, e, unit, C))
                    # table[t, v] += wte[v, e] @ W1[:, t, e]^T   (BLOCK_V, BLOCK_H)
                    acc = dot(rows, weight, acc, C.precision)
                store_tile(tables_of(p, buf, C), table_tile(t, v, unit, C), acc)
    tl.debug_barrier()


@triton.jit
def add_embeddings(acc, unit, start, first, T: tl.constexpr, p, s, buf, C: tl.constexpr):
    """acc + sum_t wte[x_t] @ W1[:, t]^T of these units, over T positions from `first`, for the windows at `start`.

    All loads come before all products, so that their latencies overlap.
    """
    BLOCKS: tl.constexpr = C.E_BLOCKS
    wte = replica_of(p, buf, C)
    tokens, rows, weights = (), (), ()
    for t in tl.static_range(T):
        tokens += (tokens_at(start, first + t, buf),)
    for t in tl.static_range(T):
        for i in tl.static_range(BLOCKS):
            e = block(i * C.BLOCK_E, C.BLOCK_E, s)
            # wte[x_t, e], (BLOCK_B, BLOCK_E), and W1[:, t, e]^T, (BLOCK_E, BLOCK_H)
            rows += (tl.load(wte + tokens[t][:, None] * C.E + e[None, :], mask=e[None, :] < C.E, other=0.0),)
            weights += (load_tile(buf.w1t, w1t_tile(first + t, e, unit, C)),)
    for i in tl.static_range(T * BLOCKS):
        # pre += wte[x_t, e] @ W1[:, t, e]^T   (BLOCK_B, BLOCK_H)
        acc = dot(rows[i], weights[i], acc, C.precision)
    return acc


@triton.jit
def hidden_block(unit, start, in_range, p, s, buf, C: tl.constexpr):
    """h of the rows whose windows begin at `start`, and of these units."""
    # pre = b1 + sum_t wte[x_t] @ W1[:, t]^T = b1 + sum_t table[t, x_t]   (BLOCK_B, BLOCK_H)
    bias = load_tile(buf.b1, vector(unit, C.H))
    pre = tl.full((C.BLOCK_B, C.BLOCK_H), 0.0, tl.float32) + bias[None, :]
    if C.gather and C.ahead:
        pre = add_embeddings(pre, unit, start, 0, C.T, p, s, buf, C)
    elif C.gather:
        for t in range(C.T):
            pre = add_embeddings(pre, unit, start, t, 1, p, s, buf, C)
    else:
        for t in range(C.T):
            # pre += table[t, x_t]
            row = t * C.V + tokens_at(start, t, buf)
            pre += load_tile(tables_of(p, buf, C), (row[:, None] * C.H, unit[None, :], in_range))
    # h = tanh(pre)
    return tanh(pre)


@triton.jit
def hidden_phase(p, s, buf, window, num_windows, C: tl.constexpr):
    """h of program p's units and rows; adds h @ W2^T to the logits of step s, the first tile's programs b2 as well."""
    logits_sum = sum_of(buf.logits, C.B * C.ROW, s)
    v = block(0, C.VP, s)
    # b2 enters the sum once, so 0 for the programs of other tiles   (VP,)
    bias = tl.load(buf.b2 + v, mask=(v < C.V) & (p < C.R), other=0.0)
    for b0 in range(0, C.GROUP, C.BLOCK_B):
        b, end = group_rows(b0, C.BLOCK_B, p, s, C)
        start = window_starts(window, b, num_windows, C)
        logits = tl.full((C.BLOCK_B, C.VP), 0.0, tl.float32) + bias[None, :]
        for i in range(0, C.OWNED):
            unit = units(p // C.R + i * C.G, s, C)
            weight = load_tile(buf.w2t, tile(unit, v, C.H, C.V))
            at = tile(b, unit, end, C.H)
            h = hidden_block(unit, start, at[2], p, s, buf, C)
            store_tile(buf.hidden, at, h)
            # logits += h @ W2^T over the tile   (BLOCK_B, VP)
            logits = dot(h, weight, logits, C.precision)
        # the sum over all tiles = h @ W2^T + b2
        add_to_sum(logits, logits_sum, tile(b, v, end, C.V, C.ROW), buf.fault, LOGITS_SCALE, LOGITS_LIMIT, C)
    # The programs have read the sum of the step before.
    clear_sum(sum_of(buf.logits, C.B * C.ROW, s + 1), C.B * C.ROW, p, C)


@triton.jit
def softmax_rows(b, end, first, p, s, buf, window, num_windows, C: tl.constexpr):
    """dlogits of these rows up to `end`, (rows, VP), which are stored as well; with `first` the losses too."""
    v = block(0, C.VP, s)
    # y[b] = x_bT, the token after the window
    target = tokens_at(window_starts(window, b, num_windows, C), C.T, buf)
    logits_sum = sum_of(buf.logits, C.B * C.ROW, s)
    logits = read_sum(logits_sum, tile(b, v, end, C.ROW), buf.fault, LOGITS_SCALE, C)
    logits = tl.where(v[None, :] < C.V, logits, float("-inf"))
    is_target = v[None, :] == target[:, None]
    # loss = log(sum_v exp(z_v)) - z_y,  z = logits - max_v logits   (rows,)
    shifted = logits - tl.max(logits, axis=1)[:, None]
    exponential = tl.exp(shifted)
    total = tl.sum(exponential, axis=1)
    losses = tl.log(total) - tl.sum(tl.where(is_target, shifted, 0.0), axis=1)
    tl.store(buf.row_losses + b, losses, mask=(b < end) & first)
    # dlogits = (exp(z) / sum_v exp(z_v) - onehot(y)) / B   (rows, VP)
    dlogits = (exponential * (1.0 / total)[:, None] - tl.where(is_target, 1.0, 0.0)) * (1.0 / C.B)
    at = tile(b, v, end, C.V)
    mask = at[2] & first if C.one_pass else at[2]
    store_tile(dlogits_of(p, buf, C), (at[0] + at[1], 0, mask), dlogits)
    return dlogits


@triton.jit
def softmax_phase(p, s, buf, window, num_windows, C: tl.constexpr):
    """Row losses and dlogits = (softmax(logits) - onehot(y)) / B: of program p's rows, once for each row.

    Without `rows`: of all rows of p's group, into a copy for p's tiles.
    """
    if C.rows:
        for b0 in range(p * C.BLOCK_R, C.B, C.PROGRAMS * C.BLOCK_R):
            softmax_rows(block(b0, C.BLOCK_R, s), C.B, True, p, s, buf, window, num_windows, C)
    else:
        for b0 in range(0, C.GROUP, C.BLOCK_R):
            b, end = group_rows(b0, C.BLOCK_R, p, s, C)
            softmax_rows(b, end, p < C.R, p, s, buf, window, num_windows, C)
    tl.debug_barrier()


@triton.jit
def output_bias_phase(s, buf, C: tl.constexpr):
    """The batch loss of step s, added in the order of the rows, and db2 with the update of b2; one program's share."""
    losses = tl.zeros((256,), tl.float32)
    for b0 in range(0, C.B, 256):
        b = block(b0, 256, s)
        # loss = sum_b row_losses[b] / B
        losses += load_tile(buf.row_losses, vector(b, C.B))
    tl.store(buf.losses + s, tl.sum(losses, axis=0) / C.B)

    v = block(0, C.VP, s)
    db2 = tl.full((C.VP,), 0.0, tl.float32)
    for b0 in range(0, C.B, C.BLOCK_D):
        b = block(b0, C.BLOCK_D, s)
        # db2 = sum_b dlogits[b]   (VP,)
        db2 += tl.sum(load_tile(buf.dlogits, tile(b, v, C.B, C.V)), axis=0)
    # b2 = AdamW(b2, db2)
    adamw_at(buf.b2, C.VP, vector(v, C.V), db2, s, buf, C)


@triton.jit
def output_phase(p, s, buf, C: tl.constexpr):
    """dpre = (dlogits @ W2) (1 - h^2) for program p's units and rows; their sums over the rows are db1's part."""
    dlogits_ptr = dlogits_of(p, buf, C)
    for n in range(p // C.R, C.TILES, C.G):
        unit = units(n, s, C)
        db1 = tl.full((C.BLOCK_H,), 0.0, tl.float32)
        for b0 in range(0, C.GROUP, C.BLOCK_B):
            b, end = group_rows(b0, C.BLOCK_B, p, s, C)
            dh = tl.full((C.BLOCK_B, C.BLOCK_H), 0.0, tl.float32)
            for v0 in range(0, C.V, C.BLOCK_V):
                v = block(v0, C.BLOCK_V, s)
                dlogits = load_tile(dlogits_ptr, tile(b, v, end, C.V))
                weight = load_tile(buf.w2, tile(v, unit, C.V, C.H))
                # dh += dlogits @ W2   (BLOCK_B, BLOCK_H)
                dh = dot(dlogits, weight, dh, C.precision)
            at = tile(b, unit, end, C.H)
            h = load_tile(buf.hidden, at)
            # dpre = dh (1 - h^2)   (BLOCK_B, BLOCK_H)
            dpre = dh * (1.0 - h * h)
            store_tile(buf.dpre, at, dpre)
            # db1 = sum_b dpre[b]   (BLOCK_H,)
            db1 += tl.sum(dpre, axis=0)
        tl.store(buf.db1 + p % C.R * C.H + unit, db1, mask=unit < C.H)


@triton.jit
def output_gradient_phase(p, s, buf, C: tl.constexpr):
    """dW2 = dlogits^T @ h of program p's units, summed over its rows."""
    dlogits_ptr = dlogits_of(p, buf, C)
    for n in range(p // C.R, C.TILES, C.G):
        unit = units(n, s, C)
        for v0 in range(0, C.V, C.BLOCK_V):
            v = block(v0, C.BLOCK_V, s)
            dw2 = tl.full((C.BLOCK_V, C.BLOCK_H), 0.0, tl.float32)
            for b0 in range(0, C.GROUP, C.BLOCK_B):
                b, end = group_rows(b0, C.BLOCK_B, p, s, C)
                dlogits = load_tile(dlogits_ptr, transposed_tile(b, v, end, C.V))
                h = load_tile(buf.hidden, tile(b, unit, end, C.H))
                # dW2 += dlogits^T @ h   (BLOCK_V, BLOCK_H)
                dw2 = dot(dlogits, h, dw2, C.precision)
            store_tile(buf.dw2, tile(v, unit, C.V, C.H, first=p % C.R * C.V * C.H), dw2)


@triton.jit
def table_gradient_phase(p, s, buf, window, num_windows, C: tl.constexpr):
    """dtable[t, v] = sum of dpre[b] over program p's rows with x_bt = v; in the table's place."""
    for n in range(p // C.R, C.TILES, C.G):
        unit = units(n, s, C)
        for v0 in range(0, C.V, C.BLOCK_V):
            v = block(v0, C.BLOCK_V, s)
            for t in range(C.T):
                dtable = tl.full((C.BLOCK_V, C.BLOCK_H), 0.0, tl.float32)
                for b0 in range(0, C.GROUP, C.BLOCK_B):
                    b, end = group_rows(b0, C.BLOCK_B, p, s, C)
                    tokens = tokens_at(window_starts(window, b, num_windows, C), t, buf)
                    dpre = load_tile(buf.dpre, tile(b, unit, end, C.H))
                    # dtable[t] += onehot(x_t)^T @ dpre   (BLOCK_V, BLOCK_H)
                    dtable = add_rows_by_token(dtable, v, tokens, dpre, C)
                store_tile(tables_of(p, buf, C), table_tile(t, v, unit, C), dtable)
    tl.debug_barrier()


@triton.jit
def row_gradients_phase(p, s, buf, window, num_windows, C: tl.constexpr):
    """What the phases from softmax to here do, in one pass over program p's rows: dlogits and dpre stay on chip."""
    T: tl.constexpr = C.T
    unit, v = units(p // C.R, s, C), block(0, C.BLOCK_V, s)
    weight = load_tile(buf.w2, tile(v, unit, C.V, C.H))
    db1 = tl.full((C.BLOCK_H,), 0.0, tl.float32)
    dw2 = tl.full((C.BLOCK_V, C.BLOCK_H), 0.0, tl.float32)
    dtable = ()
    for _ in tl.static_range(T):
        dtable += (tl.full((C.BLOCK_V, C.BLOCK_H), 0.0, tl.float32),)
    for b0 in range(0, C.GROUP, C.BLOCK_B):
        b, end = group_rows(b0, C.BLOCK_B, p, s, C)
        h = load_tile(buf.hidden, tile(b, unit, end, C.H))
        start = window_starts(window, b, num_windows, C)
        tokens = ()
        for t in tl.static_range(T):
            tokens += (tokens_at(start, t, buf),)
        dlogits = softmax_rows(b, end, p < C.R, p, s, buf, window, num_windows, C)
        # 0 past the end, where rows are another group's
        dlogits = tl.where(b[:, None] < end, dlogits, 0.0)
        # dpre = (dlogits @ W2) (1 - h^2)   (BLOCK_B, BLOCK_H)
        dpre = dot(dlogits, weight, tl.full((C.BLOCK_B, C.BLOCK_H), 0.0, tl.float32), C.precision) * (1.0 - h * h)
        # db1 += sum_b dpre[b]   (BLOCK_H,)
        db1 += tl.sum(dpre, axis=0)
        # dW2 += dlogits^T @ h   (BLOCK_V, BLOCK_H)
        dw2 = dot(tl.trans(dlogits), h, dw2, C.precision)
        added = ()
        for t in tl.static_range(T):
            # dtable[t] += onehot(x_t)^T @ dpre   (BLOCK_V, BLOCK_H)
            added += (add_rows_by_token(dtable[t], v, tokens[t], dpre, C),)
        dtable = added
    tl.store(buf.db1 + p % C.R * C.H + unit, db1, mask=unit < C.H)
    store_tile(buf.dw2, tile(v, unit, C.V, C.H, first=p % C.R * C.V * C.H), dw2)
    for t in tl.static_range(T):
        store_tile(tables_of(p, buf, C), table_tile(t, v, unit, C), dtable[t])


@triton.jit
def output_weight_phase(p, s, buf, C: tl.constexpr):
    """The update of b1, and of program p's share of the rows of W2."""
    for n in range(p // C.R, C.TILES, C.G):
        unit = units(n, s, C)
        if p % C.R == 0:
            # db1 = sum over the groups of its parts   (BLOCK_H,)
            at = vector(unit, C.H)
            db1 = sum_of_parts(buf.db1, C.H, at, C)
            # b1 = AdamW(b1, db1)
            adamw_at(buf.b1, C.H, at, db1, s, buf, C)
        for v0 in range(0, C.SHARE_V, C.BLOCK_W):
            share = block(v0, C.BLOCK_W, s)
            v = p % C.R * C.SHARE_V + share
            row, column, mask = tile(v, unit, C.V, C.H)
            mask = (share < C.SHARE_V)[:, None] & mask
            # dW2 = sum over the groups of its parts   (BLOCK_W, BLOCK_H)
            dw2 = sum_of_parts(buf.dw2, C.V * C.H, (row, column, mask), C)
            # W2 = AdamW(W2, dW2);  w2t = W2^T
            w2 = adamw_at(buf.w2, C.V * C.H, (row, column, mask), dw2, s, buf, C)
            tl.store(buf.w2t + unit[None, :] * C.V + v[:, None], w2, mask=mask)


@triton.jit
def add_to_dwte(dwte, v, e, s, buf, C: tl.constexpr):
    """Adds a program's part of dwte[v, e] to the sum of step s."""
    dwte_sum = sum_of(buf.dwte, C.V * C.E, s)
    add_to_sum(dwte, dwte_sum, tile(v, e, C.V, C.E), buf.fault + 1, DWTE_SCALE, DWTE_LIMIT, C)


@triton.jit
def embedding_gradient_phase(p, s, buf, C: tl.constexpr):
    """Adds sum_t dtable[t] @ W1[:, t] over program p's units, in its columns, to the dwte of step s."""
    first = p % C.R * C.SHARE_E
    for v0 in range(0, C.V if first < C.E else 0, C.BLOCK_V):
        v = block(v0, C.BLOCK_V, s)
        for e0 in range(0, C.SHARE_E, C.BLOCK_S):
            e = block(first + e0, C.BLOCK_S, s)
            dwte = tl.full((C.BLOCK_V, C.BLOCK_S), 0.0, tl.float32)
            for n in range(p // C.R, C.TILES, C.G):
                unit = units(n, s, C)
                for t in range(C.T):
                    # dtable[t] = sum over the groups of its parts   (BLOCK_V, BLOCK_H)
                    dtable = sum_of_parts(buf.table, C.T * C.V * C.H, table_tile(t, v, unit, C), C)
                    w1 = load_tile(buf.w1, w1_tile(t, unit, e, C))
                    # dwte += dtable[t] @ W1[:, t]   (BLOCK_V, BLOCK_S)
                    dwte = dot(dtable, w1, dwte, C.precision)
            add_to_dwte(dwte, v, e, s, buf, C)
    clear_sum(sum_of(buf.dwte, C.V * C.E, s + 1), C.V * C.E, p, C)
    tl.debug_barrier()  # W1 was read by all threads before any of them updates it


@triton.jit
def hidden_weight_phase(p, s, buf, C: tl.constexpr):
    """The gradient and update of W1's rows, in program p's share of their columns."""
    wte = replica_of(p, buf, C)
    for n in range(p // C.R, C.TILES, C.G):
        unit = units(n, s, C)
        for t in range(C.T):
            for e0 in range(0, C.SHARE_E, C.BLOCK_S):
                e = block(p % C.R * C.SHARE_E + e0, C.BLOCK_S, s)
                dw1 = tl.full((C.BLOCK_H, C.BLOCK_S), 0.0, tl.float32)
                for v0 in range(0, C.V, C.BLOCK_V):
                    v = block(v0, C.BLOCK_V, s)
                    # dtable[t]^T = sum over the groups of its parts   (BLOCK_H, BLOCK_V)
                    at = transposed_tile(v, unit, C.V, C.H, first=t * C.V * C.H)
                    dtable = sum_of_parts(buf.table, C.T * C.V * C.H, at, C)
                    # dW1[:, t] += dtable[t]^T @ wte   (BLOCK_H, BLOCK_S)
                    dw1 = dot(dtable, load_tile(wte, tile(v, e, C.V, C.E)), dw1, C.precision)
                # W1[:, t] = AdamW(W1[:, t], dW1[:, t]);  w1t = W1^T
                w1 = adamw_at(buf.w1, C.H * C.T * C.E, w1_tile(t, unit, e, C), dw1, s, buf, C)
                store_w1t(w1, t, unit, e, buf, C)


@triton.jit
def first_layer_phase(p, s, buf, C: tl.constexpr):
    """embedding_gradient_phase and hidden_weight_phase in one pass over dtable, for a vocabulary in one block."""
    AHEAD: tl.constexpr = C.T_AHEAD
    # Of a smaller block a thread could store what another has still to load.
    tl.static_assert(32 * C.num_warps <= C.BLOCK_H * C.BLOCK_S)
    first = p % C.R * C.SHARE_E
    v = block(0, C.BLOCK_V, s)
    for e0 in range(0, C.SHARE_E if first < C.E else 0, C.BLOCK_S):
        e = block(first + e0, C.BLOCK_S, s)
        dwte = tl.full((C.BLOCK_V, C.BLOCK_S), 0.0, tl.float32)
        for i in range(0, C.OWNED):
            unit = units(p // C.R + i * C.G, s, C)
            for t0 in range(0, C.T, AHEAD):
                # All loads come before the first store, so that their latencies overlap.
                w1, dtable = (), ()
                for t in tl.static_range(AHEAD):
                    w1 += (load_three(buf.w1, C.H * C.T * C.E, w1_tile(t0 + t, unit, e, C)),)
                wte = load_tile(replica_of(p, buf, C), tile(v, e, C.V, C.E))
                for t in tl.static_range(AHEAD):
                    # dtable[t] = sum over the groups of its parts   (BLOCK_V, BLOCK_H)
                    dtable += (sum_of_parts(buf.table, C.T * C.V * C.H, table_tile(t0 + t, v, unit, C), C),)
                for t in tl.static_range(AHEAD):
                    # dwte += dtable[t] @ W1[:, t]   (BLOCK_V, BLOCK_S)
                    dwte = dot(dtable[t], w1[t][0], dwte, C.precision)
                    # dW1[:, t] = dtable[t]^T @ wte   (BLOCK_H, BLOCK_S)
                    dw1 = tl.full((C.BLOCK_H, C.BLOCK_S), 0.0, tl.float32)
                    dw1 = dot(tl.trans(dtable[t]), wte, dw1, C.precision)
                    # W1[:, t] = AdamW(W1[:, t], dW1[:, t]);  w1t = W1^T
                    at = w1_tile(t0 + t, unit, e, C)
                    new = update_three(w1[t], dw1, buf.w1, C.H * C.T * C.E, at, s, buf)
                    store_w1t(new, t0 + t, unit, e, buf, C)
        add_to_dwte(dwte, v, e, s, buf, C)
    clear_sum(sum_of(buf.dwte, C.V * C.E, s + 1), C.V * C.E, p, C)


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
        row_gradients_phase(p, s, buf, window, num_windows, C)
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
        # wte = AdamW(wte, dwte) of step s - 1
        embedding_phase(p, s - 1, buf, C)
    forward_phase(p, s, buf, window_of_step(s, num_windows, C), num_windows, C)
    if p == 0:
        # clock[1] = s: no kernel writes the word that it reads, so no program can see the clock move.
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
            B, V, T, E, H, 1, block_size(B, MAX_B), block_size(V, MAX_V), block_size(E, MAX_E), block_size(H, MAX_H),
            arithmetic, deterministic, rows,
        )  # fmt: skip
    block_h = 16
    programs = min(DEFAULT_PROGRAMS, processors, -(-H // block_h))
    groups = max(1, min(MAX_GROUPS, processors // programs, B // 32))
    # One block for a small group's rows: its loads are all under way at once. Larger models lack the registers for it.
    block_b = block_size(-(-B // groups), 64 if groups > 1 and 64 * groups >= B and V <= 32 and E <= 128 else 32)
    # Blocks of 16 fit E = 48 better; tf32x3 would have more operands to split for them.
    block_e = block_size(E, 16 if V > 32 or (E % 32 and (groups > 1 or arithmetic == "ieee")) else 32)
    config = StepConfig(
        B, V, T, E, H, programs, block_b, block_size(V, 32), block_e, block_h, arithmetic, deterministic, rows, R=groups
    )
    return replace(config, ahead=config.operand_bytes(T) <= SHARED_BYTES)


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
            w1=empty(3, C.H, C.T * C.E),
            b1=empty(3, C.H),
            w2=empty(3, C.V, C.H),
            b2=empty(3, C.VP),
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
        buf = self.buffers
        return [[buf.replicas[0, k], buf.w1[k], buf.b1[k], buf.w2[k], buf.b2[k, : self.config.V]] for k in range(3)]

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
    from ._aot import CAPABILITIES, PROCESSORS, Shipped, recorded

    default, many, largest = (128, 27, 3, 48, 512), (1024, 27, 3, 48, 512), (MAX_B, MAX_V, MAX_T, MAX_E, MAX_H)
    wide = (128, 27, 3, 128, 512)
    cases = [(default, precision, True) for precision in INPUT_PRECISION]
    cases += [(default, "fp32", False), (many, "fp32", True), (largest, "fp32", True), (wide, "fp32", True)]
    tape, scalars = torch.empty(10_007, dtype=torch.int32, device="meta"), torch.empty(1000, 3, device="meta")
    found: dict[str, Shipped] = {}
    for capability in CAPABILITIES:
        for sizes, precision, deterministic in cases:
            # Of large sizes each architecture has one number of programs.
            default_config = config_on(capability, PROCESSORS[90 if sizes in (many, largest) else capability])
            with recorded(precision) as launches:
                launcher(default_config(*sizes, precision=precision, deterministic=deterministic), tape, scalars).run(2)
            for launch in launches:
                before = found[launch.key].capabilities if launch.key in found else ()
                if capability in launch.capabilities and capability not in before:
                    found[launch.key] = replace(launch, capabilities=(*before, capability))
    yield from found.values()


def shipped():
    """See _aot."""
    yield from shipped_launches(TrainStep, lambda _, processors: partial(default_config, processors=processors))
