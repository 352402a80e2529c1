"""Using a model: samples, a stream without end in constant memory, and the perplexity of a text.

    python sample.py --prompt "To be, " --num_samples 3    samples, made side by side
    python sample.py --stream                              text without end, until Ctrl-C
    python sample.py --score FILE                          perplexity of a text of any length
    python sample.py --attn sep --window 64 --stream       another attention than in training
    python sample.py --ckpt FOLDER --stream                a pretrained model, see `llama.py`

The one idea: all of it is one loop over `model(ids, cache=cache)`. Read after `train.py`.
"""
import argparse
import codecs
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.prepare import separator_ids
from llama import load_model, load_tokenizer
from model import MAX_LOGITS
from sep_cache import SepCache, SepConfig, require
from train import (
    DEFAULT_DEVICE,
    DEVICE_HELP,
    Parser,
    catch_signals,
    fields_of,
    find_device,
    is_out_of_memory,
    load_checkpoint,
    peak_memory,
)

SCORE_CHUNK = {"cpu": 512, "mps": 512, "cuda": 16384}  # tokens per forward
ONE_THREAD_BELOW = 10_000_000  # parameters


# ---- text and tokens


class ByteTokenizer:
    """Tokens are bytes."""
    eos_ids = frozenset()  # no token ends a text

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def encode(self, text):
        # surrogates: bytes of the command line or of a file that are not UTF-8
        return list(text.encode(errors="surrogateescape"))

    def decode(self, ids, is_end=False):
        """The text of the next ids; a character whose bytes are not all there yet waits for them.

        is_end: nothing will follow; what is still waiting is shown as U+FFFD.
        """
        return self._decoder.decode(bytes(ids), is_end)

    def encode_file(self, path):
        """The token ids of a file, as an array that is read as it is needed."""
        return read_tokens(path, np.uint8)

    def separators(self, characters):
        """The ids that separate segments, if these characters do."""
        return separator_ids(characters)


class IdTokenizer:
    """For models of token ids that another program has made: text is their numbers, with spaces."""
    eos_ids = frozenset()

    def encode(self, text, name="the prompt"):
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            raise ValueError(f"this model reads token ids, so {name} must be numbers with "
                             f"spaces between them; it begins with {text[:20]!r}") from None

    def decode(self, ids, is_end=False):
        return "".join(f"{token} " for token in ids)

    def encode_file(self, path):
        return read_tokens(path, np.uint16)

    def separators(self, characters):
        return self.encode(characters, "--separators")


def read_tokens(path, dtype):
    """The whole tokens of a binary file (np.memmap)."""
    require(path.is_file(), f"there is no file {path} to score")
    n_bytes = path.stat().st_size
    n_tokens = n_bytes // np.dtype(dtype).itemsize
    require(n_tokens > 1, f"{path} is too short to score: it has {n_bytes} bytes, and the first "
            f"token is only read")
    return np.memmap(path, dtype, mode="r", shape=n_tokens)


# ---- generation


def cache_status(cache):
    """What the cache holds, beside one that keeps everything."""
    mib = cache.nbytes / 2 ** 20
    full_mib = cache.nbytes_of(cache.n_tokens) / 2 ** 20
    share = cache.n_visible_keys / max(cache.n_tokens, 1)  # interrupted before the first token: 0
    return (f"{cache.n_visible_keys:,.0f} of {cache.n_tokens:,} keys ({share:.2%}), "
            f"cache {mib:,.2f} MiB (a full cache: {full_mib:,.2f})")


class TextWriter:
    """Prints text as it comes; on a terminal in whole lines, above the progress bar."""
    MAX_LINE = 150  # characters; a longer line is broken

    def __init__(self):
        self.line = ""

    def write(self, text):
        if not sys.stdout.isatty():
            print(text, end="", flush=text.endswith("\n"))
            return
        self.line += text
        if self.line.endswith("\n") or len(self.line) > self.MAX_LINE:
            self.flush()

    def flush(self):
        """Print what is still waiting for its line's end."""
        if self.line:
            tqdm.write(self.line.removesuffix("\n"))
        self.line = ""


