"""The speed without a GPU, as the tables of RESULTS.md: attention, training, decoding, scoring.

    python experiments/cpu_speed.py                    all tables, about half an hour
    python experiments/cpu_speed.py --only decoding    one of them

What is compared takes turns in one process, in float32, on `--threads` threads (default 1;
pretrained: 1 and all); medians. Training and busy are runs of train.py and sample.py. Decoding is
compared with Hugging Face's library, which only experiments ask for: `pip install transformers`.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
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


def decoding_model(attn="sep", n_layer=4):
    return GPT(GPTConfig(attn=attn, n_layer=n_layer, block_size=256, window=32, max_seps=16)).eval()


# ---- the tables


def attention(threads):
    """Forward + backward of one attention layer, H 4, D 32, 6 % separators; full: causal SDPA."""
    rows = []
    for T, B, window, max_seps, repeats in (
            (256, 16, 32, 16, 9), (1024, 4, 64, 64, 9), (4096, 1, 64, 64, 5),
            (16384, 1, 256, 512, 3), (65536, 1, 256, 512, 1)):
        rows.append(attention_row(T, B, window, max_seps, repeats))
    table(("T", "batch", "window", "max_seps", "sep ms", "full ms", "speed-up"), rows)


def attention_row(T, B, window, max_seps, repeats):
    torch.manual_seed(0)
    ids = (torch.rand(B, T) < 0.06).long()
    config = SepConfig(window=window, max_seps=max_seps, separators=(1,), block_size=T)
    layout = far_layout(ids, config)
    q, k, v = (torch.randn(B, T, 4, 32).transpose(1, 2).requires_grad_() for _ in range(3))

    def sep():
        sep_attention(q, k, v, layout, window, config.sinks).sum().backward()

    def full():
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    runs = {"sep": sep, "full": full}
    if T > 16384:
        del runs["full"]  # a minute
    ms = {name: 1e3 * seconds for name, seconds in seconds_of(runs, repeats).items()}
    row = [f"{T:,}", B, window, max_seps, f"{ms['sep']:,.0f}"]
    if "full" in ms:
        row += [f"{ms['full']:,.0f}", f"{ms['full'] / ms['sep']:.2f}x"]
    return row


def training(threads):
    """Training the CPU preset's model at longer texts: tokens per second and peak memory."""
    rows = []
    for T, batch_size, window, max_seps, steps in (
            (256, 16, 32, 16, 20), (1024, 4, 64, 64, 20), (4096, 1, 64, 64, 20),
            (16384, 1, 256, 512, 4)):
        for attn in ("full", "sep"):
            options = {
                "device": "cpu", "attn": attn, "block_size": T, "batch_size": batch_size,
                "window": window, "max_seps": max_seps, "max_steps": steps,
                "log_every": steps // 2, "eval_every": steps, "eval_batches": 1}
            last = train(options, threads)
            rows.append((f"{T:,}", window, max_seps, attn, f"{last['tokens_per_s']:,}",
                         f"{last['memory_gib']:.2f}"))
    table(("block_size", "window", "max_seps", "attn", "tokens/s", "peak GiB"), rows)


def train(options, threads):
    """The last line of the log of `python train.py` with these options."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(ROOT / "train.py"), "--out_dir", out]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=environment)
        return json.loads(Path(out, "log.jsonl").read_text().splitlines()[-1])


def decoding(threads):
    """Tokens per second of a GPT (4 layers, 128 channels, window 32, 16 separators, vocabulary
    256), and of a Llama of the same size in Hugging Face's library."""
    from transformers import LlamaConfig, LlamaForCausalLM
    n_tokens = 300
    sep = decoding_model()
    full = decoding_model("full")
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4)).eval()

    @torch.inference_mode()
    def bare_loop(ids):
        out = llama(ids, use_cache=True)
        for _ in range(n_tokens):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = llama(token, past_key_values=out.past_key_values, use_cache=True)

    def generate(ids):
        llama.generate(ids, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=True,
                       pad_token_id=0)

    rows = []
    for B in (1, 16):
        ids = torch.randint(256, (B, 16))
        runs = {"sep": lambda ids=ids: list(sep.generate(ids, n_tokens)),
                "full": lambda ids=ids: list(full.generate(ids, n_tokens)),
                "generate": lambda ids=ids: generate(ids),
                "loop": lambda ids=ids: bare_loop(ids)}
        speed = {name: B * n_tokens / s for name, s in seconds_of(runs, repeats=7).items()}
        rows.append([B] + [f"{speed[name]:,.0f}" for name in runs]
                    + [f"{speed['sep'] / speed[name]:.2f}x" for name in ("generate", "loop")])
    table(("batch", "sep", "full", "HF generate", "HF forward loop", "sep / generate",
           "sep / loop"), rows)
    for name, n_layer in (("this GPT", 4), ("the baby GPT (6 layers)", 6)):
        print(f"\nOperations of a decoding step of {name}: {count_operations(n_layer)}")


