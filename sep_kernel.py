"""Softmax attention over "far list + window": one Triton kernel, forward and backward, and its reference in plain PyTorch.

The one idea: the kernel never looks for separators. Every visible set is an interval [lo, hi) of a list (`sep_cache.py`),
so a program owns a block of rows and *walks* intervals: queries walk the sinks, the separators (rows gathered through the
list) and the window; backward, a key walks the queries that saw it, again an interval. Tiles inside all of a block's
intervals need no mask; only the tiles at the edges do. Read after `sep_cache.py`; flash attention (arXiv 2205.14135) helps.
`python sep_kernel.py` checks the kernel against float64 and, on a GPU, prints the benchmark.
"""
from __future__ import annotations

import math
import os
import warnings

import torch
import torch.nn.functional as F

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # has to be set before triton is imported
try:
    import triton
    import triton.language as tl
    jit, INTERPRET = triton.jit, tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
except ImportError:  # on a Mac, say: the reference serves
    triton, jit = None, lambda function: function

NO_LIMIT = 1 << 30
SPLIT = 4  # programs that share the queries of one block of far keys


def ranks(far, n_far, n_rows):
    """The far list turned round: (B, n_rows), the entry of the list that is at each row, or S where none ever becomes far."""
    (B, S), entries = far.shape, torch.arange(far.shape[1], device=far.device).expand(far.shape)
    rows = torch.where(entries < n_far[:, -1:], far, n_rows).long()  # what nobody sees goes to a row behind the last
    return entries.new_full((B, n_rows + 1), S).scatter_(1, rows, entries)[:, :n_rows]


def sep_attention_reference(q, k, v, far, n_far, window, sinks=0, max_seps=None, q_sink=None):
    """`sep_attention` in plain PyTorch with a dense mask: the specification. Any dtype, float64 included."""
    (Tq, D), Tk = q.shape[2:], k.shape[2]
    ahead = torch.arange(Tk - Tq, Tk, device=q.device)[:, None] - torch.arange(Tk, device=q.device)  # (Tq, Tk)
    rank, n = ranks(far, n_far, Tk)[:, None, :], n_far[:, :, None]  # (B, 1, Tk), (B, Tq, 1)
    sink = (rank < n) & (rank < sinks)  # (B, Tq, Tk)
    sep = (rank < n) & (rank >= sinks) & (rank >= n - (NO_LIMIT if max_seps is None else max_seps))
    visible = ((0 <= ahead) & (ahead < window) | sink | sep)[:, None]  # (B, 1, Tq, Tk)
    if q_sink is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    scores = torch.where(sink[:, None], q_sink @ k.mT, q @ k.mT) * D ** -0.5  # (B, H, Tq, Tk)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v


# ---- the kernel. Tensors are contiguous, (B * H, rows, D); a program finds its own rows behind a 64-bit offset.


@jit
def _dot(a, b):
    """A matrix product summed in float32; float32 inputs are not rounded to tf32."""
    if INTERPRET:  # the interpreter holds bf16 as bare bits, and would multiply those
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@jit
def _plan(lo, hi, TILE: tl.constexpr):
    """How a block walks its rows' intervals [lo, hi): from `start`, `inner` tiles that all of its rows see whole, and
    `head` masked tiles before and the rest of `edges` masked tiles behind these."""
    start = tl.max(lo, 0)
    inner = tl.maximum(tl.min(hi, 0) - start, 0) // TILE
    head = tl.cdiv(start - tl.min(lo, 0), TILE)
    tail = tl.cdiv(tl.maximum(tl.max(hi, 0) - start - inner * TILE, 0), TILE)
    return start, inner, head, head + tail


@jit
def _tile(i, inner, head, MASK: tl.constexpr):
    """The place of the i-th inner tile, or with MASK of the i-th edge tile, counted in tiles from the plan's start."""
    return i - head + tl.where(i < head, 0, inner) if MASK else i


