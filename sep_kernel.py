"""Attention over what a query sees: the definition, plain PyTorch by blocks, Triton.

The definition is `dense_attention`. Everything after it is an optimisation of it, and is tested
against it. The definition costs T x T. What follows costs as much as there is to see, because
nothing searches for separators. What a query sees is its window and two ranges of the far list
(`SepLayout` in `sep_mask.py`), so sparse attention is flash attention whose loops run over ranges.
And each key is seen by one unbroken range of queries, [row, row + reach), so its gradient is flash
attention's loop over queries.

Read the Triton form when you know flash attention (arXiv 2205.14135), best beside Triton's
fused-attention tutorial. Next: `sep_cache.py`.
"""
from __future__ import annotations  # without triton there is no `tl` to annotate with

import warnings

import torch
import torch.nn.functional as F
from torch import library

from options import require
from sep_mask import visible

try:
    import triton
    import triton.language as tl
except ImportError:  # on a Mac, say: plain PyTorch serves
    triton = None


def dense_attention(q, k, v, reach):
    """The definition: q, k, v (B, H, T, D); reach (B, T) of the keys -> (B, H, T, D)."""
    position = torch.arange(q.shape[2], device=q.device)
    mask = visible(position, position, reach)  # (B, T, T)
    return F.scaled_dot_product_attention(q, k, v, mask[:, None])


def sep_attention(q, k, v, layout):
    """Softmax attention of each query over its sinks, its separators and its window.

    SepLLM (arXiv 2412.12094, section 3), computed as flash attention (arXiv 2205.14135). By the
    Triton kernel where it can run, else by `block_attention`.

    Args:
        q, k, v: (B, H, T, D), of whole texts.
        layout: of `far_layout`, for the same texts; None, for attn="full", is causal attention.

    Returns (B, H, T, D), differentiable in q, k and v.
    Raises ValueError for shapes or dtypes that disagree.
    """
    if layout is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    B, _, T, _ = q.shape
    given = [(x.dtype, *x.shape) for x in (q, k, v, *layout[:4])]
    expected = 3 * [(q.dtype, *q.shape)] + 4 * [(torch.int32, B, T)]
    require(given == expected, "q, k and v (B, H, T, D), of one dtype, and the layout's tensors, "
            f"int32 (B, T), must agree: {given}")
    if kernel_can_run(q):
        return kernel_attention(q, k, v, layout)
    return block_attention(q, k, v, layout)


def kernel_can_run(q):
    """Whether there is Triton, a GPU for it, a head size D that it has tiles for, and its dtype."""
    return (triton is not None and is_modern(q.device) and q.shape[-1] in (16, 32, 64, 128)
            and q.dtype != torch.float64)


def is_modern(device):
    """Whether this is a GPU for Triton and bf16. Warns, once, of an older one."""
    is_gpu = device.type == "cuda"
    is_old = is_gpu and torch.cuda.get_device_properties(device).major < 8
    if is_old:
        warnings.warn("a GPU below compute capability 8.0: float32, without the kernel")
    return is_gpu and not is_old


# ---- plain PyTorch: blocks of queries, each over the few keys that it can see --------------------

BLOCK = 64  # queries; larger blocks share more keys, and mask more of them


def block_attention(q, k, v, layout):
    """`dense_attention` in time and memory linear in T, as long as max_seps bounds what a query
    sees.

    The queries are cut into blocks. A block's keys are [sinks | its range of the far list | its
    windows' rows], gathered for all blocks at once and padded to the longest; then each block is
    one dense attention with a small mask.
    """
    B, H, T, D = q.shape
    queries, keys, mask = in_blocks(layout).blocks

    def gather(x, rows):
        x = x.transpose(1, 2).reshape(B * T, H * D)
        x = x.index_select(0, rows.flatten())  # its gradient adds up whole rows, which is fast
        return x.view(-1, rows.shape[2], H, D).transpose(1, 2)  # (B N, H, BLOCK or M, D)

    out = F.scaled_dot_product_attention(
        gather(q, queries), gather(k, keys), gather(v, keys), mask.to(q.dtype))
    out = out.view(B, -1, H, BLOCK, D).transpose(1, 2)
    return out.flatten(2, 3)[:, :, :T]


