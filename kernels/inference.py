"""What a trained model is asked for: logits of given contexts, the mean loss over given windows, sampled text.

    h = tanh(concat_t wte[x_t] @ W1^T + b1);  logits = h @ W2^T + b2

One launch each. The rows of a batch are split over programs, and every program goes through all hidden units: no
exchange but the sum of the losses, which the last program to finish adds up in the order of the programs. Embedding
rows are gathered, not tabulated: a program has few rows, so a table of its own would cost as much as it saves.

The sampling kernel is one program that draws one token after another with xorshift64* (Vigna 2016), so that 200
tokens need no host in between.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import dot, tanh
from ._runtime import INPUT_PRECISION, MAX_REGISTERS, CompileTimeConfig, input_precision, interpreting
from ._tile import block_size, load_tile, store_tile, tile, vector

MULTIPLIER: tl.constexpr = tl.constexpr(0x2545F4914F6CDD1D)
OPTIONS = {"num_warps": 8, "num_stages": 1, "maxnreg": MAX_REGISTERS}
MAX_PROGRAMS = 4096  # of one loss launch; each takes several blocks of rows where there are more


# --- configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig(CompileTimeConfig):
    """Sizes and tiles, the compile-time argument of the kernels.

    BLOCK_* are powers of two, at least 16; BLOCK_R at least 8 in ieee.
    """

    V: int
    T: int
    E: int
    H: int
    BLOCK_R: int
    BLOCK_E: int
    BLOCK_H: int
    precision: str = "ieee"

    @property
    def VP(self) -> int:
        """A row of logits, padded to a power of two."""
        return block_size(self.V, 256)


class Weights(NamedTuple):
    """Pointers of a model's parameters: contiguous, float32."""

    wte: Tensor  # (V, E)
    w1: Tensor  # (H, T*E)
    b1: Tensor  # (H,)
    w2: Tensor  # (V, H)
    b2: Tensor  # (V,)

    def transposed(self) -> "Weights":
        """With w1 (T*E, H) and w2 (H, V): contiguous along what a product adds nothing up over."""
        return self._replace(w1=self.w1.t().contiguous(), w2=self.w2.t().contiguous())


def default_config(V: int, T: int, E: int, H: int, *, precision: str = "fp32") -> ModelConfig:
    """Tiles that spill no register, or, in the interpreter, large ones. V must be at most 256."""
    arithmetic = input_precision(precision)
    if interpreting():
        return ModelConfig(V, T, E, H, 512, block_size(E, 256), block_size(H, 4096), arithmetic)
    if V <= 32 and arithmetic == "ieee":  # by tensor cores, Triton does not compile so many rows for sm_100
        return ModelConfig(V, T, E, H, 64, block_size(E, 32), 32, arithmetic)
    # Large vocabularies fill the registers with logits; a product by tensor cores has at least 16 rows.
    rows = 32 if V <= 64 else 8 if arithmetic == "ieee" else 16
    return ModelConfig(V, T, E, H, rows, block_size(E, 32), 16, arithmetic)


# --- device functions ----------------------------------------------------------------------------------------------


@triton.jit
def logits_of_rows(contexts_ptr, stride, row, in_range, model, C: tl.constexpr):
    """Logits (BLOCK_R, VP) of the contexts in these rows; a token outside of 0..V-1 counts as a zero embedding.

    model: Weights.transposed().
    """
    v = tl.arange(0, C.VP)
    logits = tl.full((C.BLOCK_R, C.VP), 0.0, tl.float32)
    for h0 in range(0, C.H, C.BLOCK_H):
        unit = h0 + tl.arange(0, C.BLOCK_H)
        pre = tl.full((C.BLOCK_R, C.BLOCK_H), 0.0, tl.float32)
        for t in range(C.T):
            token = tl.load(contexts_ptr + row.to(tl.int64) * stride + t, mask=in_range, other=0)
            known = in_range & (token >= 0) & (token < C.V)
            for e0 in range(0, C.E, C.BLOCK_E):
                e = e0 + tl.arange(0, C.BLOCK_E)
                emb = load_tile(model.wte, (token[:, None] * C.E, e[None, :], known[:, None] & (e[None, :] < C.E)))
                weight = load_tile(model.w1, tile(e, unit, C.E, C.H, first=t * C.E * C.H))
                # pre += wte[x_t, e] @ W1[:, t, e]^T   (BLOCK_R, BLOCK_H)
                pre = dot(emb, weight, pre, C.precision)
        # h = tanh(pre + b1);  logits += h @ W2^T   (BLOCK_R, VP)
        h = tanh(pre + load_tile(model.b1, vector(unit, C.H))[None, :])
        logits = dot(h, load_tile(model.w2, tile(unit, v, C.H, C.V)), logits, C.precision)
    return logits + load_tile(model.b2, vector(v, C.V))[None, :]


@triton.jit
def next_uniform(state):
    """One step of xorshift64*: the new state (uint64) and a uniform in [0, 1) of 24 bits, fp64."""
    state = state ^ (state >> 12)
    state = state ^ (state << 25)
    state = state ^ (state >> 27)
    draw = state * tl.full((), MULTIPLIER, tl.uint64)
    return state, (draw >> 40).to(tl.float64) * (1.0 / 16777216.0)