@jit
def _step(acc, m, l, q, do, k, v, visible, scale, MASK: tl.constexpr, BACKWARD: tl.constexpr):
    """One tile of keys for a block of queries. Forward: online softmax, m the maximum and l the sum so far.
    Backward: adds to dq, with m the log-sum-exp and l the delta of each query."""
    s = _dot(q, tl.trans(k)) * scale  # (BLOCK, TILE), in base 2
    if MASK:
        s = tl.where(visible, s, float("-inf"))
    if BACKWARD:
        ds = tl.exp2(s - m[:, None]) * (_dot(do, tl.trans(v)) - l[:, None])
        return acc + _dot(ds.to(k.dtype), k), m, l
    new_m = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - new_m[:, None])
    shrink = tl.exp2(m - new_m)
    acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v)
    return acc, new_m, l * shrink + tl.sum(p, 1)


@jit
def _walk(acc, m, l, q, do, K, V, FAR, lo, hi, scale, D: tl.constexpr, TILE: tl.constexpr, GATHER: tl.constexpr,
          BACKWARD: tl.constexpr):
    """A block of queries over the entries [lo, hi) of a list: rows FAR[entry] of K and V, or without GATHER rows entry."""
    start, inner, head, edges = _plan(lo, hi, TILE)
    first, last = tl.min(lo, 0), tl.max(hi, 0)
    for MASK in tl.static_range(2):
        for i in range(edges if MASK else inner):
            entry = start + _tile(i, inner, head, MASK) * TILE + tl.arange(0, TILE)
            row = tl.minimum(tl.maximum(entry, first), last - 1) if MASK else entry
            if GATHER:
                row = tl.load(FAR + row)
            at = row[:, None] * D + tl.arange(0, D)
            visible = (entry >= lo[:, None]) & (entry < hi[:, None])  # without MASK nobody looks at it
            acc, m, l = _step(acc, m, l, q, do, tl.load(K + at), tl.load(V + at), visible, scale, MASK, BACKWARD)
    return acc, m, l