@torch.inference_mode(False)
def in_blocks(layout):
    """The layout with its `blocks`: N blocks of queries, and the M keys of each. None stays None.

    Work for all layers: whoever calls it once saves them from it. It asks the device for a number.

    queries (B, N, BLOCK), keys (B, N, M): their rows; row t of text b has the number b T + t
    mask (B N, 1, BLOCK, M): 0 where a query of the block sees the key, else -inf
    """
    if layout is None or layout.blocks is not None:
        return layout
    far = layout.far
    B, T = far.shape
    device = far.device
    sequence = torch.arange(B, device=device)[:, None, None]
    first_query = torch.arange(0, T, BLOCK, device=device)[:, None]  # (N, 1)
    query = first_query + torch.arange(BLOCK, device=device)
    query = query.clamp(max=T - 1)  # (N, BLOCK); those past the end repeat the last

    # What the first query of a block sees of the far list. What later queries see of it in
    # addition was still in the window of the first, so it is among the rows of the windows below.
    start = layout.start[:, first_query]  # (B, N, 1)
    stop = layout.stop[:, first_query]
    longest = int((stop - start).max())
    # Each block loads the sinks, then its range. With 2 sinks and longest 3 the offsets are
    # -2 -1 0 1 2, and a block whose range begins at 7 loads the entries 0 1 7 8 9 of far.
    offset = torch.arange(-layout.sinks, longest, device=device)
    entry = offset + torch.where(offset < 0, layout.sinks, start)  # (B, N, entries)
    far_row = far[sequence, entry.clamp(max=T - 1)]
    far_row = far_row.where(entry < stop, T)  # T: a row that no query sees

    # the rows of the windows of all queries of a block
    near_row = first_query + torch.arange(1 - layout.window, BLOCK, device=device)
    near_row = near_row.where(near_row >= 0, T)  # (N, window + BLOCK - 1)

    row = torch.cat([far_row, near_row.expand(B, -1, -1)], dim=-1)  # (B, N, M)
    row_to_load = row.clamp(max=T - 1)
    seen = visible(query, row, layout.reach[sequence, row_to_load])  # (B, N, BLOCK, M)
    mask = torch.where(seen, 0.0, -torch.inf).flatten(0, 1)[:, None]
    return layout._replace(blocks=(sequence * T + query, sequence * T + row_to_load, mask))


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
# What one program does, with window 3, 1 sink, max_seps 4, 4 queries or keys a program and tiles
# of 2 (64 in truth). The program of the queries 12 to 15 visits keys in three loops, 1, 2 and 3:
#
#     position    0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
#     token       s  o  ,  a  ,  b  ,  c  d  ,  e  .  f  g  h  i
#     query 12    2     2     2     1        1  3  3  3  .  .  .       .  loaded, and masked
#     query 13    2     2     2     1        1  .  3  3  3  .  .
#     query 14    2     .     2     1        1  .  3  3  3  3  .
#     query 15    2     .     2     1        1  .  3  .  3  3  3
#
# Loop 1 takes whole tiles of separators that all four see, and needs no mask. Loop 2 takes what is
# left of the separators, and the sinks. Loop 3 takes the rows of the windows. In it the full stop
# at 11 is seen further than the tokens beside it, since it reaches further.
#
# dk and dv: keys come in the order of far, 0 2 4 6 | 9 11 15 14 | 13 12 10 8 | 7 5 3 1. A program
# loops over the queries from the first of its keys to the last end, here 9 to 15 and 8 to 15:
#
#     query      9 10 11 12 13 14 15                query      8  9 10 11 12 13 14 15
#     key  9 ,   x  x  x  x  x  x  x                key 13 g   .  .  .  .  .  x  x  x
#     key 11 .   .  .  x  x  x  x  x                key 12 f   .  .  .  .  x  x  x  .
#     key 15 i   .  .  .  .  .  .  x                key 10 e   .  .  x  x  x  .  .  .
#     key 14 h   .  .  .  .  .  x  x                key  8 d   x  x  x  .  .  .  .  .
#
# Memory. The grid is (H, blocks, B): a program has one head of one text. Tensors are contiguous.
#
#     tensors                       shape           where a program's part begins
#     Q K V OUT DO DQ DK DV         (B, T, H, D)    row `head`; its next token is H rows further
#     LSE DELTA                     (B, H, T)       `head_lse`
#     FAR START STOP REACH          (B, T)          `text`
#
# The ends. A text need not fill its last block or its last tile. An index past the end is replaced
# by the last one that there is, and loads and stores need no mask. With 5 keys and blocks of 4, the
# second program owns the entries 4 4 4 4 of far: it computes one key four times, and stores the
# same numbers four times. Queries are counted from the end: past it they become row 0. In a tile
# such a key or query is masked like any other that is not seen.