# --- kernels -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["contexts_ptr"])
def logits_kernel(contexts_ptr, logits_ptr, rows, model, C: tl.constexpr):
    """Logits of contexts (rows, T)."""
    row = tl.program_id(0) * C.BLOCK_R + tl.arange(0, C.BLOCK_R)
    logits = logits_of_rows(contexts_ptr, C.T, row, row < rows, model, C)
    # As int64: rows * V may be past 32 bits.
    store_tile(logits_ptr, tile(row.to(tl.int64), tl.arange(0, C.VP), rows, C.V), logits)


@triton.jit(do_not_specialize=["rows"])
def mean_loss_kernel(windows_ptr, counts_ptr, partial_ptr, finished_ptr, mean_ptr, rows, model, C: tl.constexpr):
    """The mean cross-entropy over windows (rows, T+1), each weighted by its count.

    partial_ptr (2, programs) float64 holds every program's sum of losses and of counts; finished_ptr counts the
    programs that have stored theirs and is 0 before and after.
    """
    p, programs = tl.program_id(0), tl.num_programs(0)
    v = tl.arange(0, C.VP)
    loss_sum = tl.zeros((), tl.float64)
    count_sum = tl.zeros((), tl.float64)
    for first in range(p * C.BLOCK_R, rows, programs * C.BLOCK_R):
        row = first + tl.arange(0, C.BLOCK_R)
        in_range = row < rows
        logits = logits_of_rows(windows_ptr, C.T + 1, row, in_range, model, C)
        logits = tl.where(v[None, :] < C.V, logits, float("-inf"))
        target = tl.load(windows_ptr + row.to(tl.int64) * (C.T + 1) + C.T, mask=in_range, other=0)
        count = tl.load(counts_ptr + row, mask=in_range, other=0.0)
        # loss = log(sum_v exp(z_v)) - z_target,  z = logits - max_v logits   (BLOCK_R,)
        shifted = logits - tl.max(logits, axis=1)[:, None]
        own = tl.sum(tl.where(v[None, :] == target[:, None], shifted, 0.0), axis=1)
        loss = tl.log(tl.sum(tl.exp(shifted), axis=1)) - own
        loss_sum += tl.sum(tl.where(in_range, loss, 0.0).to(tl.float64) * count, axis=0)
        count_sum += tl.sum(count, axis=0)
    tl.store(partial_ptr + p, loss_sum)
    tl.store(partial_ptr + programs + p, count_sum)
    tl.debug_barrier()  # the atomic releases what its own thread wrote or was told of
    if tl.atomic_add(finished_ptr, 1, sem="acq_rel") == programs - 1:
        tl.debug_barrier()
        add_up(partial_ptr, programs, mean_ptr)
        tl.store(finished_ptr, 0)


@triton.jit
def add_up(partial_ptr, programs, mean_ptr):
    """The mean from all programs' sums, added in their order."""
    losses = tl.zeros((256,), tl.float64)
    counts = tl.zeros((256,), tl.float64)
    for first in range(0, programs, 256):
        i = first + tl.arange(0, 256)
        losses += load_tile(partial_ptr, vector(i, programs))
        counts += load_tile(partial_ptr + programs, vector(i, programs))
    tl.store(mean_ptr, tl.sum(losses, axis=0) / tl.sum(counts, axis=0))


@triton.jit(do_not_specialize=["count"])
def sample_kernel(tokens_ptr, seed_ptr, count, model, C: tl.constexpr):
    """Draws `count` tokens after the T that tokens_ptr begins with, and stores them behind these."""
    state = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    v = tl.arange(0, C.VP)
    for i in range(count):
        # Products are added up number by number, and over threads only at the end. A product that is shuffled between
        # threads at once may be contracted into an addition there, and then each thread's sum has bits of its own.
        products = tl.full((C.VP, C.BLOCK_H), 0.0, tl.float32)
        for h0 in range(0, C.H, C.BLOCK_H):
            unit = h0 + tl.arange(0, C.BLOCK_H)
            pre = tl.full((C.BLOCK_H, C.BLOCK_E), 0.0, tl.float32)
            for t in range(C.T):
                token = tl.load(tokens_ptr + i + t)
                for e0 in range(0, C.E, C.BLOCK_E):
                    e = e0 + tl.arange(0, C.BLOCK_E)
                    emb = load_tile(model.wte + token * C.E, vector(e, C.E))
                    # pre += W1[:, t, e] wte[x_t, e]   (BLOCK_H, BLOCK_E)
                    pre += load_tile(model.w1, tile(unit, e, C.H, C.E, C.T * C.E, first=t * C.E)) * emb[None, :]
            # h = tanh(b1 + sum over e of pre);  products += W2 h   (VP, BLOCK_H)
            h = tanh(tl.sum(pre, axis=1) + load_tile(model.b1, vector(unit, C.H)))
            products += load_tile(model.w2, tile(v, unit, C.V, C.H)) * h[None, :]
        # logits = b2 + W2 h, -inf past the vocabulary   (VP,)
        logits = tl.sum(products, axis=1) + tl.load(model.b2 + v, mask=v < C.V, other=float("-inf"))
        # probabilities = softmax(logits)
        exponential = tl.exp(logits - tl.max(logits, axis=0))
        probabilities = exponential / tl.sum(exponential, axis=0)
        cumulative = tl.cumsum(probabilities.to(tl.float64), axis=0)
        state, uniform = next_uniform(state)
        # The first token whose cumulative sum exceeds the uniform is preceded by those whose sum does not.
        below = tl.sum(((cumulative <= uniform) & (v < C.V)).to(tl.int32), axis=0)
        tl.store(tokens_ptr + C.T + i, tl.minimum(below, C.V - 1).to(tl.int64))
        tl.debug_barrier()  # the next token's context is read by all threads


