"""Attention over a far list and a window: the interface, plain PyTorch, and Triton.

The one idea: nothing searches for separators. What a query sees is its window and two ranges of the
far list (`SepLayout` in `sep_cache.py`), so sparse attention is flash attention whose loops run
over ranges. And each key is seen by one unbroken range of queries, [row, row + reach), so its
gradient is flash attention's loop over queries.

Read `sep_attention` and the PyTorch form after the far list in `sep_cache.py`; the Triton form when
you know flash attention (arXiv 2205.14135), best beside Triton's fused-attention tutorial.
`python sep_kernel.py` runs the kernel's tests.
"""
from __future__ import annotations  # without triton there is no `tl` to annotate with

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

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
        impl: "triton" (bf16, fp16 or fp32; D 16, 32, 64 or 128; T at most 4,000,000), "torch" (any
            floating dtype), or "auto": triton on a GPU, torch elsewhere.

    Returns (B, H, T, D), differentiable in q, k and v.
    Raises ValueError for an unknown impl, for q, k and v of different dtypes, and where
    impl="triton" cannot do what is asked.
    """
    T, D = q.shape[2:]
    require(q.dtype == k.dtype == v.dtype,
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, and must agree")
    require(impl in ("auto", "triton", "torch"),
            f"impl is {impl!r}, and must be auto, triton or torch")
    fits = (D in (16, 32, 64, 128) and T <= 4_000_000
            and q.dtype in (torch.bfloat16, torch.float16, torch.float32))
    can_run = triton is not None and (q.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
    needs = ("triton, a CUDA device, D 16, 32, 64 or 128, bf16, fp16 or fp32, and T at most "
             f"4,000,000; given: D {D}, {q.dtype}, {q.device}, T {T}")
    if impl == "auto":
        impl = "triton" if q.is_cuda and can_run and fits else "torch"
        if q.is_cuda and impl == "torch":
            warnings.warn(f"sep_attention runs in plain PyTorch; the kernel needs {needs}",
                          stacklevel=2)
    if impl == "torch":
        return _attention_torch(q, k, v, layout, window, sinks)
    require(can_run and fits, f"impl='triton' needs {needs}")
    out, _ = _attention(q, k, v, *layout, min(window, T), sinks)
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
    rows, mask = _keys_of_blocks(layout, window, sinks, q.dtype)
    _, N, M = rows.shape

    def gather(x):
        x = x.transpose(1, 2).reshape(B * T, H * D)
        x = x.index_select(0, rows.flatten())  # its gradient adds up whole rows, which is fast
        return x.view(B * N, M, H, D).transpose(1, 2)  # (B N, H, M, D)

    q = F.pad(q, (0, 0, 0, N * BLOCK - T)).view(B, H, N, BLOCK, D)
    q = q.transpose(1, 2).reshape(B * N, H, BLOCK, D)
    out = F.scaled_dot_product_attention(q, gather(k), gather(v), mask)
    out = out.view(B, N, H, BLOCK, D).transpose(1, 2)  # (B, H, N, BLOCK, D)
    return out.flatten(2, 3)[:, :, :T]


def _keys_of_blocks(layout, window, sinks, dtype):
    """The M keys of each of N blocks of queries.

    rows (B, N, M): their rows, counted through the whole batch
    mask (B N, 1, BLOCK, M): 0 where a query of the block sees a key, else -inf
    """
    far, start, stop, reach = layout
    B, T = far.shape
    query = torch.arange(-(-T // BLOCK) * BLOCK, device=far.device).view(-1, BLOCK)  # (N, BLOCK)
    first_query = query[:, :1]  # (N, 1)

    # what the first query of a block sees of the far list. The others see nothing more of it that
    # is not in their windows, or that was not in the window of the first.
    start, stop = start[:, first_query], stop[:, first_query]  # (B, N, 1)
    longest = int((stop - start).max())
    sink_entry = torch.arange(min(sinks, T), device=far.device).expand(B, len(query), -1)
    entry = torch.cat([sink_entry, start + torch.arange(longest, device=far.device)], dim=-1)
    far_row = far.gather(1, entry.clamp(max=T - 1).flatten(1)).view(entry.shape)
    far_row = far_row.where(entry < stop, T)  # T: no row

    # the rows of the windows of all queries of a block
    width = min(window + BLOCK - 1, T + BLOCK)
    near_row = first_query + BLOCK - width + torch.arange(width, device=far.device)
    near_row = near_row.where((near_row >= 0) & (near_row < T), T)  # (N, width)

    row = torch.cat([far_row, near_row.expand(B, -1, -1)], dim=-1)[:, :, None]  # (B, N, 1, M)
    reach = F.pad(reach, (0, 1)).gather(1, row.long().flatten(1)).view(row.shape)
    distance = query.clamp(max=T - 1)[:, :, None] - row  # those past the end repeat the last
    mask = torch.where((distance >= 0) & (distance < reach), 0.0, -torch.inf).to(dtype)
    sequence = torch.arange(B, device=far.device)[:, None, None]
    return sequence * T + row[:, :, 0].clamp(max=T - 1), mask.flatten(0, 1)[:, None]


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
# mask loads and stores: a load past the end repeats the last row, and a store past the end stores
# what the last row stores.

if triton is None:
    def jit(function):
        return function
    kernel = jit
else:
    jit = triton.jit
    # integers do not become part of the compiled program: one compilation serves all lengths
    kernel = triton.jit(do_not_specialize=["T", "window", "sinks"])
    LOG2E = tl.constexpr(math.log2(math.e))
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
    tl.store(X + row[:, None] * D + tl.arange(0, D), x.to(X.dtype.element_ty))


# -- a program owns BLOCK queries, and takes one step per tile of keys that they see


@jit
def _query_block(T, BLOCK: tl.constexpr):
    """A program's sequence b, its head bh of all B * H, and its queries t (BLOCK,).

    The last block, which sees the most keys, starts first.
    """
    b = tl.program_id(2).to(tl.int64)
    bh = b * tl.num_programs(0) + tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    return b, bh, tl.minimum(block * BLOCK + tl.arange(0, BLOCK), T - 1)


@jit
def _over_keys(step: tl.constexpr, state, given, K, V, FAR, START, STOP, REACH,
               t, T, window, sinks, D: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr):
    """state = step(state, given, k, v, visible, D) for all keys of the queries t (BLOCK,).

    First the entries of far that have left the window of the first query, from `stop` to the left.
    All queries see those between the largest `start` and `stop`, so as many whole tiles of them as
    there are need no mask:

        smallest start       largest start       full                                   stop
        [ some queries see these | all see these [ tiles that need no mask                 )

    Those left of `full` and the sinks make the second loop. The third is over the rows of the
    windows; among them is each entry of far that leaves the window of a later query.
    """
    tile = tl.arange(0, TILE)
    stop = tl.load(STOP + tl.min(t, 0))
    start = tl.minimum(tl.load(START + t), stop)
    full = stop - (stop - tl.max(start, 0)) // TILE * TILE
    # a gathered loop needs two stages more, since it loads the numbers of its rows first
    for entry0 in tl.range(full, stop, TILE, num_stages=STAGES + 2):
        row = tl.load(FAR + entry0 + tile)
        state = step(state, given, _load(K, row, D), _load(V, row, D), None, D)

    end = full + tl.minimum(sinks, stop)  # the sinks count as entries from `full` on
    for entry0 in tl.range(tl.min(start, 0), end, TILE, num_stages=STAGES + 2):
        entry = entry0 + tile
        row = tl.load(FAR + tl.minimum(tl.where(entry < full, entry, entry - full), T - 1))
        visible = (entry >= start[:, None]) & (entry < end)
        state = step(state, given, _load(K, row, D), _load(V, row, D), visible, D)

    first_row = tl.maximum(tl.min(t, 0) - window + 1, 0)
    for row0 in tl.range(first_row, tl.max(t, 0) + 1, TILE, num_stages=STAGES):
        row = row0 + tile
        row_to_load = tl.minimum(row, T - 1)
        reach = tl.load(REACH + row_to_load)
        visible = (row <= t[:, None]) & (t[:, None] < row + reach)
        state = step(state, given, _load(K, row_to_load, D), _load(V, row_to_load, D), visible, D)
    return state


@jit
def _softmax_step(state, q, k, v, visible, D: tl.constexpr):
    acc, m_i, l_i = state
    scale: tl.constexpr = D ** -0.5 * LOG2E
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
def _forward(Q, K, V, FAR, START, STOP, REACH, OUT, LSE, T, window, sinks,
             D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr):
    """The output of BLOCK queries of one head, and the log-sum-exp of their scores."""
    b, bh, t = _query_block(T, BLOCK)
    q = _load(Q + bh * T * D, t, D)
    acc = tl.zeros([BLOCK, D], tl.float32)
    m_i = tl.full([BLOCK], -1e30, tl.float32)  # not -inf: m_i - m_new of a row without keys is 0
    l_i = tl.zeros([BLOCK], tl.float32)
    acc, m_i, l_i = _over_keys(
        _softmax_step, (acc, m_i, l_i), q, K + bh * T * D, V + bh * T * D, FAR + b * T,
        START + b * T, STOP + b * T, REACH + b * T, t, T, window, sinks, D, TILE, STAGES)
    _store(OUT + bh * T * D, t, acc / l_i[:, None], D)
    tl.store(LSE + bh * T + t, m_i + tl.log2(l_i))


@jit
def _dq_step(dq, given, k, v, visible, D: tl.constexpr):
    q, do, lse, delta = given
    scale: tl.constexpr = D ** -0.5 * LOG2E
    qk = _dot(q, tl.trans(k))  # (BLOCK, TILE)
    if visible is not None:
        qk = tl.where(visible, qk, float("-inf"))
    p = tl.exp2(qk * scale - lse[:, None])
    dp = _dot(do, tl.trans(v))
    ds = p * (dp - delta[:, None])
    return dq + _dot(ds.to(k.dtype), k)


@kernel
def _backward_dq(Q, K, V, FAR, START, STOP, REACH, OUT, LSE, DO, DQ, DELTA, T, window, sinks,
                 D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr):
    """dq and delta of BLOCK queries of one head."""
    b, bh, t = _query_block(T, BLOCK)
    q = _load(Q + bh * T * D, t, D)
    do = _load(DO + bh * T * D, t, D)
    out = _load(OUT + bh * T * D, t, D)
    lse = tl.load(LSE + bh * T + t)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + bh * T + t, delta)  # for dk and dv
    dq = tl.zeros([BLOCK, D], tl.float32)
    dq = _over_keys(
        _dq_step, dq, (q, do, lse, delta), K + bh * T * D, V + bh * T * D, FAR + b * T,
        START + b * T, STOP + b * T, REACH + b * T, t, T, window, sinks, D, TILE, STAGES)
    _store(DQ + bh * T * D, t, dq * D ** -0.5, D)


# -- a program owns BLOCK keys, and loops over the queries that see them


@kernel
def _backward_dkdv(Q, K, V, FAR, REACH, LSE, DO, DELTA, DK, DV, T,
                   D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr):
    """dk and dv of BLOCK keys of one head.

    Keys come in the order of far, so that those of a block are near each other in the text and
    reach about as far, and those that reach far start first.
    """
    scale: tl.constexpr = D ** -0.5 * LOG2E
    b = tl.program_id(2).to(tl.int64)
    bh = b * tl.num_programs(0) + tl.program_id(0)
    entry = tl.minimum(tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), T - 1)
    row = tl.load(FAR + b * T + entry)
    end = tl.minimum(row + tl.load(REACH + b * T + row), T)  # the queries [row, end) see each key
    k = _load(K + bh * T * D, row, D)
    v = _load(V + bh * T * D, row, D)
    dk = tl.zeros([BLOCK, D], tl.float32)
    dv = tl.zeros([BLOCK, D], tl.float32)
    for t0 in tl.range(tl.min(row, 0), tl.max(end, 0), TILE, num_stages=STAGES):
        t = t0 + tl.arange(0, TILE)
        visible = (t >= row[:, None]) & (t < end[:, None])
        t = tl.minimum(t, T - 1)
        q = _load(Q + bh * T * D, t, D)  # (TILE, D)
        do = _load(DO + bh * T * D, t, D)
        qkT = _dot(k, tl.trans(q))  # (BLOCK, TILE)
        qkT = tl.where(visible, qkT, float("-inf"))
        pT = tl.exp2(qkT * scale - tl.load(LSE + bh * T + t))
        dv += _dot(pT.to(do.dtype), do)
        dpT = _dot(v, tl.trans(do))
        dsT = pT * (dpT - tl.load(DELTA + bh * T + t))
        dk += _dot(dsT.to(q.dtype), q)
    _store(DK + bh * T * D, row, dk * D ** -0.5, D)
    _store(DV + bh * T * D, row, dv, D)


# -- launches


def _launch(kernel, q, *args):
    """Launch a kernel over blocks of rows of every head. The sizes fit all GPUs."""
    B, H, T, D = q.shape
    block = 64
    tile = 64 if D <= 64 else 32
    if q.dtype == torch.float32:  # without tensor cores
        block = tile = 16
    options = dict(num_warps=4, enable_fp_fusion=True)
    if torch.version.hip is None and D <= 64:
        options["maxnreg"] = 168  # registers per thread: three programs fit on a multiprocessor
    with torch.cuda.device_of(q):
        # STAGES: tiles in flight or in use
        kernel[H, triton.cdiv(T, block), B](*args, D=D, BLOCK=block, TILE=tile, STAGES=3, **options)


@library.custom_op("nanosep::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, far: Tensor, start: Tensor, stop: Tensor,
               reach: Tensor, window: int, sinks: int) -> tuple[Tensor, Tensor]:
    """The output (B, H, T, D) and the log-sum-exp of the scores in base 2, (B, H, T) float32."""
    q, k, v, far, start, stop, reach = (
        x.contiguous() for x in (q, k, v, far, start, stop, reach))
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    _launch(_forward, q, q, k, v, far, start, stop, reach, out, lse, q.shape[2], window, sinks)
    return out, lse


@library.custom_op("nanosep::attention_backward", mutates_args=())
def _attention_backward(
        do: Tensor, q: Tensor, k: Tensor, v: Tensor, far: Tensor, start: Tensor, stop: Tensor,
        reach: Tensor, window: int, sinks: int, out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv. `_backward_dq` writes delta, which `_backward_dkdv` reads."""
    T = q.shape[2]
    do, q, k, v, far, start, stop, reach = (
        x.contiguous() for x in (do, q, k, v, far, start, stop, reach))
    dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
    _launch(_backward_dq, q, q, k, v, far, start, stop, reach, out, lse, do, dq, delta,
            T, window, sinks)
    _launch(_backward_dkdv, q, q, k, v, far, reach, lse, do, delta, dk, dv, T)
    return dq, dk, dv


@_attention.register_fake
def _(q, k, v, far, start, stop, reach, window, sinks):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@_attention_backward.register_fake
def _(do, q, k, v, far, start, stop, reach, window, sinks, out, lse):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.window, ctx.sinks = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])  # lse


def _backward(ctx, do, _):
    *inputs, out, lse = ctx.saved_tensors
    gradients = _attention_backward(do, *inputs, ctx.window, ctx.sinks, out, lse)
    return *gradients, None, None, None, None, None, None


_attention.register_autograd(_backward, setup_context=_save_for_backward)


if __name__ == "__main__":
    tests = Path(__file__).parent / "tests" / "test_kernel.py"
    sys.exit(subprocess.run([sys.executable, "-m", "pytest", "-q", str(tests)]).returncode)
