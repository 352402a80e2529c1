"""Attention over a far list and a window: the interface, plain PyTorch, and Triton.

The one idea: nothing searches for separators. What a query sees is three ranges, two of the far
list and one of the text (`SepLayout` in `sep_cache.py`), so sparse attention is flash attention
whose loops run over ranges. The backward needs no more: a far key is seen by a range of queries.

Read `sep_attention` and the PyTorch form after the far list in `sep_cache.py`; the Triton form when
you know flash attention (arXiv 2205.14135), best beside Triton's fused-attention tutorial.
`python sep_kernel.py` runs the kernel's tests.
"""
from __future__ import annotations  # without triton there is no `tl` to annotate with

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.nn.attention.bias import causal_lower_right

from sep_cache import SepLayout

try:
    import triton
    import triton.language as tl
except ImportError:  # on a Mac, say: plain PyTorch serves
    triton = None


def sep_attention(q, k, v, layout, window, sinks=0, q_sink=None, impl="auto"):
    """Softmax attention of each query over its sinks, its far tokens and its window.

    SepLLM (arXiv 2412.12094, section 3), computed as flash attention (arXiv 2205.14135).

    Args:
        q: (B, H, Tq, D) queries. Query t stands at key row `Tk - Tq + t`.
        k, v: (B, H, Tk, D) keys and values, Tk >= Tq.
        layout: `SepLayout(far, start, stop)`, int32, from `far_layout` or a `SepCache`:
            far (B, S): key rows of the kept tokens in order, sinks first, padded with 0;
            start (B, Tq): the first entry of far, not a sink, that query t still sees: never
            decreasing, at least `sinks`; it may exceed stop, then query t sees no far token;
            stop (B, Tq): how many entries of far have left the window of query t, never decreasing.
        window: a query sees the last `window` key rows, its own included.
        sinks: how many entries at the beginning of far are sinks, which stay visible.
        q_sink: (B, H, Tq, D), default q: the queries as they are scored against sinks that have
            left the window.
        impl: "triton" (bf16, fp16 or fp32; D 16, 32, 64 or 128; Tk * D below 2^31), "torch" (any
            floating dtype), or "auto": triton on a GPU, torch elsewhere.

    Query t sees three ranges: sinks, entries [0, min(sinks, stop)) of far; far tokens, entries
    [start, stop) of far; its window, key rows r with `0 <= Tk - Tq + t - r < window`.

    Returns (B, H, Tq, D), differentiable in q, k, v and q_sink.
    Raises ValueError for an unknown impl, for q, k and v of different dtypes, and where
    impl="triton" cannot do what is asked.
    """
    can_do = (
        triton is not None
        and q.shape[3] in (16, 32, 64, 128)
        and q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and max(k.shape[2], layout.far.shape[1]) * q.shape[3] < 2 ** 31 - 2 ** 16
    )
    needs = ("triton, a CUDA device, D 16, 32, 64 or 128, bf16, fp16 or fp32, and Tk * D below "
             f"2^31; given: D {q.shape[3]}, {q.dtype}, {q.device}, Tk {k.shape[2]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, and must agree")
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl is {impl!r}, and must be auto, triton or torch")
    if impl == "auto":
        if q.is_cuda and not can_do:
            warnings.warn(f"sep_attention runs in plain PyTorch; the kernel needs {needs}",
                          stacklevel=2)
        impl = "triton" if q.is_cuda and can_do else "torch"
    if impl == "torch":
        return _attention_torch(q, k, v, layout, window, sinks, q_sink)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not can_do or not (q.is_cuda or interpreted):
        raise ValueError(f"impl='triton' needs {needs}")
    far, start, stop = layout
    window = min(window, k.shape[2])  # a longer one means the same, and might not fit into int32
    out, _ = _attention(q, k, v, far, start, stop, window, sinks, q_sink)
    return out


def attend(q, k, v, layout, config, q_sink=None):
    """The attention of one layer, whatever the configuration and the cache ask for.

    q, q_sink (B, H, Tq, D); k, v (B, H_kv, Tk, D): in grouped-query attention, H / H_kv heads share
    keys and values. layout: None, a SepLayout or a SlotLayout. Returns (B, H, Tq, D).
    """
    B, H, Tq, D = q.shape
    group = H // k.shape[1]
    if layout is None:  # attn="full"
        Tk = k.shape[2]
        mask = causal_lower_right(Tq, Tk) if 1 < Tq < Tk else None
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=Tq == Tk, enable_gqa=group > 1)
    if isinstance(layout, SepLayout):
        if group > 1:
            k = k.repeat_interleave(group, dim=1)
            v = v.repeat_interleave(group, dim=1)
        return sep_attention(q, k, v, layout, config.window, config.sinks, q_sink)
    return F.scaled_dot_product_attention(q, k, v, layout.mask, enable_gqa=group > 1)


# ---- plain PyTorch: blocks of queries, each over the few keys that it can see --------------------

BLOCK = 64  # queries; larger blocks share more keys, and mask more of them