@jit
def _queries(Q, Q_SINK, K, V, FAR, N_FAR, O, LSE, DO, DELTA, DQ, DQ_SINK, H, Tq, Tk, S, window, sinks, max_seps, scale,
             D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SINKS: tl.constexpr, APART: tl.constexpr,
             BACKWARD: tl.constexpr):
    """Each program owns BLOCK queries of one head. Forward: their output and log-sum-exp. BACKWARD: their delta and dq.
    SINKS: whether there are any; APART: whether the sinks are met by a query of their own."""
    blocks = tl.cdiv(Tq, BLOCK)
    bh, block = tl.program_id(0) // blocks, blocks - 1 - tl.program_id(0) % blocks  # the longest lists first
    rows, keys, b = bh.to(tl.int64) * Tq, bh.to(tl.int64) * Tk * D, (bh // H).to(tl.int64)
    t = block * BLOCK + tl.arange(0, BLOCK)
    own = t < Tq
    t = tl.minimum(t, Tq - 1)  # rows behind the last do as the last one does, and are not stored
    at = t[:, None] * D + tl.arange(0, D)  # (BLOCK, D)
    n = tl.load(N_FAR + b * Tq + t)  # far entries behind each query
    FAR, K, V = FAR + b * S, K + keys, V + keys
    Q, Q_SINK, O, LSE = Q + rows * D, Q_SINK + rows * D, O + rows * D, LSE + rows
    if BACKWARD:
        DO, DELTA, DQ = DO + rows * D, DELTA + rows, DQ + rows * D
    acc = tl.zeros([BLOCK, D], tl.float32)
    q = tl.load(Q + at)
    if BACKWARD:
        do = tl.load(DO + at)
        m = tl.load(LSE + t)
        l = tl.sum(tl.load(O + at).to(tl.float32) * do.to(tl.float32), 1)
        tl.store(DELTA + t, l, mask=own)
    else:
        do = q
        m, l = tl.full([BLOCK], -1e30, tl.float32), tl.zeros([BLOCK], tl.float32)
    if SINKS:
        meet = tl.load(Q_SINK + at) if APART else q
        acc, m, l = _walk(acc, m, l, meet, do, K, V, FAR, tl.zeros_like(n), tl.minimum(n, sinks), scale, D, 16, True, BACKWARD)
    if APART and BACKWARD:
        tl.store(DQ_SINK + rows * D + at, (acc * (scale * 0.6931471805599453)).to(q.dtype), mask=own[:, None])
        acc = tl.zeros([BLOCK, D], tl.float32)
    acc, m, l = _walk(acc, m, l, q, do, K, V, FAR, tl.maximum(n - max_seps, tl.minimum(n, sinks)), n, scale, D, TILE, True,
                      BACKWARD)
    row = Tk - Tq + t
    acc, m, l = _walk(acc, m, l, q, do, K, V, FAR, tl.maximum(row - window + 1, 0), row + 1, scale, D, TILE, False, BACKWARD)
    if BACKWARD:
        tl.store(DQ + at, (acc * (scale * 0.6931471805599453)).to(q.dtype), mask=own[:, None])
    else:
        tl.store(O + at, (acc / l[:, None]).to(q.dtype), mask=own[:, None])
        tl.store(LSE + t, m + tl.log2(l), mask=own)


@jit
def _key_step(dk, dv, k, v, q, do, lse, delta, visible, scale, MASK: tl.constexpr):
    """One tile of queries for a block of keys: adds to dk (but for its scale) and dv."""
    p = tl.exp2(_dot(k, tl.trans(q)) * scale - lse[None, :])  # (BLOCK, TILE)
    if MASK:
        p = tl.where(visible, p, 0.0)
    dv += _dot(p.to(do.dtype), do)
    ds = p * (_dot(v, tl.trans(do)) - delta[None, :])
    return dk + _dot(ds.to(q.dtype), q), dv


@jit
def _keys(Q, Q_SINK, K, V, FAR, FIRST, RANK, LSE, DO, DELTA, DK, DV, DK_FAR, DV_FAR, H, Tq, Tk, S, window, sinks, max_seps,
          scale, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, IS_FAR: tl.constexpr):
    """Each program owns BLOCK keys of one head and walks the queries that saw them. IS_FAR: keys of the far list, seen by
    every later query; SPLIT programs share these and add up in float32. Else: rows in the text, seen by `window` queries;
    these programs run last, add what the far list holds for their rows, and write dk and dv."""
    d = tl.arange(0, D)
    blocks = tl.cdiv(sinks, BLOCK) + tl.cdiv(S - sinks, BLOCK) if IS_FAR else tl.cdiv(Tk, BLOCK)
    bh, block = tl.program_id(0) // (blocks * SPLIT), tl.program_id(0) % (blocks * SPLIT) // SPLIT
    part, b = tl.program_id(0) % SPLIT, (bh // H).to(tl.int64)
    rows, keys, list = bh.to(tl.int64) * Tq, bh.to(tl.int64) * Tk, bh.to(tl.int64) * S
    if IS_FAR:
        own = block * BLOCK + tl.arange(0, BLOCK)  # entries; sinks have blocks of their own, as they have their own queries
        end = sinks
        beyond = max_seps + S  # nothing pushes a sink out of sight
        if block < tl.cdiv(sinks, BLOCK):
            Q = Q_SINK
        else:
            own += sinks - tl.cdiv(sinks, BLOCK) * BLOCK
            end = S
            beyond = max_seps
        FIRST += b * S
        lo = tl.load(FIRST + own, mask=own < end, other=Tq)  # an entry is seen from when it leaves the window ...
        hi = tl.load(FIRST + own + beyond, mask=own + beyond < S, other=Tq)  # ... until the max_seps-th after it does
        there = lo < hi
        row = tl.load(FAR + b * S + own, mask=there, other=0)
    else:
        row = block * BLOCK + tl.arange(0, BLOCK)
        there = row < Tk
        row = tl.minimum(row, Tk - 1)
        lo = tl.maximum(row - (Tk - Tq), 0)
        hi = tl.maximum(tl.minimum(row - (Tk - Tq) + window, Tq), lo)
    K, V, at = K + keys * D, V + keys * D, row[:, None] * D + d
    k, v = tl.load(K + at, mask=there[:, None], other=0.0), tl.load(V + at, mask=there[:, None], other=0.0)
    dk, dv = tl.zeros([BLOCK, D], tl.float32), tl.zeros([BLOCK, D], tl.float32)
    Q, DO, LSE, DELTA = Q + rows * D, DO + rows * D, LSE + rows, DELTA + rows
    start, inner, head, edges = _plan(lo, hi, TILE)
    for MASK in tl.static_range(2):
        for i in range(part, edges if MASK else inner, SPLIT):
            t = start + _tile(i, inner, head, MASK) * TILE + tl.arange(0, TILE)
            visible = (t >= lo[:, None]) & (t < hi[:, None])
            t = tl.minimum(tl.maximum(t, 0), Tq - 1) if MASK else t
            at_t = t[:, None] * D + d
            dk, dv = _key_step(dk, dv, k, v, tl.load(Q + at_t), tl.load(DO + at_t), tl.load(LSE + t), tl.load(DELTA + t),
                               visible, scale, MASK)
    if IS_FAR:
        at = own[:, None] * D + d
        tl.atomic_add(DK_FAR + list * D + at, dk, mask=there[:, None], sem="relaxed")
        tl.atomic_add(DV_FAR + list * D + at, dv, mask=there[:, None], sem="relaxed")
    else:
        entry = tl.load(RANK + b * Tk + row)
        at_far, is_far = entry[:, None] * D + d, (entry < S)[:, None]
        dk += tl.load(DK_FAR + list * D + at_far, mask=is_far, other=0.0)
        dv += tl.load(DV_FAR + list * D + at_far, mask=is_far, other=0.0)
        tl.store(DK + keys * D + at, (dk * (scale * 0.6931471805599453)).to(k.dtype), mask=there[:, None])
        tl.store(DV + keys * D + at, dv.to(v.dtype), mask=there[:, None])


# ---- the operators that torch.compile and autograd see


def _tiles(q):
    """(rows per program, rows per tile, warps, stages) of the queries' and of the keys' programs: what compiles without spills."""
    Tq, D, hopper = q.shape[2], q.shape[3], not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] >= 9
    if q.dtype == torch.float32:
        return (32, 32, 4, 2), (32, 32, 4, 2)
    if Tq <= 16:
        return (16, 64, 4, 2), (16, 64, 4, 2)
    if D < 128:
        return (128, 64, 8, 3), (64 if hopper else 32, 64, 4, 3)
    return ((64, 64, 8, 3), (64, 32, 8, 3)) if hopper else ((64, 64, 8, 2), (32, 64, 8, 2))


def _run_queries(q, k, v, far, n_far, window, sinks, max_seps, q_sink, o, lse, do=None, delta=None, dq=None, dq_sink=None):
    (B, H, Tq, D), (block, tile, warps, stages) = q.shape, _tiles(q)[0]
    with torch.cuda.device_of(q):
        _queries[(B * H * triton.cdiv(Tq, block),)](
            q, q if q_sink is None else q_sink.contiguous(), k, v, far, n_far, o, lse, do, delta, dq, dq_sink, H, Tq,
            k.shape[2], far.shape[1], window, sinks, max_seps, D ** -0.5 / math.log(2), D, block, tile, sinks > 0,
            q_sink is not None, do is not None, num_warps=warps, num_stages=stages)


@torch.library.custom_op("nanosep::attention", mutates_args=())
def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, far: torch.Tensor, n_far: torch.Tensor, window: int,
               sinks: int, max_seps: int, q_sink: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, Tq, D) and, for the backward, the base-2 log-sum-exp of the scores (B, H, Tq) float32."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    o, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    _run_queries(q, k, v, far, n_far, window, sinks, max_seps, q_sink, o, lse)
    return o, lse