if triton is None:
    jit = staticmethod  # decorators that do nothing: no function below can be called
    kernel = staticmethod
else:
    jit = triton.jit
    # integers do not become part of the compiled program: one compilation serves all lengths
    kernel = triton.jit(do_not_specialize=["T", "window", "sinks"])
    LOG2E = tl.constexpr(1.4426950408889634)


@jit
def _dot(a, b):
    """A matrix product summed in float32; float32 inputs are not rounded to tf32."""
    return tl.dot(a, b, input_precision="ieee")


@jit
def _scores(a, b, visible):
    """The products of the rows of two tiles; visible None: no mask."""
    scores = _dot(a, tl.trans(b))
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@jit
def _pointers(X, row, D: tl.constexpr):
    """Where the rows (n,) of a head are, (n, D). From one token to the next there are H rows."""
    return X + row[:, None].to(tl.int64) * (tl.num_programs(0) * D) + tl.arange(0, D)


@jit
def _load(X, row, D: tl.constexpr):
    return tl.load(_pointers(X, row, D))


@jit
def _store(X, row, x, D: tl.constexpr):
    tl.store(_pointers(X, row, D), x)


@jit
def _my_block(T, BLOCK: tl.constexpr):
    """text, head and head_lse, and the numbers of a program's BLOCK queries or keys."""
    h = tl.program_id(0)
    H = tl.num_programs(0)
    b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return b * T, b * T * H + h, (b * H + h) * T, tl.minimum(i, T - 1)


# -- a program owns BLOCK queries, and takes one step per tile of keys that they see


@jit
def _over_keys(step: tl.constexpr, sums, of_queries, K, V, FAR, START, STOP, REACH,
               t, text, head, window, sinks, T, D: tl.constexpr, TILE: tl.constexpr):
    """sums = step(sums, of_queries, k, v, visible) for all keys that the queries t (BLOCK,) see.

    step: `_softmax_step` or `_dq_step`, compiled in; of_queries: what it knows of the queries, a
    tensor or a tuple of them; visible: its mask, None where all queries see the whole tile.

    Loops 1 and 2 are over what has left the window of the first query: the entries of far up to its
    `stop`, and its sinks. All queries see the entries from the largest `start` on:

        smallest start            largest start        masked_stop                        stop
        | some queries see these  | all see these      | whole tiles, which need no mask  |
        |                      loop 2                  |             loop 1               |

    The sinks lie left of these. Loop 2 takes them last, numbered from masked_stop on. What has left
    the window of a later query only is among the rows of loop 3, and its reach says that it is
    seen.
    """
    K += head * D
    V += head * D
    FAR += text
    REACH += text
    tile = tl.arange(0, TILE)
    first = tl.min(t, 0)  # the least; 0 is the axis
    stop = tl.load(STOP + text + first)
    start = tl.load(START + text + t)
    start = tl.minimum(start, stop)
    n_full = (stop - tl.max(start, 0)) // TILE
    masked_stop = stop - n_full * TILE
    # num_stages: how many tiles are in flight. Loop 3 knows its rows, and has 3. Loops 1 and 2 load
    # the numbers of their rows first, and have two more for that.
    for entry0 in tl.range(masked_stop, stop, TILE, num_stages=5):
        row = tl.load(FAR + entry0 + tile)
        sums = step(sums, of_queries, _load(K, row, D), _load(V, row, D), None)

    # One loop takes the masked separators and the sinks. With 2 sinks and masked_stop 7, entries 7
    # and 8 stand for the sinks, which are the entries 0 and 1 of far.
    end = masked_stop + tl.minimum(sinks, stop)
    for entry0 in tl.range(tl.min(start, 0), end, TILE, num_stages=5):
        entry = entry0 + tile
        to_load = tl.where(entry < masked_stop, entry, entry - masked_stop)
        row = tl.load(FAR + tl.minimum(to_load, T - 1))
        visible = (entry >= start[:, None]) & (entry < end)
        sums = step(sums, of_queries, _load(K, row, D), _load(V, row, D), visible)

    first_row = tl.maximum(first - window + 1, 0)
    for row0 in tl.range(first_row, tl.max(t, 0) + 1, TILE, num_stages=3):
        row = row0 + tile
        to_load = tl.minimum(row, T - 1)
        end_query = row + tl.load(REACH + to_load)
        visible = (row <= t[:, None]) & (t[:, None] < end_query)
        sums = step(sums, of_queries, _load(K, to_load, D), _load(V, to_load, D), visible)
    return sums


