"""How fast the kernel is, on a GPU: against causal attention, and FlexAttention with its mask.

    python experiments/kernel_speed.py                               the table, in 8 minutes
    python experiments/kernel_speed.py --T 16384 --every 10 --max_seps 1024      one case of it
    python experiments/kernel_speed.py --T 16384 --forward 128,64,4,3,5,168      other sizes

bf16, B 1, H 12, window 256, 4 sinks. Separators are every n-th token (--every n), or those of
English bytes (--every 0): 4.7 % of all, distances drawn from a seed with the mean, the spread and
the doubles of English books. "Promise" is how many times fewer pairs of a query and a key the mask
has than causal attention; the speed-up is over the faster of PyTorch's Flash and cuDNN kernels.
Times are of CUDA graphs, so launches cost nothing; each case is printed as it is done.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sep_kernel
from sep_cache import SepConfig, far_layout

H, WINDOW, SINKS = 12, 256, 4
SEPARATOR = 1  # the token id
LONGEST_CAUSAL = 1 << 17  # causal attention over more tokens takes minutes
FLEX_LENGTHS = range(1 << 14, (1 << 16) + 1)  # each case costs half a minute of compilation

DEFAULT_CASES = [  # (T, every, max_seps); a cap that drops nothing would be the same case again
    *((T, every, None) for T in (2048, 4096, 16384, 65536, 131072) for every in (10, 0)),
    (16384, 10, 1024),
    *((T, every, 1024) for T in (65536, 131072, 1 << 20) for every in (10, 0)),
]


def make_ids(T, every, seed=0):
    """Token ids (1, T): SEPARATOR where a separator is, else 0."""
    ids = np.zeros(T, dtype=np.int64)
    if every:
        ids[every - 1::every] = SEPARATOR
    else:
        rng = np.random.default_rng(seed)
        gaps = 1 + rng.gamma(1.8, 13.8, size=T).astype(np.int64)
        gaps[rng.random(T) < 0.17] = 1  # a line break after a full stop, say
        places = gaps.cumsum()
        ids[places[places < T]] = SEPARATOR
    return torch.from_numpy(ids)[None].cuda()


def count_pairs(layout, T):
    """How many pairs of a query and a key are visible."""
    near = torch.arange(1, T + 1, device="cuda").clamp(max=WINDOW)
    far = layout.stop.clamp(max=SINKS) + (layout.stop - layout.start).clamp(min=0)
    return (near + far).sum().item()


def flex_block_mask(ids, layout, T):
    """FlexAttention's mask for the same pairs, and the milliseconds that it takes to make one."""
    kept = (ids[0] == SEPARATOR) | (torch.arange(T, device="cuda") < SINKS)
    entry = kept.cumsum(0) - 1  # of the far list, where a token is kept
    start = layout.start[0]

    def visible(b, h, i, j):
        far = kept[j] & (entry[j] >= start[i])
        return (i >= j) & ((i - j < WINDOW) | (j < SINKS) | far)

    build = torch.compile(create_block_mask)

    def make():
        return build(visible, None, None, T, T, device="cuda")

    return make(), milliseconds(make, graph=False)


def milliseconds(run, graph=True):
    """Mean time of run(), as a CUDA graph or with its launches."""
    from triton.testing import do_bench, do_bench_cudagraph
    if graph:
        return do_bench_cudagraph(run)
    return do_bench(run, warmup=5, rep=20)


def measure(name, run, leaves, grad):
    """Milliseconds forward, and forward + backward; infinite if it cannot run here."""
    try:
        forward = milliseconds(run)
        both = milliseconds(lambda: torch.autograd.grad(run(), leaves, grad))
    except (RuntimeError, torch.OutOfMemoryError) as error:
        print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
        return torch.inf, torch.inf
    return forward, both