def _attention_torch(q, k, v, layout, window, sinks, q_sink):
    """`sep_attention` without Triton, for CPUs and Apple GPUs; time and memory are linear in T.

    The queries are cut into blocks. A block's keys are [sinks | its range of the far list | its
    windows' rows], gathered for all blocks at once and padded to the longest; then each block is
    one dense attention with a small mask.
    """
    B, H, Tq, D = q.shape
    rows, visible = _keys_of_blocks(layout, window, sinks, Tq, Tk=k.shape[2])
    _, N, M = rows.shape
    visible = visible.flatten(0, 1)[:, None]  # (B N, 1, BLOCK, M)

    def block_queries(x):
        x = F.pad(x, (0, 0, 0, N * BLOCK - Tq))
        return x.view(B, H, N, BLOCK, D).transpose(1, 2).reshape(B * N, H, BLOCK, D)

    def block_keys(x):
        x = x.transpose(1, 2).flatten(2).flatten(0, 1)  # (B Tk, H D)
        x = x.index_select(0, rows.flatten())  # its gradient adds up whole rows, which is fast
        return x.view(B * N, M, H, -1).transpose(1, 2)  # (B N, H, M, D)

    q, k, v = block_queries(q), block_keys(k), block_keys(v)
    if q_sink is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    else:
        n_sinks = min(sinks, layout.far.shape[1])  # the first keys of each block
        sink_scores = block_queries(q_sink) @ k[:, :, :n_sinks].mT
        scores = torch.cat([sink_scores, q @ k[:, :, n_sinks:].mT], dim=-1) * D ** -0.5
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        out = weights @ v
    out = out.view(B, N, H, BLOCK, -1).transpose(1, 2)  # (B, H, N, BLOCK, D)
    return out.flatten(2, 3)[:, :, :Tq]


