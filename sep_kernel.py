"""Softmax attention over "far list + window": one Triton kernel, forward and backward, and its reference in plain PyTorch.

The one idea: the kernel never looks for separators. Every visible set is an interval [lo, hi) of a list (`sep_cache.py`),
so a program owns a block of rows and *walks* intervals (`_walk`, the only loop): queries over the sinks, the separators
(rows gathered through the list) and the window; backward, keys over the queries that saw them, again an interval. Tiles
inside all of a block's intervals need no mask; only those at the edges do. Saved are the output and the log-sum-exp of each
query; scores are recomputed. A far key is seen by every later query: programs share these, or one would decide the time.
Read after `sep_cache.py`; flash attention (arXiv 2205.14135) helps. `python sep_kernel.py` checks the kernel against
float64 and, on a GPU, prints the benchmark.
"""
from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sep_cache import far_list

try:
    import triton
    import triton.language as tl
    jit, INTERPRET = triton.jit, tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
    SPLIT = tl.constexpr(4)  # programs, at most, that share the queries of a block of far keys
except ImportError:  # on a Mac, say: the reference serves
    triton, jit = None, lambda function: function

NO_LIMIT = 1 << 30


def sep_attention_reference(q, k, v, far, n_far, window, sinks=0, max_seps=None, q_sink=None):
    """`sep_attention` in plain PyTorch with a dense mask: the specification. Any dtype, float64 included."""
    (Tq, D), Tk, (B, S), n = q.shape[2:], k.shape[2], far.shape, n_far[:, :, None]  # n (B, Tq, 1)
    ahead = torch.arange(Tk - Tq, Tk, device=q.device)[:, None] - torch.arange(Tk, device=q.device)  # (Tq, Tk)
    entry = torch.arange(S, device=q.device).expand(B, S)
    rows = torch.where(entry < n_far[:, -1:], far, Tk).long()  # what nobody sees goes to a row behind the last
    entry = entry.new_full((B, Tk + 1), S).scatter_(1, rows, entry)[:, None, :Tk]  # (B, 1, Tk), S where nothing becomes far
    sink = (entry < n) & (entry < sinks)  # (B, Tq, Tk)
    sep = (entry < n) & (entry >= sinks) & (entry >= n - (NO_LIMIT if max_seps is None else max_seps))
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
def _walk(acc, m, l, a, b, X, Y, FAR, LSE, DELTA, lo, hi, part, parts, D: tl.constexpr, TILE: tl.constexpr,
          GATHER: tl.constexpr, PASS: tl.constexpr):
    """The one loop: a block of rows walks over its intervals [lo, hi) of other rows, TILE at a time.

    PASS        the block a, b    the others X, Y    acc, m, l: what is summed up, or known
    "forward"   queries, -        keys, values       output, the largest score and the sum so far (online softmax)
    "dq"        queries, do       keys, values       dq; the log-sum-exp and the delta of each query
    "keys"      keys, values      queries, do        dk, dv, -
    GATHER: the intervals are of the list FAR, which says where the rows are. Of `parts` programs this is number `part`.
    """
    scale: tl.constexpr = D ** -0.5 * 1.4426950408889634  # scores in base 2
    start, first, last = tl.max(lo, 0), tl.min(lo, 0), tl.max(hi, 0)
    inner = tl.maximum(tl.min(hi, 0) - start, 0) // TILE  # tiles that all rows of the block see whole,
    head = tl.cdiv(start - first, TILE)  # and masked tiles: before these,
    edges = head + tl.cdiv(tl.maximum(last - start - inner * TILE, 0), TILE)  # and behind
    for MASK in tl.static_range(2):
        for i in range(part, edges if MASK else inner, parts):
            entry = start + (i - head + tl.where(i < head, 0, inner) if MASK else i) * TILE + tl.arange(0, TILE)
            row = tl.minimum(tl.maximum(entry, first), last - 1) if MASK else entry
            row = tl.load(FAR + row) if GATHER else row
            at = row[:, None] * D + tl.arange(0, D)
            x, y = tl.load(X + at), tl.load(Y + at)
            s = _dot(a, tl.trans(x))  # (BLOCK, TILE)
            if MASK:
                s = tl.where((entry >= lo[:, None]) & (entry < hi[:, None]), s, float("-inf"))
            if PASS == "forward":
                new_m = tl.maximum(m, tl.max(s, 1) * scale)
                p, shrink = tl.exp2(s * scale - new_m[:, None]), tl.exp2(m - new_m)
                acc = acc * shrink[:, None] + _dot(p.to(y.dtype), y)
                m, l = new_m, l * shrink + tl.sum(p, 1)
            else:
                lse = m[:, None] if PASS == "dq" else tl.load(LSE + row)[None, :]
                delta = l[:, None] if PASS == "dq" else tl.load(DELTA + row)[None, :]
                p = tl.exp2(s * scale - lse)
                if PASS == "keys":
                    m += _dot(p.to(y.dtype), y)
                ds = p * (_dot(b, tl.trans(y)) - delta)
                acc += _dot(ds.to(x.dtype), x)
    return acc, m, l