def contexts(threads):
    """Tokens per second of the same GPT, with so many tokens in the context."""
    n_tokens = 100
    rows = []
    for T in (256, 1024, 4096, 16384):
        runs = {}
        for attn in ("sep", "full"):
            model = decoding_model(attn)
            cache = SepCache(model.config)
            with torch.inference_mode():
                for chunk in torch.randint(256, (1, T)).split(512, dim=1):
                    model(chunk, cache=cache)
            token = torch.randint(256, (1, 1))
            runs[attn] = lambda model=model, cache=cache, token=token: list(
                model.generate(token, n_tokens, cache=cache))
        speed = {attn: n_tokens / s for attn, s in seconds_of(runs, repeats=7).items()}
        rows.append([f"{T:,}", *(f"{value:,.0f}" for value in speed.values()),
                     f"{speed['sep'] / speed['full']:.2f}x"])
    table(("tokens in the context", "sep", "full", "sep / full"), rows)


class OperationCounter(TorchDispatchMode):
    """Counts what launches a kernel on a GPU: whatever computes new values, or writes in place."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        first = result[0] if isinstance(result, (tuple, list)) else result
        if not isinstance(first, torch.Tensor) or name.startswith("empty"):
            return result
        memory = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        is_view = first.untyped_storage().data_ptr() in memory
        if not is_view or name.endswith("_"):
            self.count += 1
        return result


def count_operations(n_layer):
    model = decoding_model(n_layer=n_layer)
    cache = SepCache(model.config)
    ids = torch.randint(256, (1, 16))
    with torch.inference_mode():
        model(ids, cache=cache)
        with OperationCounter() as counter:
            logits, _ = model(ids[:, :1], cache=cache)
            sample_token(logits[:, -1], 1.0, None)
    return counter.count


def busy(threads):
    """`sample.py --stream`, alone and with another process on every core: tokens per second."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), "--device", "cpu", "--max_steps", "0",
                   "--eval_batches", "1", "--out_dir", folder]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        alone = stream_speed(f"{folder}/ckpt.pt")
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"])
                  for _ in range(os.cpu_count())]
        try:
            crowded = stream_speed(f"{folder}/ckpt.pt")
        finally:
            for process in others:
                process.kill()
    table(("alone", "busy machine", "kept"), [(alone, crowded, f"{crowded / alone:.0%}")])


def stream_speed(checkpoint):
    command = [sys.executable, str(ROOT / "sample.py"), "--device", "cpu", "--ckpt", checkpoint,
               "--stream", "--max_new_tokens", "3000"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(re.search(r"([\d,]+) tokens/s", done.stderr).group(1).replace(",", ""))


def scoring(threads):
    """Reading 40,000 tokens in chunks through the cache, as `sample.py --score`: tokens/s."""
    from sample import SCORE_CHUNK
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(256, (1, 40_000), generator=generator)
    is_separator = torch.rand(ids.shape, generator=generator) < 0.06
    ids[is_separator] = ord(".")
    runs = {}
    for attn in ("sep", "streamingllm"):
        model = decoding_model(attn)

        @torch.inference_mode()
        def read(model=model):
            cache = SepCache(model.config)
            for chunk in ids.split(SCORE_CHUNK["cpu"], dim=1):
                model(chunk, cache=cache)

        runs[attn] = read
    seconds = seconds_of(runs, repeats=3)
    table(runs, [[f"{ids.shape[1] / value:,.0f}" for value in seconds.values()]])


def pretrained(threads):
    """Tokens per second of random weights in SmolLM2-135M's shape: `llama.py`, and Hugging Face's
    generate, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama import load_model
    n_tokens = 50
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        rope_theta=100000.0, rms_norm_eps=1e-5, tie_word_embeddings=True)).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        sep = load_model(folder, separators=range(100), device="cpu")  # a token in 500
        full = load_model(folder, attn="full", device="cpu")
    ids = torch.randint(49152, (1, 16))

    def generate(n):
        theirs.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=True, pad_token_id=0)

    rows = []
    for n_threads in sorted({1, os.cpu_count()}):
        torch.set_num_threads(n_threads)
        runs = {}
        for n in (1, n_tokens + 1):  # the difference is decoding alone
            runs["sep", n] = lambda n=n: list(sep.generate(ids, n))
            runs["full", n] = lambda n=n: list(full.generate(ids, n))
            runs["generate", n] = lambda n=n: generate(n)
        seconds = seconds_of(runs, repeats=3)
        speed = {name: n_tokens / (seconds[name, n_tokens + 1] - seconds[name, 1])
                 for name in ("sep", "full", "generate")}
        rows.append([n_threads] + [f"{value:.1f}" for value in speed.values()]
                    + [f"{speed['sep'] / speed['generate']:.2f}x"])
    torch.set_num_threads(threads)
    table(("threads", "sep", "full", "HF generate", "sep / generate"), rows)


TABLES = {"attention": attention, "training": training, "decoding": decoding, "contexts": contexts,
          "busy": busy, "scoring": scoring, "pretrained": pretrained}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TABLES, help="one table instead of all")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, measure in TABLES.items():
        if args.only in (None, name):
            print(f"\n### {' '.join(measure.__doc__.split())}")
            measure(args.threads)


if __name__ == "__main__":
    main()
