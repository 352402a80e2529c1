"""The speed without a GPU: attention, decoding by length of context, and a pretrained model.

    python experiments/speed.py                      needs `pip install transformers`
    python experiments/speed.py --model FOLDER       also reads and writes with a pretrained model

What is compared takes turns in one process, on one thread, in float32; medians.
"""
import argparse
import copy
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import GPT, GPTConfig  # noqa: E402
from sep_cache import SepConfig, far_layout, make_cache  # noqa: E402
from sep_kernel import sep_attention  # noqa: E402


def table(head, rows):
    print(f"\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def seconds_of(runs, repeats):
    """The median time of each function in {name: function}, which take turns."""
    times = {name: [] for name in runs}
    for _ in range(repeats + 1):  # the first round is a warm-up
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def forward_backward(attention, q, k, v):
    attention(q, k, v).sum().backward()


def attention():
    """Forward + backward of one layer, H 4, D 32, 6 % separators, against causal SDPA."""
    rows = []
    for T, B, window, max_seps in ((256, 16, 32, 16), (4096, 1, 64, 64), (16384, 1, 256, 512)):
        config = SepConfig(window=window, max_seps=max_seps, separators=(1,), block_size=T)
        layout = far_layout((torch.rand(B, T) < 0.06).long(), config)
        q, k, v = (torch.randn(B, 4, T, 32).requires_grad_() for _ in range(3))
        causal = partial(F.scaled_dot_product_attention, is_causal=True)
        sep = partial(sep_attention, layout=layout, window=window, sinks=config.sinks)
        runs = {"sep": partial(forward_backward, sep, q, k, v),
                "full": partial(forward_backward, causal, q, k, v)}
        seconds = seconds_of(runs, 5)
        rows.append((f"{T:,}", B, window, max_seps,
                     f"{1e3 * seconds['sep']:,.0f}", f"{1e3 * seconds['full']:,.0f}",
                     f"{seconds['full'] / seconds['sep']:.2f}x"))
    table(("T", "batch", "window", "max_seps", "sep ms", "full ms", "speed-up"), rows)


def decoding():
    """300 tokens of a GPT of the quick start's shape, and of such a Llama in transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM
    shape = dict(n_layer=4, n_embd=128, block_size=256, window=32, max_seps=16)
    models = {attn: GPT(GPTConfig(attn=attn, **shape)).eval() for attn in ("sep", "full")}
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=320, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=20_000)).eval()
    rows = []
    for context in (16, 256, 4096, 16384):
        ids = torch.randint(256, (1, context))
        caches = {attn: make_cache(model.config) for attn, model in models.items()}
        with torch.inference_mode():
            for attn, model in models.items():
                for chunk in ids.split(512, dim=1):
                    model(chunk, cache=caches[attn])

        def decode(attn, caches=caches):
            first = torch.zeros(1, 1, dtype=torch.int64)
            list(models[attn].generate(first, 300, cache=copy.deepcopy(caches[attn])))

        runs = {attn: partial(decode, attn) for attn in models}
        if context == 16:
            runs["transformers"] = partial(
                llama.generate, ids, max_new_tokens=300, min_new_tokens=300, do_sample=True,
                pad_token_id=0)
        speed = {name: 300 / s for name, s in seconds_of(runs, 3).items()}
        rows.append([f"{context:,}"] + [f"{speed[name]:,.0f}" if name in speed else ""
                                        for name in ("sep", "full", "transformers")])
    table(("context", "sep", "full", "transformers, generate"), rows)


def pretrained(folder):
    """Reading 1,800 tokens and writing 60: 256 separators, all, and in transformers."""
    from transformers import AutoModelForCausalLM
    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = GPT.from_pretrained(folder)
    ids = torch.randint(model.config.vocab_size, (1, 1800))

    def read_and_write(max_seps, n_tokens):
        model.configure(max_seps=max_seps)
        list(model.generate(ids, n_tokens, temperature=0))

    def generate(n_tokens):
        llama.generate(ids, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False)

    runs = {}
    for n_tokens in (1, 61):
        runs["max_seps 256", n_tokens] = partial(read_and_write, 256, n_tokens)
        runs["max_seps None", n_tokens] = partial(read_and_write, None, n_tokens)
        runs["transformers", n_tokens] = partial(generate, n_tokens)
    seconds = seconds_of(runs, 2)
    rows = [(name, f"{1800 / seconds[name, 1]:,.0f}",
             f"{60 / (seconds[name, 61] - seconds[name, 1]):,.1f}")
            for name in ("max_seps 256", "max_seps None", "transformers")]
    table(("", "reading, tokens/s", "writing, tokens/s"), rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a pretrained model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    attention()
    decoding()
    if args.model:
        pretrained(args.model)


if __name__ == "__main__":
    main()
