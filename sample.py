"""Using a model: samples, an endless stream in constant memory, and scoring a text as a stream.

    python sample.py --prompt "To be, " --num_samples 3    samples, made side by side
    python sample.py --stream                              text without end, until Ctrl-C
    python sample.py --score FILE                          perplexity of a text of any length, by position
    python sample.py --attn sep --window 64 --stream       another attention than the model was trained with

The one idea: all of it is one loop over `model(ids, cache=cache)`. This is the last file to read.
"""
import codecs
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import GPTConfig, require
from sep_cache import SepCache
from train import ATTENTION, Parser, find_device, load_checkpoint, peak_memory

PIECE = {"cpu": 256, "cuda": 16384}  # tokens per forward when a text is scored


def held(cache):
    """What the cache holds, beside one that keeps everything."""
    everything = cache.nbytes_of(cache.n_tokens)
    return (f"cache {cache.n_rows:,.0f} rows ({cache.n_rows / cache.n_tokens:.2%} of all), {cache.nbytes / 2 ** 20:,.2f} MiB "
            f"(all: {everything / 2 ** 20:,.2f})")


def writer(is_text):
    """A function that prints one token: valid UTF-8 whatever bytes come, and on a terminal in lines above the bar."""
    decode, line = codecs.getincrementaldecoder("utf-8")(errors="replace").decode, ""

    def write(token):
        nonlocal line
        line += decode(bytes([token])) if is_text else f"{token} "
        if not sys.stdout.isatty():
            print(line, end="", flush=line.endswith("\n"))
            line = ""
        elif line.endswith("\n") or len(line) > 150:
            tqdm.write(line.removesuffix("\n"))
            line = ""

    return write


def stream(model, cache, prompt, args, write):
    """Write tokens without end, or `max_new_tokens` of them; Ctrl-C ends it."""
    total, start = args.max_new_tokens, time.perf_counter()
    bar = tqdm(total=total, unit="token", unit_scale=True, desc="streaming", mininterval=0.5)
    try:
        for token in model.generate(prompt, total or sys.maxsize, args.temperature, args.top_k, cache):
            write(token.item())
            if bar.update():
                bar.set_postfix_str(held(cache), refresh=False)
    except KeyboardInterrupt:
        pass
    bar.close()
    print(f"\n{bar.n:,} tokens in {time.perf_counter() - start:.1f} s, {bar.n / (time.perf_counter() - start):,.0f} tokens/s; "
          f"{held(cache)}", file=sys.stderr)


def samples(model, cache, prompt, args, is_text):
    """Print `num_samples` continuations of the prompt, each row of the batch with its own separators."""
    total, start = args.max_new_tokens or 500, time.perf_counter()
    steps = tqdm(model.generate(prompt, total, args.temperature, args.top_k, cache), total=total, unit="token", desc="sampling")
    tokens = torch.cat([prompt, torch.stack(list(steps), dim=1)], dim=1).tolist()
    speed = total * len(tokens) / (time.perf_counter() - start)
    for row in tokens:
        print(bytes(row).decode(errors="replace") if is_text else " ".join(map(str, row)), end="\n---\n")
    print(f"{speed:,.0f} tokens/s; {held(cache)}", file=sys.stderr)


