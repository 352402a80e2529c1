"""How fast the kernel is, on a GPU: forward + backward, as a markdown table.

    python experiments/kernel_speed.py

`sep_attention` against causal attention (the fastest of PyTorch's kernels) and FlexAttention with
the same mask. bf16, one text, 12 heads of 64, window 256, 4 sinks, every 10th token a separator.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sep_cache import SepConfig, far_layout
from sep_kernel import sep_attention

CASES = [(4096, None), (16384, None), (65536, 1024)]  # T, max_seps
H, D = 12, 64


def milliseconds(attention, q, k, v, do):
    """The time of one forward and backward, or the name of what went wrong, as text."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    def run():
        out = attention(q, k, v)
        torch.autograd.grad(out, (q, k, v), do)

    try:
        return f"{do_bench(run):.3f}"
    except (RuntimeError, OutOfResources) as error:  # out of memory is a RuntimeError
        return type(error).__name__


def measure(T, max_seps):
    """The cells of one line of the table."""
    config = SepConfig(window=256, separators=(1,), max_seps=max_seps, block_size=T)
    ids = torch.zeros(1, T, dtype=torch.int64, device="cuda")
    ids[:, 9::10] = 1
    layout = far_layout(ids, config)
    reach = layout.reach[0]
    q, k, v, do = torch.randn(4, 1, H, T, D, device="cuda", dtype=torch.bfloat16)
    for x in (q, k, v):
        x.requires_grad_()

    def sep(q, k, v):
        return sep_attention(q, k, v, layout, config.window, config.sinks, impl="triton")

    def causal(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def visible(b, h, i, j):
        return (i >= j) & (i - j < reach[j])

    def flex(q, k, v):
        return compiled(q, k, v, block_mask=block_mask)

    torch.compiler.reset()  # every mask is a new program
    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = torch.compile(create_block_mask)(visible, None, None, T, T, device="cuda")
    times = [milliseconds(attention, q, k, v, do) for attention in (sep, causal, flex)]
    return [f"{T:,}", max_seps, *times]


def main():
    if not torch.cuda.is_available():
        sys.exit("kernel_speed.py measures on an NVIDIA GPU, and there is none here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: forward + backward, ms\n")
    print("| T | max_seps | sep | causal | FlexAttention |")
    print("|" + " --- |" * 5)
    for T, max_seps in CASES:
        cells = measure(T, max_seps)
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
