"""Embedding lookup, linear layer and tanh as one operation; the (B, T*E) matrix of embeddings is never written.

    pre[b] = bias + sum_t weight[:, tE:(t+1)E] wte[idx[b, t]];   h = tanh(pre)
    dpre = dh (1 - h^2);   dbias = sum_b dpre[b];   dweight[:, tE:(t+1)E] = sum_b dpre[b] wte[idx[b, t]]^T
    dwte[v] = sum over (b, t) with idx[b, t] = v of weight[:, tE:(t+1)E]^T dpre[b]

idx (B, T) integer, wte (V, E), weight (H, T*E) of any strides, bias (H), h and dh (B, H). Three versions, of which the
operator uses the last two as its forms:

1. naive: a program computes h of one sample, one multiply-add a load. 2 B T E H operations.
2. `gather`: a program computes a tile of h as a matrix product, so a number loaded serves all rows or columns of the
   tile. It removes most loads; the operations stay.
3. `table`: only V*T different rows ever enter the layer, so P[t, v] = weight[:, tE:(t+1)E] wte[v] is computed once
   (2 V T E H operations) and a second kernel adds T rows of P a sample. It removes the product over samples.
   Backward, dP[t, v] = sum of dpre[b] over the b with idx[b, t] = v (_sum_by_token.py), and two products of V rows
   give the rest.

Every sum has a fixed order: no atomics, the same bits on every run. A sum over B is cut into parts that different
programs add up; a last kernel adds the parts (_sum.py). With 16-bit inputs dpre is rounded to 16 bits once, as in
torch; P and dP stay fp32. A token outside [0, V) reads nothing and makes its row of h NaN, which reaches dwte, dweight
and dbias. The table is made of every row of wte, so in that form a row that is not finite reaches dweight even where no
token names it.
No time has been measured on a GPU yet.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import dot, load_dpre, load_transposed, tanh
from ._model import choose_form
from ._runtime import INPUT_PRECISION, MAX_REGISTERS
from ._sum import MIN_PROGRAMS, parts_of, sum_parts
from ._sum_by_token import dtable_sums, segment_sums, valid_tokens
from ._tile import load_tile, product_options, span, store_tile, wide_tile

NAIVE_H = 128  # hidden units of a program of the naive kernel: one a thread
# Tiles of every matrix product here: M rows, N columns, K a step. Larger fp32 FMA tiles spill registers. The small ones
# make enough programs of a small batch.
BLOCK_M, BLOCK_N, BLOCK_K = 32, 64, 16
SMALL_M, SMALL_N, SMALL_K = 16, 32, 32
# The lookup kernel's tile; it has no product and only moves memory: rows, columns.
LOOKUP_ROWS, LOOKUP_COLUMNS = 8, 256


# --- 1: naive, forward ------------------------------------------------------------------------------------------------


@triton.jit
def embed_linear_tanh_1_kernel(
    idx_ptr, wte_ptr, weight_ptr, bias_ptr, h_ptr, H, stride_wh, stride_wk,
    T: tl.constexpr, E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """h of one sample and BLOCK_H hidden units."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_h = i < H
    # pre = bias
    pre = tl.load(bias_ptr + i, mask=in_h, other=0.0)
    for t in range(T):
        token = tl.load(idx_ptr + b * T + t).to(tl.int64)
        for e in range(E):
            # pre += weight[:, t E + e] wte[token, e]
            ptrs = weight_ptr + i * stride_wh + (t * E + e) * stride_wk
            weight = tl.load(ptrs, mask=in_h, other=0.0)
            pre += weight * tl.load(wte_ptr + token * E + e)
    # h = tanh(pre)
    tl.store(h_ptr + b * H + i, tanh(pre), mask=in_h)


# --- 2: gather --------------------------------------------------------------------------------------------------------