def measure_case(T, every, max_seps, D, sep_alone):
    """Two lines of the table: forward, and forward + backward."""
    begin = time.perf_counter()
    ids = make_ids(T, every)
    config = SepConfig(attn="sep", window=WINDOW, sinks=SINKS, separators=(SEPARATOR,),
                       max_seps=max_seps, block_size=T)
    layout = far_layout(ids, config)
    pairs = count_pairs(layout, T)
    promise = T * (T + 1) / 2 / pairs
    q, k, v = (torch.randn(1, H, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
               for _ in range(3))
    grad = torch.randn_like(q)

    def sep():
        return sep_kernel.sep_attention(q, k, v, layout, WINDOW, SINKS, impl="triton")

    def causal():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def with_backend(backend):
        def run():
            with sdpa_kernel(backend):
                return causal()
        return run

    sep_ms = measure("sep", sep, (q, k, v), grad)
    torch.cuda.reset_peak_memory_stats()
    sep()
    forward_memory = torch.cuda.max_memory_allocated()
    torch.autograd.grad(sep(), (q, k, v), grad)
    memory = forward_memory, torch.cuda.max_memory_allocated()

    causal_ms = torch.nan, torch.nan
    if T <= LONGEST_CAUSAL and not sep_alone:
        flash = measure("flash", with_backend(SDPBackend.FLASH_ATTENTION), (q, k, v), grad)
        cudnn = measure("cudnn", with_backend(SDPBackend.CUDNN_ATTENTION), (q, k, v), grad)
        causal_ms = min(flash[0], cudnn[0]), min(flash[1], cudnn[1])

    flex_ms = torch.nan, torch.nan
    build_ms = torch.nan
    if T in FLEX_LENGTHS and not sep_alone:
        torch.compiler.reset()  # every mask is a new program
        block_mask, build_ms = flex_block_mask(ids, layout, T)
        compiled = torch.compile(flex_attention, dynamic=False)

        def flex():
            return compiled(q, k, v, block_mask=block_mask)

        flex_ms = measure("flex", flex, (q, k, v), grad)

    kind = f"every {every}th" if every else f"English, {ids.float().mean().item():.1%}"
    for i, name in enumerate(("forward", "forward + backward")):
        products = 2 if i == 0 else 7  # matrix products of a tile
        teraflops = 2 * products * D * H * pairs / sep_ms[i] / 1e9
        speedup = causal_ms[i] / sep_ms[i]
        cells = [
            f"{T:,}", kind, max_seps, name, f"{sep_ms[i]:.3f}", f"{causal_ms[i]:.3f}",
            f"{speedup:.1f}x", f"{speedup / promise:.0%} of {promise:.1f}x", f"{teraflops:.0f}",
            f"{flex_ms[i]:.3f}", f"{build_ms:.1f}", f"{memory[i] / 2 ** 30:.2f}",
        ]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr)


def launch_size(text):
    """"128,64,4,3,5": block, tile, warps, stages, far_stages; a sixth number would be maxnreg."""
    return sep_kernel.LaunchSize(*(int(number) for number in text.split(",")))


def number_or_none(text):
    return None if text == "None" else int(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--T", type=int, help="tokens; with this option only one case is measured")
    parser.add_argument("--every", type=int, default=10,
                        help="every n-th token is a separator; 0: English bytes (default: 10)")
    parser.add_argument("--max_seps", type=number_or_none,
                        help="how many separators are visible, or None (default)")
    parser.add_argument("--D", type=int, default=64, choices=(16, 32, 64, 128),
                        help="head size (default: 64)")
    parser.add_argument("--sep_alone", action="store_true", help="without what it is compared to")
    for name in sep_kernel.LaunchSizes._fields:
        parser.add_argument(f"--{name}", type=launch_size, metavar="B,T,W,S,F[,R]",
                            help=f"sizes of {name}: " + ", ".join(sep_kernel.LaunchSize._fields))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("kernel_speed.py measures on an NVIDIA GPU, and there is none here")

    given = {name: getattr(args, name) for name in sep_kernel.LaunchSizes._fields
             if getattr(args, name)}
    for table in (sep_kernel.LARGE_SHARED_MEMORY, sep_kernel.SMALL_SHARED_MEMORY):
        key = max(args.D, 64)
        table[key] = table[key]._replace(**given)

    versions = f"torch {torch.__version__}, triton {sep_kernel.triton.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}: bf16, B 1, H {H}, D {args.D}, "
          f"window {WINDOW}, sinks {SINKS}")
    for name, size in given.items():
        print(f"{name}: {size}")
    print("| T | separators | max_seps | pass | ms | causal ms | speed-up | of promise | TFLOP/s | "
          "flex ms | flex mask ms | GiB |")
    print("|" + " --- |" * 12, flush=True)
    cases = [(args.T, args.every, args.max_seps)] if args.T else DEFAULT_CASES
    for T, every, max_seps in cases:
        measure_case(T, every, max_seps, args.D, args.sep_alone)


if __name__ == "__main__":
    main()