@jit
def _softmax_step(sums, q, k, v, visible):
    acc, m_i, l_i = sums
    scale: tl.constexpr = k.shape[1] ** -0.5 * LOG2E
    qk = _scores(q, k, visible)
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
    text, head, head_lse, i = _my_block(T, BLOCK)
    t = T - 1 - i  # the last queries, which see the most keys, start first
    q = _load(Q + head * D, t, D)
    acc = tl.zeros([BLOCK, D], tl.float32)
    m_i = tl.full([BLOCK], -1e30, tl.float32)  # not -inf, since -inf - -inf would be NaN
    l_i = tl.zeros([BLOCK], tl.float32)
    acc, m_i, l_i = _over_keys(
        _softmax_step, (acc, m_i, l_i), q,
        K, V, FAR, START, STOP, REACH,
        t, text, head, window, sinks, T, D, TILE)
    _store(OUT + head * D, t, acc / l_i[:, None], D)
    tl.store(LSE + head_lse + t, m_i + tl.log2(l_i))


@jit
def _dq_step(dq, of_queries, k, v, visible):
    q, do, lse, delta = of_queries
    scale: tl.constexpr = k.shape[1] ** -0.5 * LOG2E
    qk = _scores(q, k, visible)
    p = tl.exp2(qk * scale - lse[:, None])
    dp = _dot(do, tl.trans(v))
    ds = p * (dp - delta[:, None])
    return dq + _dot(ds.to(k.dtype), k)


@kernel
def _backward_dq(Q, K, V, FAR, START, STOP, REACH, OUT, LSE, DO, DQ, DELTA, window, sinks,
                 T, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """dq and delta of BLOCK queries of one head."""
    text, head, head_lse, i = _my_block(T, BLOCK)
    t = T - 1 - i
    q = _load(Q + head * D, t, D)
    do = _load(DO + head * D, t, D)
    out = _load(OUT + head * D, t, D)
    lse = tl.load(LSE + head_lse + t)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + head_lse + t, delta)  # for dk and dv
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
    text, head, head_lse, entry = _my_block(T, BLOCK)
    row = tl.load(FAR + text + entry)
    reach = tl.load(REACH + text + row)
    end = tl.minimum(row + reach, T)  # the queries [row, end) see each key
    k = _load(K + head * D, row, D)
    v = _load(V + head * D, row, D)
    dk = tl.zeros([BLOCK, D], tl.float32)
    dv = tl.zeros([BLOCK, D], tl.float32)
    for t0 in tl.range(tl.min(row, 0), tl.max(end, 0), TILE, num_stages=3):
        t = t0 + tl.arange(0, TILE)
        visible = (t >= row[:, None]) & (t < end[:, None])
        t = tl.minimum(t, T - 1)
        q = _load(Q + head * D, t, D)  # (TILE, D)
        do = _load(DO + head * D, t, D)
        lse = tl.load(LSE + head_lse + t)
        delta = tl.load(DELTA + head_lse + t)
        qkT = _scores(k, q, visible)
        pT = tl.exp2(qkT * scale - lse)
        dv += _dot(pT.to(do.dtype), do)
        dpT = _dot(v, tl.trans(do))
        dsT = pT * (dpT - delta)
        dk += _dot(dsT.to(q.dtype), q)
    _store(DK + head * D, row, dk * D ** -0.5, D)
    _store(DV + head * D, row, dv, D)