@_attention.register_fake
def _(q, k, v, far, n_far, window, sinks, max_seps, q_sink):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("nanosep::attention_backward", mutates_args=())
def _attention_backward(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, far: torch.Tensor,
                        n_far: torch.Tensor, window: int, sinks: int, max_seps: int, q_sink: torch.Tensor | None,
                        o: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, dq_sink; the last is empty without q_sink. Scores are recomputed from q, k and the log-sum-exp."""
    (B, H, Tq, D), Tk, S = q.shape, k.shape[2], far.shape[1]
    q, k, v, do = q.contiguous(), k.contiguous(), v.contiguous(), do.contiguous()
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    dq_sink = q.new_empty(0) if q_sink is None else torch.empty_like(q)
    _run_queries(q, k, v, far, n_far, window, sinks, max_seps, q_sink, o, lse, do, delta, dq, dq_sink)
    dk_far, dv_far = torch.zeros(2, B, H, S, D, dtype=torch.float32, device=q.device)
    entries = torch.arange(S, dtype=n_far.dtype, device=q.device).expand(B, S).contiguous()
    first = torch.searchsorted(n_far, entries, right=True).int()  # (B, S): the first query that has each entry behind it
    rank = ranks(far, n_far, Tk).int()
    sinks, (block, tile, warps, stages) = min(sinks, S), _tiles(q)[1]
    far_blocks = triton.cdiv(sinks, block) + triton.cdiv(S - sinks, block)
    with torch.cuda.device_of(q):
        for is_far, split, blocks in ((True, SPLIT, far_blocks), (False, 1, triton.cdiv(Tk, block))):
            _keys[(B * H * blocks * split,)](
                q, q if q_sink is None else q_sink.contiguous(), k, v, far, first, rank, lse, do, delta, dk, dv, dk_far, dv_far,
                H, Tq, Tk, S, window, sinks, max_seps, D ** -0.5 / math.log(2), D, block, tile, split, is_far,
                num_warps=warps, num_stages=stages)
    return dq, dk, dv, dq_sink


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], inputs[8], *output)
    ctx.limits = inputs[5:8]


def _backward(ctx, do, _):
    q, k, v, far, n_far, q_sink, o, lse = ctx.saved_tensors
    dq, dk, dv, dq_sink = _attention_backward(do, q, k, v, far, n_far, *ctx.limits, q_sink, o, lse)
    return dq, dk, dv, None, None, None, None, None, None if q_sink is None else dq_sink


@_attention_backward.register_fake
def _(do, q, k, v, far, n_far, window, sinks, max_seps, q_sink, o, lse):
    return (*(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(0 if q_sink is None else q.shape))


_attention.register_autograd(_backward, setup_context=_save)


def sep_attention(q, k, v, far, n_far, window, sinks=0, max_seps=None, q_sink=None, impl="auto"):
    """Softmax attention of each query over its window and its part of the far list (SepLLM, arXiv 2412.12094, section 3).

    q (B, H, Tq, D); k, v (B, H, Tk, D), Tk >= Tq: query t stands at key row `Tk - Tq + t`, and sees the last `window` rows
    up to its own. far (B, S) int32: key rows in order; n_far (B, Tq) int32, not decreasing: how many of them have left the
    window of each query, which sees entries [0, min(sinks, n_far)) and [max(sinks, n_far - max_seps), n_far) of them;
    max_seps None: no limit. q_sink (B, H, Tq, D), default q: the query as the sinks see it.
    impl: "triton" (bf16, fp16, fp32; D 16, 32, 64 or 128), "torch" (the reference), "auto" (triton on a GPU).
    Returns (B, H, Tq, D), differentiable in q, k, v and q_sink. ValueError if impl="triton" can't do what is asked.
    """
    missing = None
    if triton is None:
        missing = "triton is not installed"
    elif q.shape[3] not in (16, 32, 64, 128) or q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        missing = f"the kernel takes head sizes 16, 32, 64, 128 in bf16, fp16 or fp32, not {q.shape[3]} in {q.dtype}"
    if impl == "auto":
        if q.is_cuda and missing:
            warnings.warn(f"sep_attention runs on the slow reference: {missing}", stacklevel=2)
        impl = "triton" if q.is_cuda and not missing else "torch"
    if impl == "torch":
        return sep_attention_reference(q, k, v, far, n_far, window, sinks, max_seps, q_sink)
    if impl != "triton":
        raise ValueError(f"impl is {impl!r}, and must be one of auto, triton, torch")
    if not missing and not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        missing = f"the kernel needs a CUDA device, not {q.device}, or TRITON_INTERPRET=1 before triton is imported"
    if missing:
        raise ValueError(f"impl='triton' can't be used: {missing}; use impl='torch'")
    return _attention(q, k, v, far, n_far, window, sinks, NO_LIMIT if max_seps is None else max_seps, q_sink)[0]