@triton.jit
def _load_tokens(idx_ptr, rows, t, in_rows, V, T: tl.constexpr):
    """idx[rows, t] as int64, 0 where invalid, and whether they are valid."""
    tokens = tl.load(idx_ptr + rows.to(tl.int64) * T + t, mask=in_rows, other=0).to(tl.int64)
    valid = in_rows & (tokens >= 0) & (tokens < V)
    return tl.where(valid, tokens, 0), valid


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["idx_ptr"])
def embed_linear_tanh_fwd_gather_kernel(
    idx_ptr, wte_ptr, weight_ptr, bias_ptr, h_ptr, B, V, H, stride_wh, stride_wk,
    T: tl.constexpr, E: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """2, forward: h tile (BLOCK_M samples, BLOCK_N hidden units)."""
    rows, in_rows = span(tl.program_id(0) * BLOCK_M, B, BLOCK_M)
    cols0 = tl.program_id(1) * BLOCK_N
    cols, in_cols = span(cols0, H, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    invalid = tl.zeros((BLOCK_M,), tl.int32)
    for t in range(T):
        tokens, valid = _load_tokens(idx_ptr, rows, t, in_rows, V, T)
        invalid += tl.where(valid, 0, 1)
        for e0 in range(0, E, BLOCK_K):
            e, in_e = span(e0, E, BLOCK_K)
            # acc += wte[tokens, e] weight[cols, t E + e]^T
            emb = load_tile(wte_ptr, wide_tile(tokens, e, valid, in_e, E, 1))
            weight = load_transposed(
                weight_ptr, cols0, t * E + e, in_e, H, stride_wh, stride_wk, INPUT_PRECISION, BLOCK_N
            )
            acc = dot(emb, weight, acc, INPUT_PRECISION)
    # h = tanh(acc + bias), NaN in rows with an invalid token
    bias = tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
    h = tl.where(invalid[:, None] > 0, float("nan"), tanh(acc + bias[None, :]))
    store_tile(h_ptr, wide_tile(rows, cols, in_rows, in_cols, H), h)


@triton.jit
def dweight_gather_kernel(
    idx_ptr, wte_ptr, h_ptr, dh_ptr, parts_ptr, bias_parts_ptr, B, V, H, stride_db, stride_dh, rows_per_part,
    T: tl.constexpr, E: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """2, backward: one part of a dweight tile (BLOCK_M hidden units, BLOCK_N of E at one t) and of dbias."""
    blocks_e = tl.cdiv(E, BLOCK_N)
    t = tl.program_id(1) // blocks_e
    part = tl.program_id(2).to(tl.int64)
    rows, in_rows = span(tl.program_id(0) * BLOCK_M, H, BLOCK_M)
    cols, in_cols = span((tl.program_id(1) % blocks_e) * BLOCK_N, E, BLOCK_N)
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, B)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for b0 in range(begin, end, BLOCK_K):
        b, in_b = span(b0, end, BLOCK_K)
        tokens, valid = _load_tokens(idx_ptr, b, t, in_b, V, T)
        # dweight[:, tE:] += dpre[b]^T wte[idx[b, t]];   dbias += dpre[b]
        mask = in_rows[:, None] & in_b[None, :]
        dpre = load_dpre(dh_ptr, h_ptr, b[None, :], rows[:, None], mask, H, stride_db, stride_dh)
        emb = load_tile(wte_ptr, wide_tile(tokens, cols, valid, in_cols, E, 1))
        acc = dot(dpre.to(emb.dtype), emb, acc, INPUT_PRECISION)
        total += tl.sum(dpre, axis=1)
    store_tile(parts_ptr, wide_tile(part * H + rows, t * E + cols, in_rows, in_cols, T * E), acc)
    tl.store(bias_parts_ptr + part * H + rows, total, mask=in_rows & (tl.program_id(1) == 0))


@triton.jit
def demb_kernel(
    h_ptr, dh_ptr, weight_ptr, demb_ptr, B, H, K, stride_db, stride_dh, stride_wh, stride_wk,
    INPUT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """2, backward: demb = dpre weight, the gradient of gathered embeddings; (BLOCK_M samples, BLOCK_N of K = T E)."""
    rows, in_rows = span(tl.program_id(0) * BLOCK_M, B, BLOCK_M)
    cols, in_cols = span(tl.program_id(1) * BLOCK_N, K, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for h0 in range(0, H, BLOCK_K):
        h, in_h = span(h0, H, BLOCK_K)
        # demb += dpre[:, h] weight[h]
        mask = in_rows[:, None] & in_h[None, :]
        dpre = load_dpre(dh_ptr, h_ptr, rows[:, None].to(tl.int64), h[None, :], mask, H, stride_db, stride_dh)
        weight = load_tile(weight_ptr, wide_tile(h, cols, in_h, in_cols, stride_wh, stride_wk))
        acc = dot(dpre.to(weight.dtype), weight, acc, INPUT_PRECISION)
    store_tile(demb_ptr, wide_tile(rows, cols, in_rows, in_cols, K), acc)


# --- 3: table ---------------------------------------------------------------------------------------------------------


@triton.jit
def embed_table_kernel(
    wte_ptr, weight_ptr, table_ptr, V, H, stride_wh, stride_wk,
    E: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """3, forward: P tile (BLOCK_M tokens, BLOCK_N hidden units) of one position t; P is (T, V, H) fp32."""
    t = tl.program_id(2)
    rows, in_rows = span(tl.program_id(0) * BLOCK_M, V, BLOCK_M)
    cols0 = tl.program_id(1) * BLOCK_N
    cols, in_cols = span(cols0, H, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for e0 in range(0, E, BLOCK_K):
        e, in_e = span(e0, E, BLOCK_K)
        # P[t] += wte[rows, e] weight[cols, t E + e]^T
        wte = load_tile(wte_ptr, wide_tile(rows, e, in_rows, in_e, E, 1))
        weight = load_transposed(weight_ptr, cols0, t * E + e, in_e, H, stride_wh, stride_wk, INPUT_PRECISION, BLOCK_N)
        acc = dot(wte, weight, acc, INPUT_PRECISION)
    store_tile(table_ptr, wide_tile(t * V + rows, cols, in_rows, in_cols, H), acc)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["idx_ptr"])
def embed_lookup_tanh_kernel(
    idx_ptr, table_ptr, bias_ptr, h_ptr, B, V, H, T: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """3, forward: h tile (BLOCK_B samples, BLOCK_H hidden units) = tanh(bias + T rows of the table)."""
    rows, in_rows = span(tl.program_id(0) * BLOCK_B, B, BLOCK_B)
    cols, in_cols = span(tl.program_id(1) * BLOCK_H, H, BLOCK_H)
    # pre = bias
    pre = tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    pre = tl.broadcast_to(pre, (BLOCK_B, BLOCK_H))
    invalid = tl.zeros((BLOCK_B,), tl.int32)
    for t in tl.static_range(T):
        tokens, valid = _load_tokens(idx_ptr, rows, t, in_rows, V, T)
        invalid += tl.where(valid, 0, 1)
        # pre += P[t, tokens]; all programs read the small table: keep it in L1
        ptrs = table_ptr + (t * V + tokens)[:, None] * H + cols[None, :]
        mask = valid[:, None] & in_cols[None, :]
        pre += tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_last")
    # h = tanh(pre), NaN in rows with an invalid token
    h = tl.where(invalid[:, None] > 0, float("nan"), tanh(pre))
    store_tile(h_ptr, wide_tile(rows, cols, in_rows, in_cols, H), h)


@triton.jit
def dweight_table_kernel(
    dtable_ptr, wte_ptr, dweight_ptr, dbias_ptr, V, H,
    T: tl.constexpr, E: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """3, backward: dweight tile (BLOCK_M hidden units, BLOCK_N of E) of position t, and dbias."""
    t = tl.program_id(2)
    rows, in_rows = span(tl.program_id(0) * BLOCK_M, H, BLOCK_M)
    cols, in_cols = span(tl.program_id(1) * BLOCK_N, E, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for v0 in range(0, V, BLOCK_K):
        v, in_v = span(v0, V, BLOCK_K)
        # dweight[:, tE:] += dP[t, v]^T wte[v]
        dtable = load_tile(dtable_ptr, wide_tile(rows, t * V + v, in_rows, in_v, 1, H))
        wte = load_tile(wte_ptr, wide_tile(v, cols, in_v, in_cols, E, 1))
        acc = dot(dtable, wte.to(tl.float32), acc, INPUT_PRECISION)
        # dbias += dP[t, v]: every sample has one token at t, so any one t gives sum_b dpre[b]
        total += tl.sum(dtable, axis=1)
    store_tile(dweight_ptr, wide_tile(rows, t * E + cols, in_rows, in_cols, T * E), acc)
    tl.store(dbias_ptr + rows, total, mask=in_rows & (t == 0) & (tl.program_id(1) == 0))


@triton.jit
def dwte_table_kernel(
    dtable_ptr, weight_ptr, parts_ptr, V, H, stride_wh, stride_wk, chunks_per_part,
    T: tl.constexpr, E: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """3, backward: one part of a dwte tile (BLOCK_M tokens, BLOCK_N of E), summed over its chunks of (t, h)."""
    part = tl.program_id(2).to(tl.int64)
    rows, in_rows = span(tl.program_id(0) * BLOCK_M, V, BLOCK_M)
    cols, in_cols = span(tl.program_id(1) * BLOCK_N, E, BLOCK_N)
    chunks = tl.cdiv(H, BLOCK_K)
    begin = tl.program_id(2) * chunks_per_part
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for chunk in range(begin, tl.minimum(begin + chunks_per_part, T * chunks)):
        t = chunk // chunks
        h, in_h = span((chunk % chunks) * BLOCK_K, H, BLOCK_K)
        # dwte += dP[t, :, h] weight[h, tE:]
        dtable = load_tile(dtable_ptr, wide_tile(t * V + rows, h, in_rows, in_h, H, 1))
        weight = load_tile(weight_ptr, wide_tile(h, t * E + cols, in_h, in_cols, stride_wh, stride_wk))
        acc = dot(dtable, weight.to(tl.float32), acc, INPUT_PRECISION)
    store_tile(parts_ptr, wide_tile(part * V + rows, cols, in_rows, in_cols, E), acc)


# --- launchers --------------------------------------------------------------------------------------------------------


def embed_linear_tanh_1(idx: Tensor, wte: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h (B, H) by the naive kernel. Arguments as in the module's docstring, fp32, every token in [0, V)."""
    (B, T), E, H = idx.shape, wte.shape[1], weight.shape[0]
    h = torch.empty((B, H), dtype=weight.dtype, device=weight.device)
    embed_linear_tanh_1_kernel[(B, triton.cdiv(H, NAIVE_H))](
        idx.contiguous(), wte.contiguous(), weight, bias.contiguous(), h, H, *weight.stride(),
        T=T, E=E, BLOCK_H=NAIVE_H, num_warps=4,
    )  # fmt: skip
    return h


def _tiles(B: int, H: int, precision: str) -> tuple[int, int, int, dict[str, Any]]:
    """The tile of a product, M rows, N columns and K a step; and the options of its launch."""
    enough = triton.cdiv(B, BLOCK_M) * triton.cdiv(H, BLOCK_N) >= MIN_PROGRAMS
    M, N, K = (BLOCK_M, BLOCK_N, BLOCK_K) if enough else (SMALL_M, SMALL_N, SMALL_K)
    return M, N, K, product_options(precision, num_stages=2, BLOCK_M=M, BLOCK_N=N, BLOCK_K=K)


def embed_linear_tanh_fwd(
    idx: Tensor, wte: Tensor, weight: Tensor, bias: Tensor | None, form: str, precision: str
) -> Tensor:
    """h (B, H) of weight's dtype. Arguments as in the module's docstring, already checked; see mlp_fast.ops."""
    (B, T), (V, E), H = idx.shape, wte.shape, weight.shape[0]
    idx, wte = idx.contiguous(), wte.contiguous()
    bias = weight.new_zeros(H) if bias is None else bias.contiguous()
    h = torch.empty((B, H), dtype=weight.dtype, device=weight.device)
    M, N, _, options = _tiles(B, H, precision)
    if choose_form(form, B, V) == "gather":
        # h[b] = tanh(bias + sum_t weight[:, tE:(t+1)E] wte[idx[b, t]])
        embed_linear_tanh_fwd_gather_kernel[(triton.cdiv(B, M), triton.cdiv(H, N))](
            idx, wte, weight, bias, h, B, V, H, *weight.stride(), T=T, E=E, **options
        )
        return h
    # P[t, v] = weight[:, tE:(t+1)E] wte[v];   h[b] = tanh(bias + sum_t P[t, idx[b, t]])
    table = torch.empty((T, V, H), dtype=torch.float32, device=weight.device)
    embed_table_kernel[(triton.cdiv(V, M), triton.cdiv(H, N), T)](
        wte, weight, table, V, H, *weight.stride(), E=E, **options
    )
    embed_lookup_tanh_kernel[(triton.cdiv(B, LOOKUP_ROWS), triton.cdiv(H, LOOKUP_COLUMNS))](
        idx, table, bias, h, B, V, H, T=T, BLOCK_B=LOOKUP_ROWS, BLOCK_H=LOOKUP_COLUMNS,
        num_warps=8, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return h


def embed_linear_tanh_bwd(
    dh: Tensor, h: Tensor, idx: Tensor, wte: Tensor, weight: Tensor, form: str, precision: str,
    need_wte: bool, need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dwte or None if it is not needed, dweight and dbias or None both), each of its input's dtype.

    dh may have any strides, zero included.
    """
    (B, T), (V, E), H = idx.shape, wte.shape, weight.shape[0]
    idx, wte = idx.contiguous(), wte.contiguous()
    M, N, K, options = _tiles(B, H, precision)
    dwte = dweight = dbias = None
    if choose_form(form, B, V) == "gather":
        if need_weight:
            # dweight[:, tE:(t+1)E] = sum_b dpre[b] wte[idx[b, t]]^T;   dbias = sum_b dpre[b]
            parts, rows_per_part = parts_of(B, weight.numel(), K)
            partial = torch.empty((parts, H, T * E), dtype=torch.float32, device=h.device)
            bias_partial = torch.empty((parts, H), dtype=torch.float32, device=h.device)
            dweight_gather_kernel[(triton.cdiv(H, M), T * triton.cdiv(E, N), parts)](
                idx, wte, h, dh, partial, bias_partial, B, V, H, *dh.stride(), rows_per_part, T=T, E=E, **options
            )
            dweight, dbias = sum_parts(partial, weight.dtype), sum_parts(bias_partial, weight.dtype)
        if need_wte:
            # demb = dpre weight;   dwte[v] = sum of demb[b, t] over the (b, t) with idx[b, t] = v
            demb = torch.empty((B * T, E), dtype=torch.float32, device=h.device)
            demb_kernel[(triton.cdiv(B, M), triton.cdiv(T * E, N))](
                h, dh, weight, demb, B, H, T * E, *dh.stride(), *weight.stride(), **options
            )
            dwte = segment_sums(valid_tokens(idx, V), demb, None, V, T).to(wte.dtype)
        return dwte, dweight, dbias
    # dP[t, v] = sum of dpre[b] over the b with idx[b, t] = v
    dtable = dtable_sums(dh, h, idx, V, options)
    if need_weight:
        # dweight[:, tE:(t+1)E] = sum_v dP[t, v] wte[v]^T;   dbias = sum_v dP[0, v]
        dweight = torch.empty((H, T * E), dtype=weight.dtype, device=h.device)
        dbias = torch.empty((H,), dtype=weight.dtype, device=h.device)
        dweight_table_kernel[(triton.cdiv(H, M), triton.cdiv(E, N), T)](
            dtable, wte, dweight, dbias, V, H, T=T, E=E, **options
        )
    if need_wte:
        # dwte[v] = sum_t weight[:, tE:(t+1)E]^T dP[t, v]
        chunks = T * triton.cdiv(H, K)
        parts, rows_per_part = parts_of(chunks * K, V * E, K)
        partial = torch.empty((parts, V, E), dtype=torch.float32, device=h.device)
        dwte_table_kernel[(triton.cdiv(V, M), triton.cdiv(E, N), parts)](
            dtable, weight, partial, V, H, *weight.stride(), rows_per_part // K, T=T, E=E, **options
        )
        dwte = sum_parts(partial, wte.dtype)
    return dwte, dweight, dbias


def shipped():
    """Every form and precision, at the default sizes, and at odd ones of which the compiler knows nothing; see _aot."""
    from ._aot import DTYPES, recorded

    forms = (("table", 27), ("table", 300), ("gather", 27))  # 300: summed by sorting
    sizes = ((128, 3, 48, 512), (65536, 3, 48, 512), (65537, 3, 17, 65))
    for (form, V), name, (B, T, E, H) in itertools.product(forms, DTYPES, sizes):
        odd = B % 2 == 1
        stride = 2 if odd else 1
        precision = name if name in INPUT_PRECISION else "fp32"
        idx = torch.empty((B, T), dtype=torch.uint8 if odd else torch.int64, device="meta")
        wte, bias, h = (torch.empty(shape, dtype=DTYPES[name], device="meta") for shape in ((V, E), (H,), (B, H)))
        weight, dh = (
            torch.empty((rows, stride * columns), dtype=DTYPES[name], device="meta")[:, ::stride]
            for rows, columns in ((H, T * E), (B, H))
        )
        with recorded(name) as launches:
            embed_linear_tanh_fwd(idx, wte, weight, bias, form, precision)
            embed_linear_tanh_bwd(dh, h, idx, wte, weight, form, precision, True, True)
            if (form, V, name) == ("gather", 27, "fp32") and B > 128:
                embed_linear_tanh_1(idx, wte, weight, bias)
        yield from launches
