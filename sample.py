"""Using a model: samples, a stream without end in constant memory, and the perplexity of a text.

    python sample.py --prompt "To be, " --num_samples 3    samples
    python sample.py --stream                              text without end, until Ctrl-C
    python sample.py --score FILE                          perplexity of a text of any length
    python sample.py --attn sep --window 64 --stream       another attention than in training
    python sample.py --ckpt FOLDER --stream                a pretrained model, see `pretrained.py`

The one idea: all of it is a loop over `model(ids, cache=cache)`. Read after `train.py`.
"""
import argparse
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.prepare import ByteTokenizer, read_pieces
from model import CHUNK_SIZE
from pretrained import Tokenizer
from sep_cache import SepConfig, add_options, fields_of, make_cache, require
from train import TrainConfig, check_device, load_any


def load(path):
    """The model and the tokenizer of a checkpoint or of a Hugging Face folder."""
    folder = path if path.is_dir() else path.parent
    model = load_any(path)
    if (folder / "tokenizer.json").exists():
        return model, Tokenizer(folder)
    require(model.config.vocab_size == 256, f"the model {path} writes token ids; put their "
            f"tokenizer.json into {folder} to read and write text")
    return model, ByteTokenizer()


def cache_status(cache):
    """What the cache holds, beside one that keeps everything."""
    share = cache.n_visible_keys / max(cache.n_tokens, 1)  # interrupted before the first token: 0
    mib = cache.nbytes / 2 ** 20
    full_mib = cache.nbytes_of(cache.n_tokens) / 2 ** 20
    return (f"{cache.n_visible_keys:,.0f} of {cache.n_tokens:,} keys ({share:.2%}), "
            f"cache {mib:,.2f} MiB (a full cache: {full_mib:,.2f})")


def write(model, tokenizer, cache, prompt, args):
    """Print a text as it comes: the prompt (a list of ids) and its continuation. Returns whether it
    was ended by Ctrl-C."""
    n_tokens = args.max_new_tokens or (sys.maxsize if args.stream else 500)
    ids = torch.tensor([prompt], device=args.device)
    decoder = tokenizer.decoder()
    print(decoder.step(prompt), end="")
    start = time.perf_counter()
    tokens = model.generate(ids, n_tokens, args.temperature, args.top_k, cache)
    # on a terminal the text itself shows how far it is
    bar = tqdm(total=args.max_new_tokens, unit="token", unit_scale=True, mininterval=0.5,
               disable=sys.stdout.isatty())
    is_stopped = False
    n_written = 0
    try:
        for token in tokens:
            if token.item() in tokenizer.eos_ids and not args.stream:
                break
            print(decoder.step(token.tolist()), end="", flush=True)
            n_written += 1
            if bar.update():
                bar.set_postfix_str(cache_status(cache), refresh=False)
    except KeyboardInterrupt:
        is_stopped = True
    bar.close()
    seconds = time.perf_counter() - start
    print(decoder.flush(), flush=True)
    print(f"{n_written:,} tokens in {seconds:.1f} s, {n_written / seconds:,.0f} tokens/s; "
          f"{cache_status(cache)}", file=sys.stderr)
    return is_stopped


@torch.inference_mode()
def score(model, tokenizer, cache, file, device):
    """Read a binary file as one stream, and print how well each token is predicted from the last.

    Perplexity is e to the mean loss; the first token is only read. The share of keys used is keys
    seen / tokens so far, the mean over all tokens, where the last token of a chunk stands for all.
    """
    n_bytes = n_predicted = nats = share = 0
    milestone = 10_000
    next_logits = torch.empty(0, model.config.vocab_size, device=device)  # for the next token
    bar = tqdm(desc="scoring", unit="token", unit_scale=True)
    try:
        for piece in read_pieces(file):
            ids = torch.tensor(tokenizer.encode(piece, is_first=cache.n_tokens == 0), device=device)
            for chunk in ids.long().split(CHUNK_SIZE):
                logits = model(chunk[None], cache=cache)[0][0].float()  # (T, V)
                targets = chunk if len(next_logits) else chunk[1:]  # none predicts the first of all
                logits = torch.cat([next_logits, logits])
                next_logits = logits[-1:]
                losses = F.cross_entropy(logits[:-1], targets, reduction="none").double()
                while n_predicted + len(losses) >= milestone:
                    to_milestone = nats + losses[:milestone - n_predicted].sum().item()
                    print(f"first {milestone:,} tokens: perplexity "
                          f"{perplexity(to_milestone / milestone):.4f}")
                    milestone *= 10
                nats += losses.sum().item()
                n_predicted += len(losses)
                n_so_far = torch.arange(cache.n_tokens - len(chunk), cache.n_tokens) + 1
                share += (cache.n_visible_keys / n_so_far).clamp(max=1).sum().item()
                n_bytes += len(piece) * len(chunk) / len(ids)
                bar.update(len(chunk))
                bar.set_postfix_str(cache_status(cache), refresh=False)
    except KeyboardInterrupt:  # what was read counts
        pass
    bar.close()
    require(n_predicted, "the text to score is too short: its first token is only read")
    print(f"all {n_predicted:,} tokens: perplexity {perplexity(nats / n_predicted):.4f}, "
          f"{nats / math.log(2) / n_bytes:.4f} bits per byte, "
          f"{share / cache.n_tokens:.2%} of the keys of full attention")
    print(cache_status(cache), file=sys.stderr)