def print_stream(model, tokenizer, cache, prompt, args):
    """Print tokens without end, or `max_new_tokens` of them; Ctrl-C ends it."""
    if sum(weight.numel() for weight in model.parameters()) < ONE_THREAD_BELOW:
        # The products of one token with such matrices take microseconds: more threads gain nothing,
        # wait for each other by spinning, and stand still when another process has their cores.
        torch.set_num_threads(1)
    n_tokens = args.max_new_tokens or sys.maxsize
    tokens = model.generate(prompt, n_tokens, args.temperature, args.top_k, cache)
    bar = tqdm(total=args.max_new_tokens, desc="streaming", unit="token", unit_scale=True,
               mininterval=0.5)
    writer = TextWriter()
    start = time.perf_counter()
    try:
        for token in tokens:
            writer.write(tokenizer.decode(token.tolist()))
            is_refreshed = bar.update()
            if is_refreshed:
                bar.set_postfix_str(cache_status(cache), refresh=False)
    except KeyboardInterrupt:
        pass
    seconds = time.perf_counter() - start
    bar.close()
    writer.write(tokenizer.decode([], is_end=True))
    writer.flush()
    print(f"\n{bar.n:,} tokens in {seconds:.1f} s, {bar.n / seconds:,.0f} tokens/s; "
          f"{cache_status(cache)}", file=sys.stderr)


def print_samples(model, tokenizer, cache, prompt, args):
    """Print a continuation of each prompt. Each sequence of the batch has its own separators."""
    n_tokens = args.max_new_tokens or 500
    tokens = model.generate(prompt, n_tokens, args.temperature, args.top_k, cache)
    eos_ids = torch.tensor(sorted(tokenizer.eos_ids), device=prompt.device)
    has_ended = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    new_ids = []
    start = time.perf_counter()
    try:
        for token in tqdm(tokens, total=n_tokens, desc="sampling", unit="token"):
            new_ids.append(token)
            if len(eos_ids) > 0:
                has_ended |= (token[:, None] == eos_ids).any(dim=1)
                if has_ended.all():
                    break
    except KeyboardInterrupt:  # what there is, is printed
        pass
    n_sampled = len(prompt) * len(new_ids)
    texts = torch.stack([*prompt.unbind(dim=1), *new_ids], dim=1).tolist()  # waits for the GPU
    seconds = time.perf_counter() - start
    for text in texts:
        prompt_ids = text[:prompt.shape[1]]
        sample = text[prompt.shape[1]:]
        end = next((i for i, token in enumerate(sample) if token in tokenizer.eos_ids), len(sample))
        print(tokenizer.decode(prompt_ids + sample[:end], is_end=True), end="\n---\n")
    print(f"{n_sampled / seconds:,.0f} tokens/s; {cache_status(cache)}", file=sys.stderr)


# ---- scoring


class Span(NamedTuple):
    """Some of the predictions of a text: those from number `start` up to `end`."""
    name: str
    start: int
    end: int


class Score(NamedTuple):
    nats: dict              # name of a span -> mean loss of its tokens
    key_share: float        # keys that a token sees / tokens up to it, mean over all tokens
    tokens_per_s: float
    first_memory_gib: float  # peak after the first chunk
    memory_gib: float        # peak after the last


def score_spans(n):
    """The spans of a text of n predictions whose perplexity is printed."""
    spans = [Span(f"first {end:,}", 0, end)
             for end in (10_000, 100_000, 1_000_000, 4_000_000) if end < n]
    if n > 100_000:
        spans.append(Span("last 100,000", n - 100_000, n))
    spans.append(Span(f"all {n:,}", 0, n))
    return spans