def _keys_of_blocks(layout, window, sinks, Tq, Tk):
    """The M keys of each of N blocks of queries.

    rows (B, N, M): their rows, counted through the whole batch
    visible (B, N, BLOCK, M) bool: which of them each query of the block sees
    """
    far, start, stop = layout
    B, S = far.shape
    N = -(-Tq // BLOCK)
    device = far.device
    query = torch.arange(N * BLOCK, device=device).view(N, BLOCK)
    query = query.clamp(max=Tq - 1)  # those past the end repeat the last
    query_row = Tk - Tq + query

    # the far entries: the sinks, and what the block's queries see between the first and the last
    first_entry = start[:, query[:, 0]].long()  # (B, N)
    end_entry = stop[:, query[:, -1]].long()
    longest = (end_entry - first_entry).max().clamp(min=0).item()
    sink_entries = torch.arange(min(sinks, S), device=device).expand(B, N, -1)
    range_entries = first_entry[:, :, None] + torch.arange(longest, device=device)
    entries = torch.cat([sink_entries, range_entries], dim=-1)  # (B, N, E)
    far_rows = far.gather(1, entries.clamp(max=S - 1).flatten(1)).view(entries.shape)
    entry = entries[:, :, None]  # (B, N, 1, E)
    query_start = start[:, query, None]  # (B, N, BLOCK, 1)
    query_stop = stop[:, query, None]
    far_visible = (entry < query_stop) & ((entry < sinks) | (entry >= query_start))

    # the window's rows, of all queries of the block
    width = min(window + BLOCK - 1, Tk)
    near_first = (query_row[:, -1] - width + 1).clamp(min=0)  # (N,)
    near_rows = near_first[:, None] + torch.arange(width, device=device)  # (N, width)
    distance = query_row[:, :, None] - near_rows[:, None]  # (N, BLOCK, width)
    near_visible = (distance >= 0) & (distance < window)

    rows = torch.cat([far_rows, near_rows.expand(B, -1, -1)], dim=-1)
    sequence = torch.arange(B, device=device)[:, None, None]
    visible = torch.cat([far_visible, near_visible.expand(B, -1, -1, -1)], dim=-1)
    return sequence * Tk + rows, visible


# ---- Triton --------------------------------------------------------------------------------------
#
# Forward, one query. The loops keep the scores s unscaled, as qk; the exponents scale them, to
# base 2 at once, since the exponential of a GPU is 2^x:
#
#     qk = q k^T       s = qk * D^-0.5       scale = D^-0.5 * log2(e), so e^s = 2^(qk * scale)
#     lse = log2(sum 2^(qk * scale))         p = 2^(qk * scale - lse)         o = p v
#
# Online softmax: neither lse nor p is known before all keys have been seen, so a loop over tiles of
# keys keeps m_i, the largest qk * scale so far, l_i, the sum of 2^(qk * scale - m_i), and acc, the
# sum of 2^(qk * scale - m_i) v; when m_i grows, the two sums shrink by alpha = 2^(m_old - m_new).
# At the end o = acc / l_i and lse = m_i + log2(l_i). Only o and lse are kept for the backward.
#
# Backward. The scores are computed again; lse is known now, so every tile stands alone:
#
#     dv = p^T do        dp = do v^T        ds = p * (dp - delta)        delta = rowsum(do * o)
#     dq = ds k * D^-0.5                    dk = ds^T q * D^-0.5
#
# delta is what the softmax's normalisation takes back: rowsum(p * dp) = do . (p v) = do . o.
#
# With q_sink, sinks that have left the window are scored by q_sink, all other keys by q. There is
# still one softmax, so lse and delta are shared. dq_sink is the sum ds k * D^-0.5 over those sinks,
# dq the one over the other keys. dk of a sink has both parts: ds^T q_sink of the queries whose
# window it has left, and ds^T q of the queries in whose window it is.
#
# Four kernels. `_forward` and `_backward_dq`: a program owns BLOCK queries and loops over the keys
# that they see. `_backward_dkdv_far` and `_backward_dkdv_near`: a program owns BLOCK keys and loops
# over the queries that see them; it computes the transposed tiles qkT, pT, dpT, dsT.
#
# The ranges of a block differ from row to row, but neither end ever moves back, so a block of rows
# sees a staircase. Every row sees all of a full tile; only the tiles left and right of these need a
# mask. `_count_tiles` counts the three kinds.
#
#     row 0    [=================================)
#     row 1           [===============================)
#     row 2                   [=============================)
#             | left  | left  | full  | full  | right | right |
#     tile       -2      -1       0       1       2       3
#              union_lo       full_lo            full_hi    union_hi
#
# Indices are clamped where other kernels mask loads and stores: a load past an end repeats the last
# row, one before the first row repeats the first, and a store past an end stores the last row's
# values a second time.
#
# Tensors are contiguous. A program moves its pointers to its head by a 64-bit offset; offsets
# inside of a head are 32 bits wide.

if triton is None:
    def jit(function):
        return function
    kernel = jit
else:
    jit = triton.jit
    # integers do not become part of the compiled program: one compilation serves all lengths
    kernel = triton.jit(do_not_specialize=["H", "Tq", "Tk", "S", "window", "sinks", "far_programs"])
    LOG2E = tl.constexpr(1.4426950408889634)
    SINK_TILE = tl.constexpr(16)  # the smallest that a tensor core takes; sinks are few
    MAX_SPLITS = tl.constexpr(4)  # programs, at most, that share the queries of a block of far keys
    INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@jit
def _dot(a, b):
    """A matrix product summed in float32; float32 inputs are not rounded to tf32."""
    if INTERPRETED:  # the interpreter keeps bf16 as bare bits, and would multiply those
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@jit
def _count_tiles(lo, hi, TILE: tl.constexpr):
    """How the rows' ranges [lo, hi) are cut into tiles: see the picture above.

    Returns the cut: union_lo, union_hi, full_lo, n_left, n_full, n_right.
    """
    union_lo = tl.min(lo, 0)
    union_hi = tl.max(hi, 0)
    full_lo = tl.max(lo, 0)
    full_hi = tl.min(hi, 0)
    n_left = tl.cdiv(full_lo - union_lo, TILE)
    n_full = tl.maximum(full_hi - full_lo, 0) // TILE
    n_right = tl.cdiv(tl.maximum(union_hi - full_lo - n_full * TILE, 0), TILE)
    return union_lo, union_hi, full_lo, n_left, n_full, n_right


@jit
def _n_tiles(cut, MASKED: tl.constexpr):
    """How many tiles need a mask, or how many need none."""
    _, _, _, n_left, n_full, n_right = cut
    if MASKED:
        n = n_left + n_right
    else:
        n = n_full
    return n


@jit
def _tile_entries(i, cut, TILE: tl.constexpr, MASKED: tl.constexpr):
    """The i-th full tile, or the i-th masked one: its entries (TILE,), and which of them to load.

    A masked tile may reach past the ends of the union; there it loads the first or the last entry.
    """
    union_lo, union_hi, full_lo, n_left, n_full, _ = cut
    if MASKED:
        tile = i - n_left  # left tiles have negative numbers
        tile += tl.where(i < n_left, 0, n_full)  # right tiles come after the full ones
        entry = full_lo + tile * TILE + tl.arange(0, TILE)
        to_load = tl.minimum(tl.maximum(entry, union_lo), union_hi - 1)
    else:
        entry = full_lo + i * TILE + tl.arange(0, TILE)
        to_load = entry
    return entry, to_load


# -- forward

@jit
def _forward_loop(acc, m_i, l_i, q, K, V, FAR, lo, hi, D: tl.constexpr, TILE: tl.constexpr,
                  GATHER: tl.constexpr, STAGES: tl.constexpr):
    """Online softmax of a block of queries, each over its keys [lo, hi); GATHER: entries of FAR."""
    scale: tl.constexpr = D ** -0.5 * LOG2E
    cut = _count_tiles(lo, hi, TILE)
    for MASKED in tl.static_range(2):  # compiled twice: without the mask, and with it
        for i in tl.range(0, _n_tiles(cut, MASKED), num_stages=STAGES):
            entry, to_load = _tile_entries(i, cut, TILE, MASKED)
            if GATHER:
                row = tl.load(FAR + to_load)
            else:
                row = to_load
            offset = row[:, None] * D + tl.arange(0, D)
            k = tl.load(K + offset)  # (TILE, D)
            v = tl.load(V + offset)
            qk = _dot(q, tl.trans(k))  # (BLOCK, TILE)
            if MASKED:
                visible = (entry >= lo[:, None]) & (entry < hi[:, None])
                qk = tl.where(visible, qk, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(qk, 1) * scale)
            alpha = tl.exp2(m_i - m_new)
            p = tl.exp2(qk * scale - m_new[:, None])
            l_i = l_i * alpha + tl.sum(p, 1)
            acc = acc * alpha[:, None] + _dot(p.to(v.dtype), v)
            m_i = m_new
    return acc, m_i, l_i


@jit
def _query_block(Tq, BLOCK: tl.constexpr):
    """A program's head (of all B * H) and its queries (BLOCK,), the last first: they see most."""
    n_blocks = tl.cdiv(Tq, BLOCK)
    bh = tl.program_id(0) // n_blocks
    block = n_blocks - 1 - tl.program_id(0) % n_blocks
    return bh.to(tl.int64), block * BLOCK + tl.arange(0, BLOCK)


@jit
def _query_ranges(START, STOP, t, Tq, Tk, window, sinks, HAS_Q_SINK: tl.constexpr):
    """Three ranges for queries t (BLOCK,): sinks [0, sink_hi), far entries, rows of the window."""
    start = tl.load(START + t)
    stop = tl.load(STOP + t)
    sink_hi = tl.minimum(stop, sinks)
    far_lo = tl.minimum(start, stop)  # start may be past stop: an empty range
    if not HAS_Q_SINK:
        # if no query of the block skips an entry after the sinks, one range [0, stop) covers both
        joined = tl.max(start, 0) <= sinks
        sink_hi = tl.where(joined, 0, sink_hi)
        far_lo = tl.where(joined, 0, far_lo)
    near_hi = Tk - Tq + t + 1
    near_lo = tl.maximum(near_hi - window, 0)
    return sink_hi, far_lo, stop, near_lo, near_hi


@kernel
def _forward(Q, Q_SINK, K, V, FAR, START, STOP, OUT, LSE, H, Tq, Tk, S, window, sinks,
             D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
             FAR_STAGES: tl.constexpr, HAS_Q_SINK: tl.constexpr):
    """The output of BLOCK queries of one head, and the log-sum-exp of their scores."""
    bh, t = _query_block(Tq, BLOCK)
    t = tl.minimum(t, Tq - 1)  # those past the end repeat the last query, and store what it stores
    b = bh // H
    q_row0 = bh * Tq  # the head's first row
    FAR += b * S
    K += bh * Tk * D
    V += bh * Tk * D
    sink_hi, far_lo, far_hi, near_lo, near_hi = _query_ranges(
        START + b * Tq, STOP + b * Tq, t, Tq, Tk, window, sinks, HAS_Q_SINK)

    offset = t[:, None] * D + tl.arange(0, D)  # (BLOCK, D)
    acc = tl.zeros([BLOCK, D], tl.float32)
    m_i = tl.full([BLOCK], -1e30, tl.float32)  # not -inf: m_i - m_new of a row without keys is 0
    l_i = tl.zeros([BLOCK], tl.float32)
    q = tl.load(Q_SINK + q_row0 * D + offset)  # Q itself, if there is no q_sink
    acc, m_i, l_i = _forward_loop(acc, m_i, l_i, q, K, V, FAR, tl.zeros_like(sink_hi), sink_hi,
                                  D, SINK_TILE, GATHER=True, STAGES=1)
    if HAS_Q_SINK:
        q = tl.load(Q + q_row0 * D + offset)
    acc, m_i, l_i = _forward_loop(acc, m_i, l_i, q, K, V, FAR, far_lo, far_hi,
                                  D, TILE, GATHER=True, STAGES=FAR_STAGES)
    acc, m_i, l_i = _forward_loop(acc, m_i, l_i, q, K, V, FAR, near_lo, near_hi,
                                  D, TILE, GATHER=False, STAGES=STAGES)
    tl.store(OUT + q_row0 * D + offset, (acc / l_i[:, None]).to(q.dtype))
    tl.store(LSE + q_row0 + t, m_i + tl.log2(l_i))


# -- backward, queries: dq

@jit
def _dq_loop(dq, q, do, lse, delta, K, V, FAR, lo, hi, D: tl.constexpr, TILE: tl.constexpr,
             GATHER: tl.constexpr, STAGES: tl.constexpr):
    """Adds to dq (not scaled) of BLOCK queries what the keys [lo, hi) of each contribute."""
    scale: tl.constexpr = D ** -0.5 * LOG2E
    cut = _count_tiles(lo, hi, TILE)
    for MASKED in tl.static_range(2):
        for i in tl.range(0, _n_tiles(cut, MASKED), num_stages=STAGES):
            entry, to_load = _tile_entries(i, cut, TILE, MASKED)
            if GATHER:
                row = tl.load(FAR + to_load)
            else:
                row = to_load
            offset = row[:, None] * D + tl.arange(0, D)
            k = tl.load(K + offset)  # (TILE, D)
            v = tl.load(V + offset)
            qk = _dot(q, tl.trans(k))  # (BLOCK, TILE)
            if MASKED:
                visible = (entry >= lo[:, None]) & (entry < hi[:, None])
                qk = tl.where(visible, qk, float("-inf"))
            p = tl.exp2(qk * scale - lse[:, None])
            dp = _dot(do, tl.trans(v))
            ds = p * (dp - delta[:, None])
            dq += _dot(ds.to(k.dtype), k)
    return dq


@kernel
def _backward_dq(Q, Q_SINK, K, V, FAR, START, STOP, OUT, LSE, DO, DELTA, DQ, DQ_SINK,
                 H, Tq, Tk, S, window, sinks,
                 D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
                 FAR_STAGES: tl.constexpr, HAS_Q_SINK: tl.constexpr):
    """dq and delta of BLOCK queries of one head, and dq_sink where there is a q_sink."""
    bh, t = _query_block(Tq, BLOCK)
    t = tl.minimum(t, Tq - 1)
    b = bh // H
    q_row0 = bh * Tq  # the head's first row
    FAR += b * S
    K += bh * Tk * D
    V += bh * Tk * D
    sink_hi, far_lo, far_hi, near_lo, near_hi = _query_ranges(
        START + b * Tq, STOP + b * Tq, t, Tq, Tk, window, sinks, HAS_Q_SINK)

    offset = t[:, None] * D + tl.arange(0, D)  # (BLOCK, D)
    do = tl.load(DO + q_row0 * D + offset)
    out = tl.load(OUT + q_row0 * D + offset)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + q_row0 + t, delta)  # for dk and dv
    lse = tl.load(LSE + q_row0 + t)
    q = tl.load(Q_SINK + q_row0 * D + offset)
    dq = tl.zeros([BLOCK, D], tl.float32)
    dq = _dq_loop(dq, q, do, lse, delta, K, V, FAR, tl.zeros_like(sink_hi), sink_hi,
                  D, SINK_TILE, GATHER=True, STAGES=1)
    if HAS_Q_SINK:
        tl.store(DQ_SINK + q_row0 * D + offset, (dq * D ** -0.5).to(q.dtype))
        dq = tl.zeros([BLOCK, D], tl.float32)
        q = tl.load(Q + q_row0 * D + offset)
    # the window before the far list: the other way around takes more registers
    dq = _dq_loop(dq, q, do, lse, delta, K, V, FAR, near_lo, near_hi,
                  D, TILE, GATHER=False, STAGES=STAGES)
    dq = _dq_loop(dq, q, do, lse, delta, K, V, FAR, far_lo, far_hi,
                  D, TILE, GATHER=True, STAGES=FAR_STAGES)
    tl.store(DQ + q_row0 * D + offset, (dq * D ** -0.5).to(q.dtype))


