"""The speed without a GPU, as the tables of RESULTS.md: attention, training, decoding, scoring.

    python experiments/cpu_speed.py                    all tables, about 20 minutes
    python experiments/cpu_speed.py --only decoding    one of: attention, training, decoding, busy, scoring, llama

Whatever is compared is run in turns in one process, in float32, on `--threads` threads (default 1); medians. Decoding is
compared with Hugging Face's `transformers`, which only this file asks for: pip install transformers.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import GPT, GPTConfig, sample_token  # noqa: E402
from sep_cache import SepCache, SepConfig, far_layout  # noqa: E402
from sep_kernel import sep_attention  # noqa: E402


def table(head, rows):
    print(f"\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |", flush=True)


def seconds_of(runs, repeats):
    """The median time of each function in {name: function}, which take turns."""
    times = {name: [] for name in runs}
    for _ in range(repeats + 1):  # the first round is a warm-up
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def attention(threads):
    """Forward + backward of one attention layer, H 4, D 32, 6 % separators, against causal attention."""
    rows = []
    for T, B, window, max_seps, repeats in ((256, 16, 32, 16, 9), (1024, 4, 64, 64, 9), (4096, 1, 64, 64, 5),
                                            (16384, 1, 256, 512, 2), (65536, 1, 256, 512, 1)):
        torch.manual_seed(0)
        ids = (torch.rand(B, T) < 0.06).long()
        config = SepConfig(window=window, max_seps=max_seps, separators=(1,), block_size=T)
        layout = far_layout(ids, config)
        q, k, v = (torch.randn(B, T, 4, 32).transpose(1, 2).requires_grad_() for _ in range(3))
        runs = {"sep": lambda: sep_attention(q, k, v, layout, window, config.sinks).sum().backward()}
        if T <= 16384:
            runs["full"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
        seconds = seconds_of(runs, repeats)
        full = seconds.get("full")
        rows.append((f"{T:,}", B, window, max_seps, f"{seconds['sep'] * 1e3:,.0f}", f"{full * 1e3:,.0f}" if full else "",
                     f"{full / seconds['sep']:.2f}x" if full else ""))
    table(("T", "batch", "window", "max_seps", "sep ms", "full ms", "speed-up"), rows)


def training(threads):
    """`python train.py` with the CPU preset's model at longer texts, full against sep: tokens per second and memory."""
    rows = []
    for T, batch_size, window, max_seps, steps in ((256, 16, 32, 16, 20), (1024, 4, 64, 64, 20), (4096, 1, 64, 64, 20),
                                                   (16384, 1, 256, 512, 4)):
        for attn in ("full", "sep"):
            with tempfile.TemporaryDirectory() as out:
                options = dict(device="cpu", attn=attn, block_size=T, batch_size=batch_size, window=window, max_seps=max_seps,
                               max_steps=steps, log_every=steps // 2, eval_every=steps, eval_batches=1, out_dir=out)
                command = [sys.executable, str(ROOT / "train.py")]
                for name, value in options.items():
                    command += [f"--{name}", str(value)]
                subprocess.run(command, check=True, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": str(threads)})
                last = json.loads(Path(out, "log.jsonl").read_text().splitlines()[-1])
            rows.append((f"{T:,}", window, max_seps, attn, f"{last['tokens_per_s']:,}", f"{last['memory_gib']:.2f}"))
    table(("block_size", "window", "max_seps", "attn", "tokens/s", "peak GiB"), rows)


class CountOperations(TorchDispatchMode):
    """Counts what would launch a kernel on a GPU: every operation that is not a mere view."""
    VIEWS = {"view", "_unsafe_view", "transpose", "permute", "t", "select", "slice", "unsqueeze", "expand", "unbind", "detach",
             "alias", "squeeze", "split", "empty", "empty_like", "promote_types", "mT"}

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        is_view = operation.overloadpacket.__name__ in self.VIEWS
        is_no_op = isinstance(result, torch.Tensor) and any(result is arg for arg in args) and "_" != operation.__name__[-1]
        if not is_view and not is_no_op:
            self.counts[operation.overloadpacket.__name__] += 1
        return result


def decoding(threads):
    """Tokens per second of a GPT (4 layers, 128 channels, window 32, 16 separators) and of a Llama of the same size."""
    from transformers import LlamaConfig, LlamaForCausalLM
    n_tokens = 300
    models = {attn: GPT(GPTConfig(attn=attn, block_size=256, window=32, max_seps=16)).eval() for attn in ("sep", "full")}
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)).eval()

    def generate(ids):
        llama.generate(ids, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=True, pad_token_id=0)

    @torch.inference_mode()
    def bare_loop(ids):
        out = llama(ids, use_cache=True)
        for _ in range(n_tokens):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = llama(token, past_key_values=out.past_key_values, use_cache=True)

    rows = []
    for B in (1, 16):
        ids = torch.randint(256, (B, 16))
        seconds = seconds_of({
            "sep": lambda: list(models["sep"].generate(ids, n_tokens)),
            "full": lambda: list(models["full"].generate(ids, n_tokens)),
            "generate": lambda: generate(ids),
            "bare": lambda: bare_loop(ids)}, repeats=5)
        speed = {name: B * n_tokens / value for name, value in seconds.items()}
        rows.append((B, *(f"{value:,.0f}" for value in speed.values()), f"{speed['sep'] / speed['generate']:.2f}x",
                     f"{speed['sep'] / speed['bare']:.2f}x"))
    table(("batch", "sep", "full", "HF generate", "HF forward loop", "sep / generate", "sep / loop"), rows)

    for name, n_layer in (("this model", 4), ("the baby GPT (6 layers)", 6)):
        model = GPT(GPTConfig(block_size=256, window=32, max_seps=16, n_layer=n_layer)).eval()
        cache = SepCache(model.config)
        ids = torch.randint(256, (1, 16))
        with torch.inference_mode():
            model(ids, cache=cache)
            with CountOperations() as counter:
                logits, _ = model(ids[:, :1], cache=cache)
                sample_token(logits[:, -1], 1.0, None)
        print(f"\nOperations of a decoding step of {name}: {sum(counter.counts.values())}")