@torch.inference_mode()
def score(model, cache, tokens, device, signals=()):
    """The Score of a text, read as one stream: each token is predicted from what the cache holds.

    tokens: NumPy array of token ids, at least two; cache: a fresh SepCache of one sequence;
    signals: as soon as it holds one, the reading ends, and the Score is of what was read.
    """
    n = len(tokens) - 1  # the first token is only read
    chunk_size = min(SCORE_CHUNK[device.type], MAX_LOGITS // model.config.vocab_size)
    spans = score_spans(n)
    sums = dict.fromkeys(spans, 0.0)  # nats
    whole = spans[-1]
    total_share = 0.0
    start = time.perf_counter()
    with tqdm(total=n, desc="scoring", unit="token", unit_scale=True) as bar:
        for chunk_start in range(0, n, chunk_size):
            chunk = tokens[chunk_start:chunk_start + chunk_size + 1]  # its last is a target only
            ids = torch.from_numpy(chunk.astype(np.int64)).to(device)
            logits, _ = model(ids[None, :-1], cache=cache)
            nats = F.cross_entropy(logits[0].float(), ids[1:], reduction="none")
            nats = nats.cpu().numpy().astype(np.float64)  # here: Apple GPUs have no float64
            for span in spans:
                begin = max(span.start - chunk_start, 0)
                end = max(span.end - chunk_start, 0)
                sums[span] += nats[begin:end].sum()
            total_share += key_shares(chunk_start, len(nats), cache.n_visible_keys).sum()
            n_read = chunk_start + len(nats)
            if chunk_start == 0:
                first_memory_gib = peak_memory(device)
            mean = sums[whole] / n_read
            status = f"perplexity {perplexity(mean):.4f}, {cache_status(cache)}"
            bar.set_postfix_str(status, refresh=False)
            bar.update(len(nats))
            if signals:
                break
    tokens_per_s = n_read / (time.perf_counter() - start)
    means = {span.name: sums[span] / (span.end - span.start)
             for span in spans[:-1] if span.end <= n_read}
    means[f"all {n_read:,}"] = sums[whole] / n_read
    return Score(means, total_share / n_read, tokens_per_s, first_memory_gib, peak_memory(device))


def perplexity(nats):
    """e to the mean loss; inf where that is beyond all numbers (a model that has diverged)."""
    with np.errstate(over="ignore"):
        return np.exp(nats)


def key_shares(start, n_tokens, n_visible_keys):
    """Keys seen / tokens so far, for each of n_tokens from position `start` on (the paper's r.KV).

    n_visible_keys: of the last of them. It stands for all of a chunk, but no token sees more keys
    than there are: exact for full attention and a window, close for separators.
    """
    n_so_far = np.arange(start + 1, start + n_tokens + 1)
    return np.minimum(n_visible_keys, n_so_far) / n_so_far


def print_score(result, cache, is_bytes):
    """The table of a Score, and what it took to compute."""
    head = ["tokens", "perplexity"]
    if is_bytes:
        head.append("bits per byte")
    rows = [head, ["---"] * len(head)]
    for name, nats in result.nats.items():
        row = [name, f"{perplexity(nats):.4f}"]
        if is_bytes:
            row.append(f"{nats / math.log(2):.4f}")
        rows.append(row)
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(f"keys used: {result.key_share:.2%} of those of full attention, mean over all tokens; "
          f"{result.tokens_per_s:,.0f} tokens/s; {cache_status(cache)}; peak memory "
          f"{result.first_memory_gib:.3f} GiB in the first chunk, {result.memory_gib:.3f} in all",
          file=sys.stderr)


# ---- the command line


def make_parser():
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", default="out/ckpt.pt", metavar="PATH",
                        help="a checkpoint of train.py (default: out/ckpt.pt), or the folder of a\n"
                             "pretrained model: config.json, *.safetensors, tokenizer.json; that\n"
                             "one is used with --attn sep, window 256, sinks 4, max_seps 256")
    parser.add_argument("--device", default=DEFAULT_DEVICE,
                        help=f"{DEVICE_HELP}\n(default: {DEFAULT_DEVICE})")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="\n", metavar="TEXT",
                        help="text to begin with; token ids if the model was trained on token ids\n"
                             "(default: a line break)")
    prompt.add_argument("--prompt_file", type=Path, metavar="FILE",
                        help="a file with the text to begin with")
    parser.add_argument("--num_samples", type=int, default=1, metavar="N",
                        help="samples to make side by side (default: 1)")
    parser.add_argument("--max_new_tokens", type=int, metavar="N",
                        help="length of a sample (default: 500; with --stream: no end)")
    parser.add_argument("--temperature", type=float, default=0.8,
                        help="0: the likeliest token; 1: as trained (default: 0.8)")
    parser.add_argument("--top_k", type=int, metavar="K",
                        help="sample among the K likeliest tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--stream", action="store_true",
                        help="write without end; in constant memory, unless attn is full")
    parser.add_argument("--score", type=Path, metavar="FILE",
                        help="read this text as a stream and print its perplexity; token ids\n"
                             "(uint16) if the model was trained on token ids")
    parser.add_config(SepConfig, default="the checkpoint's")
    parser.add_argument("--separators", metavar="CHARS", default=argparse.SUPPRESS,
                        help="the characters that separate segments; a line break in bash:\n"
                             "$'.,\\n'; token ids if the model was trained on token ids\n"
                             "(default: the checkpoint's)")
    return parser


