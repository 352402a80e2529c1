"""Attention over a far list and a window: the interface, plain PyTorch, and Triton.

The one idea: nothing searches for separators. What a query sees is its window and two ranges of the
far list (`SepLayout` in `sep_cache.py`), so sparse attention is flash attention whose loops run
over ranges. And each key is seen by one unbroken range of queries, [row, row + reach), so its
gradient is flash attention's loop over queries.

Read `sep_attention` and the PyTorch form after the far list in `sep_cache.py`; the Triton form when
you know flash attention (arXiv 2205.14135), best beside Triton's fused-attention tutorial.
"""
from __future__ import annotations  # without triton there is no `tl` to annotate with

import math
import os
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, library

from sep_cache import require

try:
    import triton
    import triton.language as tl
except ImportError:  # on a Mac, say: plain PyTorch serves
    triton = None


def sep_attention(q, k, v, layout, window, sinks=0, impl="auto"):
    """Softmax attention of each query over its sinks, its far tokens and its window.

    SepLLM (arXiv 2412.12094, section 3), computed as flash attention (arXiv 2205.14135).

    Args:
        q, k, v: (B, H, T, D), of whole texts.
        layout: of `far_layout`, for the same texts, window and sinks.
        impl: "triton" (bf16, fp16 or fp32; D 16, 32, 64 or 128; T at most 1,000,000), "torch" (any
            floating dtype), or "auto": triton on a GPU, torch elsewhere.

    Returns (B, H, T, D), differentiable in q, k and v.
    Raises ValueError for an unknown impl, for q, k and v of different dtypes, and where
    impl="triton" cannot do what is asked.
    """
    T, D = q.shape[2:]
    dtypes = torch.bfloat16, torch.float16, torch.float32
    require(q.dtype == k.dtype == v.dtype,
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, and must agree")
    require(impl in ("auto", "triton", "torch"),
            f"impl is {impl!r}, and must be auto, triton or torch")
    fits = D in (16, 32, 64, 128) and T <= 1_000_000 and q.dtype in dtypes
    can_run = triton is not None and (q.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
    needs = ("triton, a CUDA device, D 16, 32, 64 or 128, bf16, fp16 or fp32, and T at most "
             f"1,000,000; given: D {D}, {q.dtype}, {q.device}, T {T}")
    if impl == "auto":
        impl = "triton" if q.is_cuda and can_run and fits else "torch"
        if q.is_cuda and impl == "torch":
            warnings.warn(f"sep_attention runs in plain PyTorch; the kernel needs {needs}",
                          stacklevel=2)
    if impl == "torch":
        return _attention_torch(q, k, v, layout, window, sinks)
    require(can_run and fits, f"impl='triton' needs {needs}")
    q, k, v, *layout = (x.contiguous() for x in (q, k, v, *layout))
    out, _ = _attention(q, k, v, layout, min(window, T), sinks)
    return out


# ---- plain PyTorch: blocks of queries, each over the few keys that it can see --------------------

BLOCK = 64  # queries; larger blocks share more keys, and mask more of them


def _attention_torch(q, k, v, layout, window, sinks):
    """`sep_attention` without Triton; time and memory are linear in T.

    The queries are cut into blocks. A block's keys are [sinks | its range of the far list | its
    windows' rows], gathered for all blocks at once and padded to the longest; then each block is
    one dense attention with a small mask.
    """
    B, H, T, D = q.shape
    rows, visible = _keys_of_blocks(layout, window, sinks)
    _, N, M = rows.shape
    mask = torch.where(visible, 0.0, -torch.inf).to(q.dtype)

    def gather(x):
        x = x.transpose(1, 2).reshape(B * T, H * D)
        x = x.index_select(0, rows.flatten())  # its gradient adds up whole rows, which is fast
        return x.view(B * N, M, H, D).transpose(1, 2)  # (B N, H, M, D)

    q = F.pad(q, (0, 0, 0, N * BLOCK - T))
    q = q.view(B, H, N, BLOCK, D).transpose(1, 2)
    q = q.reshape(B * N, H, BLOCK, D)
    out = F.scaled_dot_product_attention(q, gather(k), gather(v), mask.flatten(0, 1)[:, None])
    out = out.view(B, N, H, BLOCK, D).transpose(1, 2)
    return out.flatten(2, 3)[:, :, :T]


def _keys_of_blocks(layout, window, sinks):
    """The M keys of each of N blocks of queries.

    rows (B, N, M): their rows, counted through the whole batch
    visible (B, N, BLOCK, M) bool: which of them each query of the block sees
    """
    far, start, stop, reach = layout
    B, T = far.shape
    device = far.device
    sequence = torch.arange(B, device=device)[:, None, None]
    n_blocks = -(-T // BLOCK)
    query = torch.arange(n_blocks * BLOCK, dtype=torch.int32, device=device)
    query = query.view(n_blocks, BLOCK)
    first_query = query[:, :1]  # (N, 1)
    query = query.clamp(max=T - 1)  # those past the end repeat the last

    # what the first query of a block sees of the far list. What later queries see of it in
    # addition was still in the window of the first, so it is among the rows of the windows below.
    start = start[:, first_query]  # (B, N, 1)
    stop = stop[:, first_query]
    n_sinks = min(sinks, T)
    longest = int((stop - start).max())
    entry = torch.arange(n_sinks + longest, device=device)
    entry = torch.where(entry < n_sinks, entry, entry - n_sinks + start)  # (B, N, entries)
    far_row = far[sequence, entry.clamp(max=T - 1)]
    far_row = far_row.where(entry < stop, T)  # T: a row that no query sees

    # the rows of the windows of all queries of a block
    width = min(window + BLOCK - 1, T + BLOCK)
    offset = torch.arange(width, dtype=torch.int32, device=device)
    near_row = first_query + BLOCK - width + offset
    near_row = near_row.where(near_row >= 0, T)  # (N, width)

    row = torch.cat([far_row, near_row.expand(B, -1, -1)], dim=-1)  # (B, N, M)
    row_to_load = row.clamp(max=T - 1)
    reach = reach[sequence, row_to_load]
    distance = query[:, :, None] - row[:, :, None]  # (B, N, BLOCK, M)
    visible = (distance >= 0) & (distance < reach[:, :, None])
    return sequence * T + row_to_load, visible


# ---- Triton --------------------------------------------------------------------------------------
#
# Forward. Scores stay unscaled, as qk; the exponents scale them, to base 2 at once, since the
# exponential of a GPU is 2^x: scale = D^-0.5 * log2(e). Neither the sum of the exponentials nor the
# largest score is known before all keys have been seen, so online softmax keeps m_i, the largest
# qk * scale so far, l_i, the sum of 2^(qk * scale - m_i), and acc, that of 2^(qk * scale - m_i) v;
# when m_i grows, both sums shrink by alpha = 2^(m_old - m_new). In the end
#
#     out = acc / l_i        lse = m_i + log2(l_i)        p = 2^(qk * scale - lse)
#
# Backward. Only out and lse are kept, and the scores are computed again. Every tile stands alone:
#
#     dv = p^T do        dp = do v^T        ds = p * (dp - delta)        delta = rowsum(do * out)
#     dq = ds k * D^-0.5                    dk = ds^T q * D^-0.5
#
# delta is what the softmax's normalisation takes back: rowsum(p * dp) = do . (p v) = do . out.
#
# Tensors are contiguous, and the grid is (H, blocks, B). Indices are clamped where other kernels
# mask loads and stores: a load past the end repeats a row of the block, and a store past the end
# stores what that row stores. In FAR, START, STOP and REACH, a text's numbers begin at `text`; in
# the other tensors, a head's rows begin at `head`.

if triton is None:
    def jit(function):
        return function
    kernel = jit
else:
    jit = triton.jit
    # integers do not become part of the compiled program: one compilation serves all lengths
    kernel = triton.jit(do_not_specialize=["T", "window", "sinks"])
    LOG2E = tl.constexpr(math.log2(math.e))
    STAGES = tl.constexpr(3)  # tiles in flight or in use
    INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@jit
def _dot(a, b):
    """A matrix product summed in float32; float32 inputs are not rounded to tf32."""
    if INTERPRETED:  # the interpreter keeps bf16 as bare bits, and would multiply those
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@jit
def _load(X, row, D: tl.constexpr):
    return tl.load(X + row[:, None] * D + tl.arange(0, D))


@jit
def _store(X, row, x, D: tl.constexpr):
    x = x.to(X.dtype.element_ty)
    tl.store(X + row[:, None] * D + tl.arange(0, D), x)


@jit
def _my_block(T, BLOCK: tl.constexpr):
    """Where a program's text and head begin, and the numbers of its BLOCK queries or keys."""
    b = tl.program_id(2).to(tl.int64)
    bh = b * tl.num_programs(0) + tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return b * T, bh * T, tl.minimum(i, T - 1)


# -- a program owns BLOCK queries, and takes one step per tile of keys that they see


@jit
def _over_keys(step: tl.constexpr, state, given, K, V, FAR, START, STOP, REACH,
               t, text, head, window, sinks, T, D: tl.constexpr, TILE: tl.constexpr):
    """state = step(state, given, k, v, visible) for all keys of the queries t (BLOCK,).

    The first two loops are over what has left the window of the first query: its sinks, and the
    entries of far up to its `stop`. All queries see those between the largest `start` and `stop`,
    so whole tiles of them, which end at `stop`, need no mask. They are the first loop:

        smallest start       largest start     masked_stop                              stop
        [ some queries see these | all see these [ tiles that need no mask                 )

    The second loop takes those left of them, and the sinks; no `start` is below those. The third
    is over the rows of the windows. What only a later query sees as far is still among them, and
    its reach says so.
    """
    K += head * D
    V += head * D
    FAR += text
    REACH += text
    tile = tl.arange(0, TILE)
    first = tl.min(t, 0)
    stop = tl.load(STOP + text + first)
    start = tl.load(START + text + t)
    start = tl.minimum(start, stop)
    n_full = (stop - tl.max(start, 0)) // TILE
    masked_stop = stop - n_full * TILE
    # a gathered loop needs two stages more, since it loads the numbers of its rows first
    for entry0 in tl.range(masked_stop, stop, TILE, num_stages=STAGES + 2):
        row = tl.load(FAR + entry0 + tile)
        state = step(state, given, _load(K, row, D), _load(V, row, D), None)

    # the sinks, the first entries of far, count as those from masked_stop on
    end = masked_stop + tl.minimum(sinks, stop)
    for entry0 in tl.range(tl.min(start, 0), end, TILE, num_stages=STAGES + 2):
        entry = entry0 + tile
        to_load = tl.where(entry < masked_stop, entry, entry - masked_stop)
        row = tl.load(FAR + tl.minimum(to_load, T - 1))
        visible = (entry >= start[:, None]) & (entry < end)
        state = step(state, given, _load(K, row, D), _load(V, row, D), visible)

    first_row = tl.maximum(first - window + 1, 0)
    for row0 in tl.range(first_row, tl.max(t, 0) + 1, TILE, num_stages=STAGES):
        row = row0 + tile
        to_load = tl.minimum(row, T - 1)
        end_query = row + tl.load(REACH + to_load)
        visible = (row <= t[:, None]) & (t[:, None] < end_query)
        state = step(state, given, _load(K, to_load, D), _load(V, to_load, D), visible)
    return state


@jit
def _softmax_step(state, q, k, v, visible):
    acc, m_i, l_i = state
    scale: tl.constexpr = k.shape[1] ** -0.5 * LOG2E
    qk = _dot(q, tl.trans(k))  # (BLOCK, TILE)
    if visible is not None:
        qk = tl.where(visible, qk, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(qk, 1) * scale)
    alpha = tl.exp2(m_i - m_new)
    p = tl.exp2(qk * scale - m_new[:, None])
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None] + _dot(p.to(v.dtype), v)
    return acc, m_new, l_i


@kernel
def _forward(Q, K, V, FAR, START, STOP, REACH, OUT, LSE, window, sinks,
             T, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The output of BLOCK queries of one head, and the log-sum-exp of their scores."""
    text, head, i = _my_block(T, BLOCK)
    t = T - 1 - i  # the last queries, which see the most keys, start first
    q = _load(Q + head * D, t, D)
    acc = tl.zeros([BLOCK, D], tl.float32)
    m_i = tl.full([BLOCK], -1e30, tl.float32)  # not -inf: before the first key, m_i - m_new is 0
    l_i = tl.zeros([BLOCK], tl.float32)
    acc, m_i, l_i = _over_keys(
        _softmax_step, (acc, m_i, l_i), q,
        K, V, FAR, START, STOP, REACH,
        t, text, head, window, sinks, T, D, TILE)
    _store(OUT + head * D, t, acc / l_i[:, None], D)
    tl.store(LSE + head + t, m_i + tl.log2(l_i))


@jit
def _dq_step(dq, given, k, v, visible):
    q, do, lse, delta = given
    scale: tl.constexpr = k.shape[1] ** -0.5 * LOG2E
    qk = _dot(q, tl.trans(k))  # (BLOCK, TILE)
    if visible is not None:
        qk = tl.where(visible, qk, float("-inf"))
    p = tl.exp2(qk * scale - lse[:, None])
    dp = _dot(do, tl.trans(v))
    ds = p * (dp - delta[:, None])
    return dq + _dot(ds.to(k.dtype), k)


@kernel
def _backward_dq(Q, K, V, FAR, START, STOP, REACH, OUT, LSE, DO, DQ, DELTA, window, sinks,
                 T, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """dq and delta of BLOCK queries of one head."""
    text, head, i = _my_block(T, BLOCK)
    t = T - 1 - i
    q = _load(Q + head * D, t, D)
    do = _load(DO + head * D, t, D)
    out = _load(OUT + head * D, t, D)
    lse = tl.load(LSE + head + t)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + head + t, delta)  # for dk and dv
    dq = tl.zeros([BLOCK, D], tl.float32)
    dq = _over_keys(
        _dq_step, dq, (q, do, lse, delta),
        K, V, FAR, START, STOP, REACH,
        t, text, head, window, sinks, T, D, TILE)
    _store(DQ + head * D, t, dq * D ** -0.5, D)


# -- a program owns BLOCK keys, and loops over the queries that see them


@kernel
def _backward_dkdv(Q, K, V, FAR, REACH, LSE, DO, DELTA, DK, DV,
                   T, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """dk and dv of BLOCK keys of one head.

    Keys come in the order of far, so that most blocks hold keys that are near each other in the
    text and reach about as far, and those that reach far start first. Each row is in far once, and
    a key is seen by one unbroken range of queries: so no two programs add to the same gradient.
    """
    scale: tl.constexpr = D ** -0.5 * LOG2E
    text, head, entry = _my_block(T, BLOCK)
    row = tl.load(FAR + text + entry)
    reach = tl.load(REACH + text + row)
    end = tl.minimum(row + reach, T)  # the queries [row, end) see each key
    k = _load(K + head * D, row, D)
    v = _load(V + head * D, row, D)
    dk = tl.zeros([BLOCK, D], tl.float32)
    dv = tl.zeros([BLOCK, D], tl.float32)
    for t0 in tl.range(tl.min(row, 0), tl.max(end, 0), TILE, num_stages=STAGES):
        t = t0 + tl.arange(0, TILE)
        visible = (t >= row[:, None]) & (t < end[:, None])
        t = tl.minimum(t, T - 1)
        q = _load(Q + head * D, t, D)  # (TILE, D)
        do = _load(DO + head * D, t, D)
        lse = tl.load(LSE + head + t)
        delta = tl.load(DELTA + head + t)
        qkT = _dot(k, tl.trans(q))  # (BLOCK, TILE)
        qkT = tl.where(visible, qkT, float("-inf"))
        pT = tl.exp2(qkT * scale - lse)
        dv += _dot(pT.to(do.dtype), do)
        dpT = _dot(v, tl.trans(do))
        dsT = pT * (dpT - delta)
        dk += _dot(dsT.to(q.dtype), q)
    _store(DK + head * D, row, dk * D ** -0.5, D)
    _store(DV + head * D, row, dv, D)


# -- launches


def _launch(program, q, *args):
    """Launch a kernel over blocks of rows of every head. The sizes fit all GPUs."""
    B, H, T, D = q.shape
    block = 64
    tile = 64 if D <= 64 else 32
    if q.dtype == torch.float32:  # without tensor cores
        block = tile = 16
    grid = H, triton.cdiv(T, block), B
    with torch.cuda.device_of(q):
        program[grid](q, *args, T, D, block, tile, num_warps=4, enable_fp_fusion=True)


@library.custom_op("nanosep::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, layout: list[Tensor],
               window: int, sinks: int) -> tuple[Tensor, Tensor]:
    """The output (B, H, T, D) and the log-sum-exp of the scores in base 2, (B, H, T) float32."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    _launch(_forward, q, k, v, *layout, out, lse, window, sinks)
    return out, lse


@library.custom_op("nanosep::attention_backward", mutates_args=())
def _attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: list[Tensor],
                        window: int, sinks: int, out: Tensor,
                        lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv. `_backward_dq` writes delta, which `_backward_dkdv` reads."""
    far, _, _, reach = layout
    do = do.contiguous()
    dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
    _launch(_backward_dq, q, k, v, *layout, out, lse, do, dq, delta, window, sinks)
    _launch(_backward_dkdv, q, k, v, far, reach, lse, do, delta, dk, dv)
    return dq, dk, dv


@_attention.register_fake
def _(q, *_):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_attention_backward.register_fake
def _(do, q, k, v, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_for_backward(ctx, inputs, output):
    q, k, v, layout, ctx.window, ctx.sinks = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, *layout, out, lse)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, do, _):
    q, k, v, *layout, out, lse = ctx.saved_tensors
    gradients = _attention_backward(do, q, k, v, layout, ctx.window, ctx.sinks, out, lse)
    return *gradients, [None] * len(layout), None, None


_attention.register_autograd(_backward, setup_context=_save_for_backward)