# --- launchers -----------------------------------------------------------------------------------------------------


def logits(weights: Weights, contexts: Tensor, *, precision: str = "fp32") -> Tensor:
    """Logits (N, V), float32, of contexts (N, T), int64, on the weights' device. V must be at most 256."""
    C = config_of(weights, contexts.shape[1], precision)
    rows = len(contexts)
    out = torch.empty(rows, C.V, device=contexts.device)
    if rows:
        grid = (triton.cdiv(rows, C.BLOCK_R),)
        logits_kernel[grid](contexts.contiguous(), out, rows, weights.transposed(), C, **OPTIONS)
    return out


def mean_loss(
    weights: Weights, windows: Tensor, counts: Tensor, finished: Tensor, *, precision: str = "fp32"
) -> Tensor:
    """The mean cross-entropy in nats over windows, one launch; the same bits on every call.

    Args:
        windows: (D, T+1), int64, contiguous: T inputs and the target, D at least 1.
        counts: (D,), float64: how often each window counts.
        finished: (1,), int32, 0: counts programs during the launch and is 0 again after it.

    Returns:
        A float64 tensor of shape (1,), on the device.
    """
    C = config_of(weights, windows.shape[1] - 1, precision)
    rows, device = len(windows), windows.device
    programs = min(triton.cdiv(rows, C.BLOCK_R), MAX_PROGRAMS)
    partial = torch.empty(2, programs, dtype=torch.float64, device=device)
    mean = torch.empty(1, dtype=torch.float64, device=device)
    mean_loss_kernel[(programs,)](
        windows, counts, partial, finished, mean, rows, weights.transposed(), C, **OPTIONS
    )  # fmt: skip
    return mean


def sample(weights: Weights, context: Sequence[int], count: int, seed: int) -> Tensor:
    """Draws `count` tokens after a context of T tokens, one launch.

    Token by token: the softmax of the logits, and the first token at which its cumulative sum exceeds a uniform of
    xorshift64* started at `seed`, 1 .. 2^64-1. Returns int64 tokens, (count,), on the device.
    """
    T, device = len(context), weights.wte.device
    C = config_of(weights, T, "fp32")
    tokens = torch.tensor([*context, *([0] * count)], device=device)
    signed = seed - 2**64 if seed >= 2**63 else seed
    sample_kernel[(1,)](tokens, torch.tensor([signed], device=device), count, weights, sampling_config(C), **OPTIONS)
    return tokens[T:]


def config_of(weights: Weights, T: int, precision: str) -> ModelConfig:
    """default_config() for these weights; ValueError where shapes do not fit together."""
    (V, E), (H, width) = weights.wte.shape, weights.w1.shape
    if width != T * E:
        raise ValueError(f"W1 has {width} columns; contexts of {T} tokens and embeddings of {E} numbers need {T * E}")
    return default_config(V, T, E, H, precision=precision)


def sampling_config(C: ModelConfig) -> ModelConfig:
    """Tiles for one row: nothing is multiplied by tensor cores, and a tile of weights fits the registers."""
    block_e = block_size(C.E, 64)
    return ModelConfig(C.V, C.T, C.E, C.H, 16, block_e, max(16, 4096 // max(block_e, C.VP)), C.precision)


def shipped():
    """The default model in every precision, and the largest one; see _aot."""
    from ._aot import recorded

    for sizes, precision in [((27, 3, 48, 512), name) for name in INPUT_PRECISION] + [((256, 16, 256, 4096), "fp32")]:
        V, T, E, H = sizes
        shapes = ((V, E), (H, T * E), (H,), (V, H), (V,))
        weights = Weights(*(torch.empty(shape, device="meta") for shape in shapes))
        windows = torch.empty(7168, T + 1, dtype=torch.int64, device="meta")
        words = torch.empty(7168, dtype=torch.float64, device="meta")
        with recorded(precision) as launches:
            logits(weights, windows[:, 1:], precision=precision)
            mean_loss(weights, windows, words, torch.empty(1, dtype=torch.int32, device="meta"), precision=precision)
            C = sampling_config(config_of(weights, T, precision))
            sample_kernel[(1,)](windows, windows, 200, weights, C, **OPTIONS)
        yield from launches