# -- backward, keys: dk and dv
#
# Entry e of far is seen by the queries [FIRST_QUERY[e], END_QUERY[e]): from the first whose stop
# exceeds e, up to the first whose start exceeds e; a sink is seen to the end. An entry that the cap
# or the horizon hides before it leaves the window is seen by no query: its END_QUERY is raised to
# its FIRST_QUERY. ENTRY[row] is the entry of far that stands at a key row, -1 if there is none or
# if it never leaves a window. The example of `sep_cache.py`, the text `a,b.cd`:
#
#     far          0  1  3        query, or key row   0  1  2  3  4  5
#     FIRST_QUERY  2  3  5        stop                0  0  1  2  2  3
#     END_QUERY    6  5  6        start               1  1  1  1  1  2
#                                 ENTRY               0  1 -1  2 -1 -1

@jit
def _dkdv_loop(dk, dv, k, v, Q, DO, LSE, DELTA, lo, hi, split, num_splits,
               D: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr):
    """Adds to dk (not scaled) and dv of BLOCK keys what the queries [lo, hi) of each contribute.

    Of `num_splits` programs that share these queries this is number `split`.
    """
    scale: tl.constexpr = D ** -0.5 * LOG2E
    cut = _count_tiles(lo, hi, TILE)
    for MASKED in tl.static_range(2):
        for i in tl.range(split, _n_tiles(cut, MASKED), num_splits, num_stages=STAGES):
            query, to_load = _tile_entries(i, cut, TILE, MASKED)
            offset = to_load[:, None] * D + tl.arange(0, D)
            q = tl.load(Q + offset)  # (TILE, D)
            do = tl.load(DO + offset)
            lse = tl.load(LSE + to_load)
            delta = tl.load(DELTA + to_load)
            qkT = _dot(k, tl.trans(q))  # (BLOCK, TILE)
            if MASKED:
                visible = (query >= lo[:, None]) & (query < hi[:, None])
                qkT = tl.where(visible, qkT, float("-inf"))
            pT = tl.exp2(qkT * scale - lse[None, :])
            dv += _dot(pT.to(do.dtype), do)
            dpT = _dot(v, tl.trans(do))
            dsT = pT * (dpT - delta[None, :])
            dk += _dot(dsT.to(q.dtype), q)
    return dk, dv


