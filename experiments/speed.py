"""The speed of attention and of decoding, with transformers' generate beside it.

    python experiments/speed.py                   on a CPU: a layer's attention; decoding with the
                                                  shape of `python train.py`
    python experiments/speed.py --model FOLDER    on a CPU: and decoding with a pretrained model
    python experiments/speed.py --n_layer 12 --n_head 12 --n_embd 768 --batch_size 64
                                                  on a GPU: decoding with this shape, in bf16

What is compared takes turns in one process, on a CPU on one thread and in float32; medians. The
step of a token runs as it is (eager), as a CUDA graph (recorded), and of compiled code, which a GPU
records, too. Compiling is outside the clock: half a minute or more for a row. Where there is a GPU,
CUDA_VISIBLE_DEVICES= measures the CPU.

On an A100 or RTX 4090 PyTorch's masked attention does not split the keys of a token among programs.
So full attention decodes slower there than it could, which flatters sep at 16,384 tokens.
"""
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from common import print_head, print_row, times_or_nan

from model import GPT, GPTConfig, record
from options import fields_of, option, parse_options, run_script
from pretrained import SHAPE, load_model
from sep_kernel import sep_attention
from sep_mask import SepConfig, far_layout
from train import PRESET

N = 32  # tokens that are timed together


@dataclass
class SpeedConfig:
    model: str = option(None, "a pretrained model's folder, measured too on a CPU")
    batch_size: int = option(1, "texts that are written at once")
    vocab_size: int = option(256, "tokens that the model knows")


def in_turns(runs, rounds):
    """Of functions that return two times each, which take turns: the medians, (functions, 2).

    A first turn does not count: in it libraries are loaded, and plan for each new shape.
    """
    times = [[times_or_nan(run) for run in runs] for _ in range(1 + rounds)]
    return torch.tensor(times[1:]).median(0).values


def make_case(T, B, H, D, window, max_seps, every, **kind):
    """Random q, k, v and do of this kind, each (B, H, T, D), and in memory (B, T, H, D) as a model
    has them; and attention to them.

    Every so many tokens there is a separator. Returns the layout, sep_attention and causal
    attention as functions of q, k and v, and the list of the four tensors.
    """
    config = SepConfig(window=window, max_seps=max_seps, separators=(1,), block_size=T)
    tensors = torch.randn(4, B, T, H, D, **kind).transpose(2, 3)
    ids = torch.zeros(B, T, dtype=torch.int64, device=tensors.device)
    ids[:, every - 1::every] = 1
    layout = far_layout(ids, config)
    sep = partial(sep_attention, layout=layout)
    causal = partial(F.scaled_dot_product_attention, is_causal=True)
    return layout, sep, causal, list(tensors)


def forward_backward(attention, q, k, v, do):
    """Seconds of the forward, and of the backward."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    start = time.perf_counter()
    out = attention(*inputs)
    middle = time.perf_counter()
    torch.autograd.grad(out, inputs, do)
    return middle - start, time.perf_counter() - middle


def attention(cases=((256, 16, 32, 16), (4096, 1, 64, 64), (16384, 1, 256, 512))):
    """Forward + backward of one layer, H 4, D 32, every 16th a separator, against causal SDPA."""
    print_head("T", "batch", "window", "max_seps", "sep ms", "full ms", "speed-up")
    for T, B, window, max_seps in cases:
        _, sep, causal, tensors = make_case(T, B, 4, 32, window, max_seps, every=16)
        runs = [partial(forward_backward, which, *tensors) for which in (sep, causal)]
        sep_ms, full_ms = 1e3 * in_turns(runs, 7).sum(1)
        print_row(f"{T:,}", B, window, max_seps, f"{sep_ms:,.0f}", f"{full_ms:,.0f}",
                  f"{full_ms / sep_ms:.2f}x")


def run_plainly(step, device):
    """In place of `model.record`."""
    return step


def ours(model, ids, how):
    """Seconds of reading the prompts ids (B, T), and of writing N tokens, the median of three.

    The 2 N tokens before do not count: it compiles, records, and finds how many rows it needs.
    """
    stamps = [time.perf_counter()]
    with mock.patch("model.record", run_plainly if how == "eager" else record):
        tokens = model.generate(ids, 1 + 5 * N, compile=how == "compiled")
        for n in [1] + 5 * [N]:
            for token in islice(tokens, n):
                token.tolist()  # waits for the device, as sample.py does
            stamps.append(time.perf_counter())
    seconds = torch.tensor(stamps, dtype=torch.float64).diff()
    return seconds[0], seconds[3:].median()


def transformers(model, ids):
    """The same with transformers' generate, of a Llama of this shape."""
    from transformers import LlamaConfig, LlamaForCausalLM
    shape = {theirs: getattr(model.config, name) for name, theirs in SHAPE.items()}
    llama = LlamaForCausalLM(LlamaConfig(**shape)).to(ids.device, model.embed_tokens.weight.dtype)
    stamps = []
    streamer = SimpleNamespace(put=lambda _: stamps.append(time.perf_counter()), end=lambda: None)
    llama.generate(ids, streamer=streamer, max_new_tokens=N + 1, min_new_tokens=N + 1,
                   do_sample=True, pad_token_id=0)
    return stamps[1] - stamps[0], stamps[-1] - stamps[1]


def decoding(model, contexts, hows, rounds, batch_size=1):
    """Tokens per second, over the batch, of reading a prompt / of writing behind it."""
    print_head("context", "attn", *hows, "transformers")
    for context in contexts:
        ids = torch.randint(256, (batch_size, context), device=model.embed_tokens.weight.device)
        ids[:, 9::10] = model.config.separators[0]
        for attn in ("sep", "full"):
            model.configure(attn=attn)
            torch.compiler.reset()
            runs = [partial(ours, model, ids, how) for how in hows]
            times = in_turns([*runs, partial(transformers, model, ids)], rounds)
            speeds = batch_size * torch.tensor([context, N]) / times
            cells = [f"{reading:,.0f} / {writing:,.1f}" for reading, writing in speeds]
            print_row(f"{context:,}", attn, *cells)


def main():
    options = parse_options(__doc__, [SpeedConfig, GPTConfig], PRESET)
    args = SpeedConfig(**fields_of(SpeedConfig, options))
    model = GPT(GPTConfig(**fields_of(GPTConfig, PRESET | options)))
    if torch.cuda.is_available():
        decoding(model.to("cuda", torch.bfloat16), (256, 16384),
                 ("eager", "recorded", "compiled"), 1, args.batch_size)
        return
    torch.set_num_threads(1)
    attention()
    decoding(model, (16, 256, 4096, 16384), ("eager", "compiled"), 3, args.batch_size)
    if args.model:
        decoding(load_model(args.model), (1800,), ("eager", "compiled"), 2)


if __name__ == "__main__":
    run_script(main)