# -- launches


def kernel_attention(q, k, v, layout):
    """`dense_attention` by the kernel. In Triton's interpreter it needs no GPU."""
    # tensors become (B, T, H, D), as the products before and after attention have them
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    ranges = [x.contiguous() for x in layout[:4]]
    out, _ = _attention(q, k, v, ranges, layout.window, layout.sinks)
    return out.transpose(1, 2)


def _launch(program, q, *args):
    """Launch a kernel over blocks of rows of every head. The sizes fit all GPUs.

    A grid has at most 65,535 blocks of rows. So T may be 4 million, in fp32 1 million. The driver
    refuses to launch more.
    """
    B, T, H, D = q.shape
    block = 64
    tile = 64 if D <= 64 else 32
    if q.dtype == torch.float32:  # without tensor cores
        block = tile = 16
    grid = H, triton.cdiv(T, block), B
    with torch.cuda.device_of(q):
        # fp_fusion: a * b + c is one instruction; not every version of Triton does so unasked
        program[grid](q, *args, T, D, block, tile, enable_fp_fusion=True)


# The forward and the backward are two operators of PyTorch. torch.compile takes those as they are.
# It could not trace an autograd.Function that calls Triton's interpreter.


def _new_output(q, *_):  # _: what else the operator gets
    """Memory for the output (B, T, H, D), and for the log-sum-exp in base 2, (B, H, T) float32."""
    B, T, H, _ = q.shape
    return torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32)


@library.custom_op("nanosep::attention", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, "
                   "Tensor[] ranges, int window, int sinks) -> (Tensor, Tensor)")
def _attention(q, k, v, ranges, window, sinks):
    out, lse = _new_output(q)
    _launch(_forward, q, k, v, *ranges, out, lse, window, sinks)
    return out, lse


def _new_gradients(do, q, k, v, *_):  # _: what else the operator gets
    """Memory for dq, dk and dv."""
    return tuple(map(torch.empty_like, (q, k, v)))


@library.custom_op("nanosep::attention_backward", mutates_args=(), schema="(Tensor do, Tensor q, "
                   "Tensor k, Tensor v, Tensor[] ranges, int window, int sinks, Tensor out, "
                   "Tensor lse) -> (Tensor, Tensor, Tensor)")
def _attention_backward(do, q, k, v, ranges, window, sinks, out, lse):
    far, _, _, reach = ranges
    do = do.contiguous()
    dq, dk, dv = _new_gradients(do, q, k, v)
    delta = torch.empty_like(lse)  # written by the first kernel, read by the second
    _launch(_backward_dq, q, k, v, *ranges, out, lse, do, dq, delta, window, sinks)
    _launch(_backward_dkdv, q, k, v, far, reach, lse, do, delta, dk, dv)
    return dq, dk, dv


def _save_for_backward(ctx, inputs, output):
    q, k, v, ranges, ctx.window, ctx.sinks = inputs
    ctx.save_for_backward(q, k, v, *ranges, *output)


def _backward(ctx, do, _):
    q, k, v, *ranges, out, lse = ctx.saved_tensors
    gradients = _attention_backward(do, q, k, v, ranges, ctx.window, ctx.sinks, out, lse)
    return *gradients, [None] * len(ranges), None, None


# what torch.compile sees instead of the kernels, and how the two belong together
_attention.register_fake(_new_output)
_attention_backward.register_fake(_new_gradients)
_attention.register_autograd(_backward, setup_context=_save_for_backward)