def llama(threads):
    """Tokens per second of random weights in SmolLM2-135M's shape: `llama.py` against Hugging Face's generate, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama import load_model
    n_tokens = 50
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=True)).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        sep = load_model(folder, separators=range(100), device="cpu")  # a token in 500
        full = load_model(folder, attn="full", device="cpu")

    def generate(ids, n):
        model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=True, pad_token_id=0)

    rows = []
    for n_threads in sorted({1, threads, os.cpu_count()}):
        torch.set_num_threads(n_threads)
        ids = torch.randint(49152, (1, 16))
        runs = {}
        for n in (1, n_tokens + 1):  # the difference is decoding alone
            runs["sep", n] = lambda n=n: list(sep.generate(ids, n))
            runs["full", n] = lambda n=n: list(full.generate(ids, n))
            runs["generate", n] = lambda n=n: generate(ids, n)
        seconds = seconds_of(runs, repeats=5)
        speed = {name: n_tokens / (seconds[name, n_tokens + 1] - seconds[name, 1])
                 for name in ("sep", "full", "generate")}
        rows.append((n_threads, *(f"{value:.1f}" for value in speed.values()), f"{speed['sep'] / speed['generate']:.2f}x"))
    torch.set_num_threads(threads)
    table(("threads", "sep", "full", "HF generate", "sep / generate"), rows)


def parts():
    return dict(attention=attention, training=training, decoding=decoding, llama=llama)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=parts(), help="one table instead of all")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, part in parts().items():
        if args.only in (None, name):
            print(f"\n### {part.__doc__}")
            part(args.threads)


if __name__ == "__main__":
    main()