@jit
def _far_blocks(n_far, sinks, far_programs, BLOCK: tl.constexpr):
    """How the programs of a head share the n_far entries of far that some query sees.

    The entries are cut into blocks. Sinks have blocks of their own, since their query is q_sink and
    they are seen to the end. There are far_programs = cdiv(S, BLOCK) + 1 programs, which is at
    least the number of blocks, and most lists are much shorter than S: so num_splits programs
    share the queries of a block, 1 to MAX_SPLITS. Split j of block b is program num_splits * b + j.
    Program i writes its sums to the head's rows [i * BLOCK, (i + 1) * BLOCK) of DK_FAR and DV_FAR.
    With BLOCK 4, 2 sinks, 6 entries and 5 programs, num_splits is 2 (- repeats the last entry):

        program    0         1         2         3         4
        block      0         0         1         1         none
        entries    0 1 - -   0 1 - -   2 3 4 5   2 3 4 5   not written
                   sinks               far tokens
    """
    n_sinks = tl.minimum(n_far, sinks)
    n_sink_blocks = tl.cdiv(n_sinks, BLOCK)
    n_blocks = n_sink_blocks + tl.cdiv(n_far - n_sinks, BLOCK)
    num_splits = tl.minimum(far_programs // tl.maximum(n_blocks, 1), MAX_SPLITS)
    return n_sinks, n_sink_blocks, n_blocks, num_splits


@kernel
def _backward_dkdv_far(Q, Q_SINK, K, V, FAR, STOP, FIRST_QUERY, END_QUERY, LSE, DO, DELTA,
                       DK_FAR, DV_FAR, H, Tq, Tk, S, sinks, far_programs,
                       D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
                       STAGES: tl.constexpr):
    """What a share of the queries that see BLOCK entries of far add to dk and dv, in float32.

    Which entries, which share of their queries, and where the sums go: see the picture at
    `_far_blocks`. No two programs write the same row, so nothing has to be zeroed, nothing is added
    atomically, and every run gives the same gradients.
    """
    n_heads = tl.num_programs(0) // far_programs
    bh = (tl.program_id(0) % n_heads).to(tl.int64)  # sinks of all heads first: they take longest
    i = tl.program_id(0) // n_heads
    b = bh // H
    q_row0 = bh * Tq  # the head's first rows
    k_row0 = bh * Tk
    n_far = tl.load(STOP + b * Tq + Tq - 1)
    n_sinks, n_sink_blocks, n_blocks, num_splits = _far_blocks(n_far, sinks, far_programs, BLOCK)
    block = i // num_splits
    split = i % num_splits
    if block >= n_blocks:
        return

    if block < n_sink_blocks:
        Q_BLOCK = Q_SINK
        first_entry = block * BLOCK
        end = n_sinks
    else:
        Q_BLOCK = Q
        first_entry = n_sinks + (block - n_sink_blocks) * BLOCK
        end = n_far
    # entries past the end repeat the last one; nobody reads their sums
    entry = tl.minimum(first_entry + tl.arange(0, BLOCK), end - 1)
    row = tl.load(FAR + b * S + entry)
    lo = tl.load(FIRST_QUERY + b * S + entry)
    hi = tl.load(END_QUERY + b * S + entry)
    offset = row[:, None] * D + tl.arange(0, D)  # (BLOCK, D)
    k = tl.load(K + k_row0 * D + offset)
    v = tl.load(V + k_row0 * D + offset)
    dk = tl.zeros([BLOCK, D], tl.float32)
    dv = tl.zeros([BLOCK, D], tl.float32)
    dk, dv = _dkdv_loop(dk, dv, k, v, Q_BLOCK + q_row0 * D, DO + q_row0 * D, LSE + q_row0,
                        DELTA + q_row0, lo, hi, split, num_splits, D, TILE, STAGES)
    sum_row0 = (bh * far_programs + i) * BLOCK
    sum_offset = tl.arange(0, BLOCK)[:, None] * D + tl.arange(0, D)
    tl.store(DK_FAR + sum_row0 * D + sum_offset, dk)
    tl.store(DV_FAR + sum_row0 * D + sum_offset, dv)


@jit
def _add_splits(SUMS, num_splits, is_far, BLOCK: tl.constexpr, D: tl.constexpr):
    """The sums (BLOCK, D) that programs of the far pass have written; 0 where a key is not far."""
    total = tl.zeros([BLOCK, D], tl.float32)
    for split in range(num_splits):
        total += tl.load(SUMS + split * BLOCK * D, mask=is_far[:, None], other=0.0)
    return total


@kernel
def _backward_dkdv_near(Q, K, V, STOP, ENTRY, LSE, DO, DELTA, DK, DV, DK_FAR, DV_FAR,
                        H, Tq, Tk, window, sinks, far_programs,
                        D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
                        STAGES: tl.constexpr):
    """dk and dv of BLOCK key rows: the sums of the far pass, and what the queries near them add."""
    n_blocks = tl.cdiv(Tk, BLOCK)
    bh = (tl.program_id(0) // n_blocks).to(tl.int64)
    b = bh // H
    q_row0 = bh * Tq  # the head's first rows
    k_row0 = bh * Tk
    row = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.minimum(row, Tk - 1)
    # dk and dv begin with the sums of the far pass: see the picture at `_far_blocks`
    n_far = tl.load(STOP + b * Tq + Tq - 1)
    n_sinks, n_sink_blocks, _, num_splits = _far_blocks(n_far, sinks, far_programs, BLOCK)
    entry = tl.load(ENTRY + b * Tk + row)
    is_far = entry >= 0
    # the entry's place if every block had one split; the last block of sinks is filled up
    place = tl.where(entry < n_sinks, entry, entry - n_sinks + n_sink_blocks * BLOCK)
    sum_row = place // BLOCK * num_splits * BLOCK + place % BLOCK  # of split 0
    sum_offset = sum_row[:, None] * D + tl.arange(0, D)
    sum_row0 = bh * far_programs * BLOCK
    dk = _add_splits(DK_FAR + sum_row0 * D + sum_offset, num_splits, is_far, BLOCK, D)
    dv = _add_splits(DV_FAR + sum_row0 * D + sum_offset, num_splits, is_far, BLOCK, D)

    offset = row[:, None] * D + tl.arange(0, D)  # (BLOCK, D)
    k = tl.load(K + k_row0 * D + offset)
    v = tl.load(V + k_row0 * D + offset)
    t = row - (Tk - Tq)  # the query that stands at each key row; negative before the first
    lo = tl.maximum(t, 0)
    hi = tl.minimum(t + window, Tq)
    dk, dv = _dkdv_loop(dk, dv, k, v, Q + q_row0 * D, DO + q_row0 * D, LSE + q_row0,
                        DELTA + q_row0, lo, hi, 0, 1, D, TILE, STAGES)
    tl.store(DK + k_row0 * D + offset, (dk * D ** -0.5).to(k.dtype))
    tl.store(DV + k_row0 * D + offset, dv.to(v.dtype))


# -- sizes and launches

class LaunchSize(NamedTuple):
    block: int  # queries (forward, dq) or keys (dk and dv) of a program
    tile: int  # keys or queries of one step of its loop
    num_warps: int
    stages: int  # tiles in flight or in use, in a loop over neighbouring rows
    far_stages: int  # the same where rows are gathered: their addresses are loads, too
    maxnreg: int | None = None  # registers per thread, at most, so that more programs fit on an SM


class LaunchSizes(NamedTuple):
    forward: LaunchSize
    dq: LaunchSize
    dkdv: LaunchSize


# by D: sizes that spill no registers; `experiments/KERNEL.md` says how they were chosen. Each:
# block, tile, num_warps, stages, far_stages
LARGE_SHARED_MEMORY = {  # 227 KB on an SM: Hopper and the Blackwell of data centers
    64: LaunchSizes(LaunchSize(128, 64, 4, 3, 5), LaunchSize(64, 64, 4, 3, 5, maxnreg=168),
                    LaunchSize(64, 64, 4, 3, 5)),
    128: LaunchSizes(LaunchSize(128, 64, 8, 3, 5), LaunchSize(128, 64, 8, 3, 5),
                     LaunchSize(64, 32, 4, 3, 5)),
}
SMALL_SHARED_MEMORY = {  # all other GPUs; more stages would gain nothing
    64: LaunchSizes(LaunchSize(128, 64, 8, 3, 3), LaunchSize(128, 64, 8, 3, 3),
                    LaunchSize(64, 32, 4, 3, 3)),
    128: LaunchSizes(LaunchSize(64, 64, 8, 2, 2), LaunchSize(64, 64, 8, 2, 2),
                     LaunchSize(32, 64, 8, 2, 2)),
}


def _launch_sizes(q, window):
    """The sizes for queries q (B, H, Tq, D): by device, D, dtype, length and window."""
    Tq, D = q.shape[2:]
    if q.dtype == torch.float32 or Tq <= 32:
        small = LaunchSize(16, 32, max(4, D // 16), 2, 2)
        return LaunchSizes(small, small, small)
    # the interpreter has no shared memory, and takes the first table
    large = not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] in (9, 10)
    table = LARGE_SHARED_MEMORY if large else SMALL_SHARED_MEMORY
    sizes = table[max(D, 64)]
    if window < 128 and sizes.forward.block == 128:
        # with window 64, the keys of 128 queries are three tiles, all masked; of 64 queries, two
        sizes = sizes._replace(forward=sizes.forward._replace(block=64, num_warps=4))
    return sizes


@library.custom_op("nanosep::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, far: Tensor, start: Tensor, stop: Tensor,
               window: int, sinks: int, q_sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output (B, H, Tq, D) and the log-sum-exp of the scores in base 2, (B, H, Tq) float32."""
    B, H, Tq, D = q.shape
    Tk, S = k.shape[2], far.shape[1]
    q, k, v, far, start, stop = (x.contiguous() for x in (q, k, v, far, start, stop))
    out = torch.empty_like(q)
    lse = torch.empty(B, H, Tq, dtype=torch.float32, device=q.device)
    size = _launch_sizes(q, window).forward
    with torch.cuda.device_of(q):
        _forward[(B * H * triton.cdiv(Tq, size.block),)](
            q, q if q_sink is None else q_sink.contiguous(), k, v, far, start, stop, out, lse,
            H, Tq, Tk, S, window, sinks,
            D=D, BLOCK=size.block, TILE=size.tile, STAGES=size.stages, FAR_STAGES=size.far_stages,
            HAS_Q_SINK=q_sink is not None, num_warps=size.num_warps, maxnreg=size.maxnreg)
    return out, lse


@library.custom_op("nanosep::attention_backward", mutates_args=())
def _attention_backward(
        do: Tensor, q: Tensor, k: Tensor, v: Tensor, far: Tensor, start: Tensor, stop: Tensor,
        window: int, sinks: int, q_sink: Tensor | None, out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dq_sink, which is empty without q_sink."""
    B, H, Tq, D = q.shape
    Tk, S = k.shape[2], far.shape[1]
    do, q, k, v, far, start, stop = (x.contiguous() for x in (do, q, k, v, far, start, stop))
    has_q_sink = q_sink is not None
    q_sink = q_sink.contiguous() if has_q_sink else q
    dq = torch.empty_like(q)
    dk = torch.empty_like(k)
    dv = torch.empty_like(v)
    dq_sink = torch.empty_like(q) if has_q_sink else q.new_empty(0)
    delta = torch.empty_like(lse)

    # the queries of each entry and the entry of each key row: see "backward, keys" above
    entry = torch.arange(S, dtype=torch.int32, device=q.device).expand(B, S).contiguous()
    first_query = torch.searchsorted(stop, entry, right=True, out_int32=True)  # (B, S)
    end_query = torch.searchsorted(start, entry, right=True, out_int32=True)
    end_query = torch.where(entry < sinks, Tq, torch.maximum(first_query, end_query))
    # entries that never leave a window go to column Tk, which is cut off
    row = torch.where(entry < stop[:, -1:], far, Tk).long()
    entry_of_row = entry.new_full((B, Tk + 1), -1).scatter_(1, row, entry)[:, :Tk].contiguous()

    sizes = _launch_sizes(q, window)
    # programs of a head: one for each block of S entries, and one as sinks do not share a block
    far_programs = triton.cdiv(S, sizes.dkdv.block) + 1
    dk_far = torch.empty(B * H, far_programs * sizes.dkdv.block, D,
                         dtype=torch.float32, device=q.device)
    dv_far = torch.empty_like(dk_far)
    with torch.cuda.device_of(q):
        # The order of the launches is part of the algorithm: `_backward_dq` writes delta, which the
        # others read, and the near pass reads the sums that the far pass has written.
        size = sizes.dq
        _backward_dq[(B * H * triton.cdiv(Tq, size.block),)](
            q, q_sink, k, v, far, start, stop, out, lse, do, delta, dq, dq_sink,
            H, Tq, Tk, S, window, sinks,
            D=D, BLOCK=size.block, TILE=size.tile, STAGES=size.stages, FAR_STAGES=size.far_stages,
            HAS_Q_SINK=has_q_sink, num_warps=size.num_warps, maxnreg=size.maxnreg)
        size = sizes.dkdv
        _backward_dkdv_far[(B * H * far_programs,)](
            q, q_sink, k, v, far, stop, first_query, end_query, lse, do, delta, dk_far, dv_far,
            H, Tq, Tk, S, sinks, far_programs,
            D=D, BLOCK=size.block, TILE=size.tile, STAGES=size.stages,
            num_warps=size.num_warps, maxnreg=size.maxnreg)
        _backward_dkdv_near[(B * H * triton.cdiv(Tk, size.block),)](
            q, k, v, stop, entry_of_row, lse, do, delta, dk, dv, dk_far, dv_far,
            H, Tq, Tk, window, sinks, far_programs,
            D=D, BLOCK=size.block, TILE=size.tile, STAGES=size.stages,
            num_warps=size.num_warps, maxnreg=size.maxnreg)
    return dq, dk, dv, dq_sink


@_attention.register_fake
def _(q, k, v, far, start, stop, window, sinks, q_sink):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@_attention_backward.register_fake
def _(do, q, k, v, far, start, stop, window, sinks, q_sink, out, lse):
    dq_sink = q.new_empty(0) if q_sink is None else q.new_empty(q.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dq_sink


def _save_for_backward(ctx, inputs, output):
    q, k, v, far, start, stop, ctx.window, ctx.sinks, q_sink = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, far, start, stop, q_sink, out, lse)


def _backward(ctx, do, _):
    q, k, v, far, start, stop, q_sink, out, lse = ctx.saved_tensors
    dq, dk, dv, dq_sink = _attention_backward(
        do, q, k, v, far, start, stop, ctx.window, ctx.sinks, q_sink, out, lse)
    if q_sink is None:
        dq_sink = None
    return dq, dk, dv, None, None, None, None, None, dq_sink


_attention.register_autograd(_backward, setup_context=_save_for_backward)


if __name__ == "__main__":
    tests = Path(__file__).parent / "tests" / "test_kernel.py"
    sys.exit(subprocess.run([sys.executable, "-m", "pytest", "-q", str(tests)]).returncode)