@torch.inference_mode()
def score(model, cache, tokens, device, is_text):
    """Stream a text through the cache in pieces; print, and return as a dict, its perplexity by position."""
    n, piece = len(tokens) - 1, PIECE[device.type]
    spans = [(f"first {k:,}", 0, k) for k in (10_000, 100_000, 1_000_000, 4_000_000) if k < n]
    spans += [("last 100,000", n - 100_000, n)] * (n > 100_000) + [(f"all {n:,}", 0, n)]
    sums, start, memory = np.zeros(len(spans)), time.perf_counter(), None
    with tqdm(total=n, unit="token", unit_scale=True, desc="scoring") as bar:
        for at in range(0, n, piece):
            ids = torch.from_numpy(tokens[at:at + piece + 1].astype(np.int64)).to(device)
            logits = model(ids[None, :-1], cache=cache)[0][0]
            nats = F.cross_entropy(logits.float(), ids[1:], reduction="none").double().cpu().numpy()
            sums += [nats[max(first - at, 0):max(last - at, 0)].sum() for _, first, last in spans]
            memory = memory or peak_memory(device)
            bar.update(len(nats))
            bar.set_postfix_str(f"perplexity {math.exp(sums[-1] / bar.n):.4f}, {held(cache)}")
    seconds = time.perf_counter() - start
    print(f"| tokens | perplexity |{' bits per byte |' * is_text}\n|---|---|{'---|' * is_text}")
    means = {name: nats / (last - first) for (name, first, last), nats in zip(spans, sums)}
    for name, nats in means.items():
        print(f"| {name} | {math.exp(nats):.4f} |" + f" {nats / math.log(2):.4f} |" * is_text)
    print(f"{n / seconds:,.0f} tokens/s; {held(cache)}; peak memory {memory:.3f} GiB in the first piece, "
          f"{peak_memory(device):.3f} GiB in all", file=sys.stderr)
    return {name: math.exp(nats) for name, nats in means.items()}


def main():
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", default="out/ckpt.pt", help="the checkpoint (default: out/ckpt.pt)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--prompt", default="\n", help="text to begin with; token ids if the model is not one of bytes\n"
                        "(default: a line break)")
    parser.add_argument("--prompt_file", type=Path, help="a file with the text to begin with")
    parser.add_argument("--num_samples", type=int, default=1, help="samples to make side by side (default: 1)")
    parser.add_argument("--max_new_tokens", type=int, help="length of a sample (default: 500; with --stream: no end)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token; 1: as trained (default: 0.8)")
    parser.add_argument("--top_k", type=int, help="sample among the k likeliest tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--stream", action="store_true", help="write without end, in constant memory")
    parser.add_argument("--score", type=Path, metavar="FILE", help="stream this text through the model and print its perplexity")
    parser.add_config(GPTConfig, ATTENTION, "the checkpoint's")
    args = parser.parse_args()
    for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 1)):
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            parser.error(f"--{name} is {value}, and must be at least {least}")
    if args.stream and (args.num_samples > 1 or args.score):
        parser.error("--stream writes one text, so give it without --num_samples and --score")
    device = find_device(parser, args.device)
    sys.stdout.reconfigure(encoding="utf-8")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        model, _, about = load_checkpoint(args.ckpt)
        try:
            model.configure(**{k: v for k, v in vars(args).items() if k in ATTENTION})
        except ValueError as error:
            parser.error(str(error))
        dtype, is_text = np.dtype(about["data"]["dtype"]), about["data"]["dtype"] == "uint8"
        model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
        cache = SepCache(model.config, args.num_samples, device, model.embed.weight.dtype)
        torch.manual_seed(args.seed)
        if args.score:
            require(args.score.is_file(), f"there is no file {args.score} to score")
            require(args.score.stat().st_size // dtype.itemsize > 1, f"{args.score} is too short to score: it has "
                    f"{args.score.stat().st_size} bytes, and the first token is only read")
            tokens = np.memmap(args.score, dtype, mode="r", shape=args.score.stat().st_size // dtype.itemsize)
            require(tokens.max() < model.config.vocab_size, f"{args.score} holds token {tokens.max()}, beyond the vocabulary")
            score(model, cache, tokens, device, is_text)
            return
        prompt = args.prompt_file.read_bytes() if args.prompt_file else args.prompt.encode()
        prompt = list(prompt) if is_text else [int(word) for word in prompt.split()]
        require(prompt, "the prompt is empty; leave --prompt out to begin with a line break")
        require(max(prompt) < model.config.vocab_size and min(prompt) >= 0, "the prompt has tokens beyond the vocabulary")
        prompt = torch.tensor([prompt] * args.num_samples, device=device)
        if args.stream:
            stream(model, cache, prompt, args, writer(is_text))
        else:
            samples(model, cache, prompt, args, is_text)
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit("sample.py: stopped")
    except torch.OutOfMemoryError:
        sys.exit("sample.py: the GPU's memory is full; lower --num_samples or --window, or set --max_seps")
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")


if __name__ == "__main__":
    main()