def perplexity(nats):
    return math.exp(nats) if nats < 700 else math.inf  # a model that has diverged


def run(args, attention):
    """Do what the options ask for."""
    check_device(args.device)
    model, tokenizer = load(args.ckpt)
    if args.separators is not None:
        separators = tokenizer.separators(args.separators)
        # a tokenizer may know more tokens than the model
        attention["separators"] = [s for s in separators if s < model.config.vocab_size]
    model.configure(**attention)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model.to(args.device, dtype).eval()
    if sum(weight.numel() for weight in model.parameters()) < 10_000_000 and not args.score:
        # the products of one token take microseconds: more threads would only wait for each other
        torch.set_num_threads(1)

    torch.manual_seed(args.seed % 2 ** 63)

    def new_cache():
        return make_cache(model.config, 1, args.device, dtype)

    if args.score:
        source = sys.stdin.buffer if args.score == "-" else open(args.score, "rb")
        with source:
            score(model, tokenizer, new_cache(), source, args.device)
        return
    prompt = args.prompt.encode(errors="surrogateescape")
    if args.prompt == "-":
        prompt = sys.stdin.buffer.read()
    ids = tokenizer.encode(prompt)
    require(ids, "the prompt is empty; give --prompt some text")
    for _ in range(args.num_samples):
        if write(model, tokenizer, new_cache(), ids, args):
            break


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, default="out/ckpt.pt", metavar="PATH",
                        help="a checkpoint of train.py, or the folder of a pretrained model: "
                             "config.json, *.safetensors, tokenizer.json (default: out/ckpt.pt)")
    parser.add_argument("--device", default=TrainConfig.device,
                        help=f"default: {TrainConfig.device}")
    parser.add_argument("--prompt", default="\n", metavar="TEXT",
                        help="text to begin with; -: standard input (default: a line break)")
    parser.add_argument("--num_samples", type=int, default=1, metavar="N",
                        help="how many samples (default: 1)")
    parser.add_argument("--max_new_tokens", type=int, metavar="N",
                        help="length of a sample (default: 500; with --stream: no end)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X",
                        help="0: the likeliest token; 1: as trained (default: 0.8)")
    parser.add_argument("--top_k", type=int, metavar="K",
                        help="sample among the K likeliest tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--stream", action="store_true",
                        help="write without end; in constant memory, unless attn is full")
    parser.add_argument("--score", metavar="FILE",
                        help="read this text as a stream and print its perplexity; -: standard "
                             "input")
    add_options(parser, SepConfig,
                **dict.fromkeys(SepConfig.__dataclass_fields__, "the model's"))
    parser.add_argument("--separators", metavar="CHARS", help="the characters that separate "
                        "segments; a line break in bash: $'.,\\n' (default: the model's)")
    args = parser.parse_args()
    for name, minimum in dict(num_samples=1, max_new_tokens=1, temperature=0, top_k=1).items():
        value = getattr(args, name)
        if value is not None and not value >= minimum:
            parser.error(f"--{name} is {value}, and must be at least {minimum}")
    attention = fields_of(SepConfig, vars(args))
    attention.pop("separators")
    sys.stdout.reconfigure(encoding="utf-8")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends it as Ctrl-C does
    try:
        run(args, attention)
    except BrokenPipeError:  # whoever read the output has enough; Python flushes it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit("sample.py: stopped")
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"sample.py: {error}")


if __name__ == "__main__":
    main()