def check_args(parser, args):
    minimum_of = dict(num_samples=1, max_new_tokens=1, temperature=0, top_k=1)
    for name, minimum in minimum_of.items():
        value = getattr(args, name)
        if value is not None and not minimum <= value < math.inf:
            parser.error(f"--{name} is {value}, and must be at least {minimum}")
    if args.stream and (args.num_samples > 1 or args.score):
        parser.error("--stream writes one text, so give it without --num_samples and --score")
    if args.score and args.num_samples > 1:
        parser.error("--score reads one text, so give it without --num_samples")
    if not -2 ** 63 <= args.seed < 2 ** 64:
        parser.error(f"--seed is {args.seed}, and must be a number of 64 bits")


def load(parser, args, device):
    """(model, tokenizer) that the options ask for; the separators are those of model.config."""
    folder = Path(args.ckpt)
    if folder.is_dir() and not (folder / "ckpt.pt").exists():
        model = load_model(args.ckpt, device=device)
        tokenizer = load_tokenizer(args.ckpt)
    else:
        checkpoint = load_checkpoint(args.ckpt)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = checkpoint.model.to(device, dtype).eval()
        is_bytes = checkpoint.info["data_meta"]["dtype"] == "uint8"
        tokenizer = ByteTokenizer() if is_bytes else IdTokenizer()
    settings = fields_of(SepConfig, vars(args))
    with parser.usage_errors():
        if "separators" in settings:
            settings["separators"] = tokenizer.separators(settings["separators"])
        model.configure(**settings)
    return model, tokenizer


def check_vocabulary(ids, model, source):
    """ValueError if token ids (NumPy) are not all of the model's vocabulary."""
    vocab_size = model.config.vocab_size
    for token in (ids.min(), ids.max()):
        require(0 <= token < vocab_size,
                f"{source} holds token {token}, beyond the vocabulary of {vocab_size}")


def run(parser, args, device):
    """Do what the options ask for."""
    model, tokenizer = load(parser, args, device)
    weight = next(model.parameters())
    cache = SepCache(model.config, args.num_samples, device, weight.dtype)
    torch.manual_seed(args.seed)

    if args.score:
        tokens = tokenizer.encode_file(args.score)
        check_vocabulary(tokens, model, args.score)
        result = score(model, cache, tokens, device, catch_signals())
        print_score(result, cache, isinstance(tokenizer, ByteTokenizer))
        return

    text = args.prompt
    if args.prompt_file:
        text = args.prompt_file.read_bytes().decode(errors="surrogateescape")
    ids = tokenizer.encode(text)
    require(ids, "the prompt is empty; give --prompt some text, or token ids to a model of those")
    check_vocabulary(np.array(ids), model, "the prompt")
    prompt = torch.tensor([ids] * args.num_samples, device=device)
    if args.stream:
        print_stream(model, tokenizer, cache, prompt, args)
    else:
        print_samples(model, tokenizer, cache, prompt, args)


def main():
    parser = make_parser()
    args = parser.parse_args()
    check_args(parser, args)
    device = find_device(parser, args.device)
    sys.stdout.reconfigure(encoding="utf-8")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends it as Ctrl-C does
    try:
        run(parser, args, device)
    except BrokenPipeError:  # whoever read the output has enough; Python flushes it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit("sample.py: stopped")
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit("sample.py: the memory is full; lower --num_samples or --window, "
                 "or set --max_seps")


if __name__ == "__main__":
    main()
