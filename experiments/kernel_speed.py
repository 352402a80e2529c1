"""How fast the kernel is on a GPU, as markdown tables.

    python experiments/kernel_speed.py --tables causal flex forward dkdv

causal, flex: forward + backward beside causal attention (the fastest of PyTorch's kernels) and
FlexAttention with the same mask. forward, dkdv: the open questions of KERNEL.md, one kernel alone.
A cell: the ms that the GPU works, by a CUDA graph (the ms of a call), and the GPU's time over that
of the first column. Compilation and FlexAttention's block mask are outside the clock. bf16, one
text, heads of 64, window 256, 4 sinks, every 10th token a separator.
"""
from functools import partial

import torch
from common import new_parser, print_head, print_row, times_or_nan
from speed import forward_backward, make_case
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import sep_kernel
from options import require, run_script
from sep_kernel import triton

WINDOW, SINKS = 256, 4
CASES = [(T, max_seps, H) for T, max_seps in ((4096, None), (16384, None), (65536, 1024))
         for H in (12, 96)]


# ---- the tables: {column: a function without arguments} of a case


def causal(layout, sep, sdpa, tensors):
    return {"ours": partial(forward_backward, sep, *tensors),
            "causal": partial(forward_backward, sdpa, *tensors)}


def flex(layout, sep, sdpa, tensors):
    reach = layout.reach[0]  # (T,)
    T = len(reach)

    def visible(b, h, i, j):
        return (i >= j) & (i - j < reach[j])

    torch.compiler.reset()  # every mask is a new program
    block_mask = torch.compile(create_block_mask)(visible, None, None, T, T, reach.device)
    attention = partial(torch.compile(flex_attention, dynamic=False), block_mask=block_mask)
    return {"ours": partial(forward_backward, sep, *tensors),
            "FlexAttention": partial(forward_backward, attention, *tensors)}


def launch(kernel, q, *args, block=64, **options):
    """As `sep_kernel._launch` does it for bf16, but with other options."""
    B, T, H, D = q.shape
    grid = H, triton.cdiv(T, block), B
    kernel[grid](q, *args, T, D, block, 64, enable_fp_fusion=True, **options)


def forward(layout, sep, sdpa, tensors):
    q, k, v, _ = (x.transpose(1, 2) for x in tensors)
    out, lse = sep_kernel._new_output(q)
    run = partial(launch, sep_kernel._forward, q, k, v, *layout[:4], out, lse, WINDOW, SINKS)
    return {"blocks of 64": run, "of 128": partial(run, block=128),
            "of 128, 8 warps": partial(run, block=128, num_warps=8)}


def dkdv(layout, sep, sdpa, tensors):
    q, k, v, do = (x.transpose(1, 2) for x in tensors)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    lse, delta = torch.zeros(2, *tensors[0].shape[:3], device=q.device)
    run = partial(launch, sep_kernel._backward_dkdv, q, k, v, layout.far, layout.reach, lse, do,
                  delta, dk, dv)
    return {"as it is": run, "maxnreg 168": partial(run, maxnreg=168)}


TABLES = {"causal": causal, "flex": flex, "forward": forward, "dkdv": dkdv}


def milliseconds(run):
    """GPU and wall time."""
    wall = triton.testing.do_bench(run)  # an error while a graph is captured spoils the process
    return triton.testing.do_bench_cudagraph(run), wall


def main():
    args = new_parser(__doc__, tables=list(TABLES)).parse_args()
    require(triton and torch.cuda.is_available(),
            "this measures an NVIDIA GPU with Triton, and there is none")
    for name in args.tables:
        for T, max_seps, H in CASES[:4] if name == "flex" else CASES:
            case = make_case(T, 1, H, 64, WINDOW, max_seps, every=10, device="cuda",
                             dtype=torch.bfloat16)
            runs = TABLES[name](*case)
            if (T, H) == (4096, 12):
                print_head("T", "max_seps", "heads", *runs)
            times = [times_or_nan(milliseconds, run) for run in runs.values()]
            first, _ = times[0]
            cells = [f"{gpu:.3f} ({wall:.3f}), {gpu / first:.2f}x" for gpu, wall in times]
            print_row(f"{T:,}", max_seps, H, *cells)


if __name__ == "__main__":
    run_script(main)