@jit
def _queries(Q, Q_SINK, K, V, FAR, N_FAR, O, LSE, DO, DELTA, DQ, DQ_SINK, programs, H, Tq, Tk, S, window, sinks, max_seps,
             D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, APART: tl.constexpr, PASS: tl.constexpr):
    """Each program owns BLOCK queries of one head: their output and log-sum-exp, or their delta, dq and (APART) dq_sink."""
    bh, block = tl.program_id(0) // programs, programs - 1 - tl.program_id(0) % programs  # the longest lists first
    rows, keys, b = bh.to(tl.int64) * Tq, bh.to(tl.int64) * Tk * D, (bh // H).to(tl.int64)
    t = block * BLOCK + tl.arange(0, BLOCK)
    t, own = tl.minimum(t, Tq - 1), t < Tq  # rows behind the last do as the last one does, and are not stored
    at = t[:, None] * D + tl.arange(0, D)  # (BLOCK, D)
    n, row = tl.load(N_FAR + b * Tq + t), Tk - Tq + t  # far entries behind each query, and the key row where it stands
    FAR, K, V = FAR + b * S, K + keys, V + keys
    Q, Q_SINK, O, LSE = Q + rows * D, Q_SINK + rows * D, O + rows * D, LSE + rows
    q, acc = tl.load(Q + at), tl.zeros([BLOCK, D], tl.float32)
    do, m, l = q, tl.full([BLOCK], -1e30, tl.float32), tl.zeros([BLOCK], tl.float32)
    if PASS == "dq":
        do, m = tl.load(DO + rows * D + at), tl.load(LSE + t)
        l = tl.sum(tl.load(O + at).to(tl.float32) * do.to(tl.float32), 1)
        tl.store(DELTA + rows + t, l, mask=own)
    meet, seen = tl.load(Q_SINK + at) if APART else q, tl.minimum(n, sinks)
    acc, m, l = _walk(acc, m, l, meet, do, K, V, FAR, LSE, DELTA, tl.zeros_like(n), seen, 0, 1, D, 16, True, PASS)
    if APART and PASS == "dq":
        tl.store(DQ_SINK + rows * D + at, (acc * D ** -0.5).to(q.dtype), mask=own[:, None])
        acc = tl.zeros([BLOCK, D], tl.float32)
    acc, m, l = _walk(acc, m, l, q, do, K, V, FAR, LSE, DELTA, tl.maximum(n - max_seps, seen), n, 0, 1, D, TILE, True, PASS)
    first = tl.maximum(row - window + 1, 0)
    acc, m, l = _walk(acc, m, l, q, do, K, V, FAR, LSE, DELTA, first, row + 1, 0, 1, D, TILE, False, PASS)
    if PASS == "dq":
        tl.store(DQ + rows * D + at, (acc * D ** -0.5).to(q.dtype), mask=own[:, None])
    else:
        tl.store(O + at, (acc / l[:, None]).to(q.dtype), mask=own[:, None])
        tl.store(LSE + t, m + tl.log2(l), mask=own)


@jit
def _keys(Q, Q_SINK, K, V, FAR, N_FAR, FIRST, LSE, DO, DELTA, DK, DV, DK_FAR, DV_FAR, programs, H, Tq, Tk, S, window, sinks,
          max_seps, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, IS_FAR: tl.constexpr):
    """Each program owns BLOCK keys of one head and walks over the queries that saw them. IS_FAR: keys of the far list, seen
    by every later query, so up to SPLIT programs share these, and add up in float32. Else: rows of the text, seen by `window`
    queries; these programs run last, add the far sums, and write dk and dv."""
    pid, heads, part, parts = tl.program_id(0), tl.num_programs(0) // programs, 0, 1
    bh, i = (pid % heads, pid // heads) if IS_FAR else (pid // programs, pid % programs)  # far: sinks of all heads first
    rows, keys, b = bh.to(tl.int64) * Tq, bh.to(tl.int64) * Tk * D, (bh // H).to(tl.int64)
    if IS_FAR:
        n = tl.load(N_FAR + b * Tq + Tq - 1)  # entries that somebody sees
        n_sinks = tl.minimum(n, sinks)  # sinks have blocks of their own, as their queries are others
        sink_blocks, sep_blocks = tl.cdiv(n_sinks, BLOCK), tl.cdiv(n - n_sinks, BLOCK)
        parts = tl.minimum(programs // tl.maximum(sink_blocks + sep_blocks, 1), SPLIT)
        block, part, is_sink = i // parts, i % parts, i < sink_blocks * parts
        if block >= sink_blocks + sep_blocks:
            return
        Q = Q_SINK if is_sink else Q
        entry = block * BLOCK + tl.arange(0, BLOCK) + tl.where(is_sink, 0, n_sinks - sink_blocks * BLOCK)
        end = tl.where(is_sink, n_sinks, n)
        entry, there = b * S + tl.minimum(entry, end - 1), entry < end  # those behind the end do as the last, and add nothing
        later = entry + tl.where(is_sink, S, max_seps)  # an entry is seen from when it leaves the window until this one does
        row, lo = tl.load(FAR + entry), tl.load(FIRST + entry)
        hi = tl.load(FIRST + later, mask=later < b * S + n, other=Tq)
    else:
        row = i * BLOCK + tl.arange(0, BLOCK)
        row, there = tl.minimum(row, Tk - 1), row < Tk
        lo, hi = tl.maximum(row - (Tk - Tq), 0), tl.minimum(row - (Tk - Tq) + window, Tq)
    at, there = row[:, None] * D + tl.arange(0, D), there[:, None]
    k, v = tl.load(K + keys + at), tl.load(V + keys + at)
    zero = tl.zeros([BLOCK, D], tl.float32)
    dk, dv, _ = _walk(zero, zero, 0, k, v, Q + rows * D, DO + rows * D, FAR, LSE + rows, DELTA + rows, lo, hi, part, parts,
                      D, TILE, False, "keys")
    if IS_FAR:
        tl.atomic_add(DK_FAR + keys + at, dk, mask=there, sem="relaxed")
        tl.atomic_add(DV_FAR + keys + at, dv, mask=there, sem="relaxed")
    else:
        dk += tl.load(DK_FAR + keys + at)
        dv += tl.load(DV_FAR + keys + at)
        tl.store(DK + keys + at, (dk * D ** -0.5).to(k.dtype), mask=there)
        tl.store(DV + keys + at, dv.to(v.dtype), mask=there)


# ---- the operators that torch.compile and autograd see

def _tiles(q):
    """(rows per program, rows per tile, warps, stages) forward, for dq, and for dk and dv: what compiles without spills."""
    Tq, D, hopper = q.shape[2], q.shape[3], not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] in (9, 10)
    if q.dtype == torch.float32 or Tq <= 32:
        return ((16, 32, max(4, D // 16), 2),) * 3
    if hopper:
        return ((128, 64, 4, 3), *((64, 64, 4, 3),) * 2) if D < 128 else (*((128, 64, 8, 3),) * 2, (64, 32, 8, 3))
    return (64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)


def _launch(kernel, tile, rows, tensors, limits, *flags):
    """Run a kernel on so many rows of every head; tensors begin with q, q_sink, k, v, far."""
    (B, H, Tq, D), (block, *_, warps, stages) = tensors[0].shape, tile
    programs = triton.cdiv(rows, block)
    with torch.cuda.device_of(tensors[0]):
        kernel[(B * H * programs,)](*tensors, programs, H, Tq, tensors[2].shape[2], tensors[4].shape[1], *limits,
                                    D, *tile[:2], *flags, num_warps=warps, num_stages=stages)


@library.custom_op("nanosep::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, far: Tensor, n_far: Tensor, limits: list[int],
               q_sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output (B, H, Tq, D) and the base-2 log-sum-exp of the scores (B, H, Tq) float32; limits: window, sinks, max_seps."""
    q, k, v, meet = (x.contiguous() for x in (q, k, v, q if q_sink is None else q_sink))
    o, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tensors = [q, meet, k, v, far, n_far, o, lse, None, None, None, None]
    _launch(_queries, _tiles(q)[0], q.shape[2], tensors, limits, q_sink is not None, "forward")
    return o, lse


@library.custom_op("nanosep::attention_backward", mutates_args=())
def _attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, far: Tensor, n_far: Tensor, limits: list[int],
                        q_sink: Tensor | None, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dq_sink; the last is empty without q_sink. Scores are recomputed from q, k and the log-sum-exp."""
    apart, (B, S), (_, tile, key_tile) = q_sink is not None, far.shape, _tiles(q)
    do, q, k, v, meet = (x.contiguous() for x in (do, q, k, v, q_sink if apart else q))
    dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
    dq_sink = torch.empty_like(q) if apart else q.new_empty(0)
    _launch(_queries, tile, q.shape[2], [q, meet, k, v, far, n_far, o, lse, do, delta, dq, dq_sink], limits, apart, "dq")
    dk_far, dv_far = torch.zeros(2, *k.shape, dtype=torch.float32, device=q.device)
    entries = torch.arange(S, dtype=torch.int32, device=q.device).expand(B, S).contiguous()
    first = torch.searchsorted(n_far, entries, right=True, out_int32=True)  # (B, S): the first query behind which each entry is
    tensors = [q, meet, k, v, far, n_far, first, lse, do, delta, dk, dv, dk_far, dv_far]
    _launch(_keys, key_tile, S + key_tile[0], tensors, limits, True)  # one program more, as sinks have their own
    _launch(_keys, key_tile, k.shape[2], tensors, limits, False)
    return dq, dk, dv, dq_sink


def _save(ctx, inputs, output):
    *tensors, ctx.limits, q_sink = inputs
    ctx.save_for_backward(*tensors, q_sink, *output)


def _backward(ctx, do, _):
    *tensors, q_sink, o, lse = ctx.saved_tensors
    dq, dk, dv, dq_sink = _attention_backward(do, *tensors, ctx.limits, q_sink, o, lse)
    return dq, dk, dv, None, None, None, None if q_sink is None else dq_sink


_attention.register_autograd(_backward, setup_context=_save)
_attention.register_fake(lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)))
_attention_backward.register_fake(lambda do, q, k, v, far, n_far, limits, q_sink, o, lse: (
    *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(0 if q_sink is None else q.shape)))


def sep_attention(q, k, v, far, n_far, window, sinks=0, max_seps=None, q_sink=None, impl="auto"):
    """Softmax attention of each query over its window and its part of the far list (SepLLM, arXiv 2412.12094, section 3).

    q (B, H, Tq, D); k, v (B, H, Tk, D), Tk >= Tq: query t stands at key row `Tk - Tq + t`, and sees the last `window` rows
    up to its own. far (B, S) int32: key rows in order; n_far (B, Tq) int32, not decreasing: how many of them have left the
    window of each query, which sees entries [0, min(sinks, n_far)) and [max(sinks, n_far - max_seps), n_far) of them;
    max_seps None: no limit. q_sink (B, H, Tq, D), default q: the query as the sinks see it.
    impl: "triton" (bf16, fp16, fp32; D 16, 32, 64 or 128), "torch" (the reference), "auto" (triton on a GPU).
    Returns (B, H, Tq, D), differentiable in q, k, v and q_sink. ValueError if impl="triton" can't do what is asked.
    """
    able = triton is not None and q.shape[3] in (16, 32, 64, 128) and q.dtype in (torch.bfloat16, torch.float16, torch.float32)
    needs = f"triton, a CUDA device, D 16, 32, 64 or 128 and bf16, fp16 or fp32; given: D {q.shape[3]}, {q.dtype}, {q.device}"
    if impl == "auto" and q.is_cuda and not able:
        warnings.warn(f"sep_attention runs on its slow reference; the kernel needs {needs}", stacklevel=2)
    if impl == "torch" or impl == "auto" and not (q.is_cuda and able):
        return sep_attention_reference(q, k, v, far, n_far, window, sinks, max_seps, q_sink)
    if impl not in ("auto", "triton") or not able or not (q.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(f"impl is {impl!r}, and must be auto, torch or triton; triton needs {needs}")
    limits = [min(x, NO_LIMIT) for x in (window, sinks, NO_LIMIT if max_seps is None else max_seps)]
    return _attention(q, k, v, far.contiguous(), n_far.contiguous(), limits, q_sink)[0]


def benchmark(T, every, max_seps, window=256, sinks=4, H=12, D=64):
    """Two rows of the table: forward and forward + backward of B = 1 in bf16, as CUDA graphs, so that launches cost nothing.
    Separators: every `every`-th token, or with 0 those in the bytes of the README."""
    text = torch.frombuffer(bytearray(Path(__file__).with_name("README.md").read_bytes()), dtype=torch.uint8).cuda()
    at, limit = torch.arange(T, device="cuda"), max_seps or NO_LIMIT
    kept = (at % every == 0 if every else torch.isin(text[at % len(text)], text.new_tensor(list(b".,?!;:\n")))) | (at < sinks)
    rank, (far, n_far) = kept.cumsum(0), far_list(kept[None], window, T)
    pairs = ((at + 1).clamp(max=window) + n_far.clamp(max=sinks) + (n_far - sinks).clamp(0, limit)).sum().item()
    q, k, v, grad = (torch.randn(1, H, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(4))
    forms, build = {"sep": lambda: sep_attention(q, k, v, far, n_far, window, sinks, max_seps)}, torch.nan
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if T <= 1 << 17 else ():
        forms[backend] = lambda b=backend: sdpa_kernel(b)(F.scaled_dot_product_attention)(q, k, v, is_causal=True)
    torch.compiler.reset()  # every mask is a new program
    if T <= 1 << 16:  # the same mask, the way of the paper's repository
        def make():
            return torch.compile(create_block_mask)(lambda b, h, i, j: (i >= j) & (
                (i - j < window) | (j < sinks) | kept[j] & (n_far[0, i] - rank[j] < limit)), None, None, T, T, device="cuda")
        block_mask, build, flex = make(), triton.testing.do_bench(make), torch.compile(flex_attention, dynamic=False)
        forms["flex"] = lambda: flex(q, k, v, block_mask=block_mask)
    for name, flops in (("forward", 4), ("forward + backward", 14)):
        runs = {form: run if flops == 4 else lambda run=run: torch.autograd.grad(run(), (q, k, v), grad)
                for form, run in forms.items()}
        torch.cuda.reset_peak_memory_stats()
        runs["sep"]()
        memory = torch.cuda.max_memory_allocated() / 2 ** 30
        ms = {form: triton.testing.do_bench_cudagraph(run) for form, run in runs.items()}
        sep, flex_ms, full = ms.pop("sep"), ms.pop("flex", torch.nan), min(ms.values(), default=torch.nan)
        print(f"| {T:,} | {f'every {every}th' if every else f'bytes, {kept.float().mean():.1%}'} | {max_seps} | {name} | "
              f"{sep:.3f} | {full:.3f} | {full / sep:.1f}x | {full / sep / (T * (T + 1) / 2 / pairs):.0%} | "
              f"{flops * D * H * pairs / sep / 1e9:.0f} | {flex_ms:.3f} | {build:.1f} | {memory:.2f} |")


def main():
    """Run the kernel's tests, then time it where there is a GPU."""
    tests = Path(__file__).parent / "tests" / "test_kernel.py"
    if failed := subprocess.run([sys.executable, "-m", "pytest", "-q", tests]).returncode:
        sys.exit(failed)
    if not torch.cuda.is_available():
        return print("The kernel is right, in Triton's interpreter. Timing needs a GPU.")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: B 1, H 12, D 64, bf16, window 256, sinks 4")
    print("| T | separators | max_seps | pass | ms | SDPA ms | speed-up | of promise | TFLOP/s | flex ms | its mask ms | GiB |")
    print("|" + " --- |" * 12)
    for case in [(T, every, cap) for T in (2048, 4096, 16384, 65536, 131072) for every in (10, 0) for cap in (None, 1024)]:
        benchmark(*case)
    benchmark(1 << 20, 10, 1024)


if __name__ == "__main__":
    main()
