"""Using a model: samples, a stream without end in constant memory, and the perplexity of a text.

    python sample.py --prompt "To be, " --num_samples 3    samples
    python sample.py --stream                              text without end, until Ctrl-C
    python sample.py --score FILE                          perplexity of a text of any length
    python sample.py --attn sep --window 64 --stream       another attention than in training
    python sample.py --ckpt FOLDER --stream                a pretrained model, see `pretrained.py`

The one idea: all of it is a loop over `model(ids, cache=cache)`.
"""
import argparse
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from data.tokenizer import read_pieces
from model import CHUNK_SIZE
from options import add_options, fields_of, option, require, run_script
from pretrained import load_model, tokenizer_of
from sep_cache import make_cache
from sep_kernel import is_modern
from sep_mask import SepConfig


@dataclass
class SampleConfig:
    """What to do with a model. ValueError names the field that is out of range."""
    ckpt: str = option("out/ckpt.pt", "a checkpoint of train.py, or the folder of a pretrained "
                                      "model: config.json, *.safetensors, tokenizer.json")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where to compute")
    prompt: str = option("\n", "text to begin with; -: standard input")
    stream: bool = option(False, "write without end; in constant memory, unless attn is full")
    score: str = option(None, "read this file as a stream and print its perplexity; -: standard "
                              "input")
    num_samples: int = option(1, "how many samples")
    max_new_tokens: int | None = option(None, "length of a sample; None: 500, of a stream no end")
    temperature: float = option(0.8, "0: the likeliest token; 1: as trained")
    top_k: int | None = option(None, "sample among the k likeliest tokens; None: among all")
    seed: int = option(0, "of the samples")
    compile: bool = option(False, "compile the work of a token: half a minute, then small models "
                                  "write nearly twice as fast on a CPU; needs a C++ compiler")
    # goes to SepConfig
    separators: str = option(None, "the characters that separate segments, a line break in bash: "
                                   "$'.,\\n'; None: the model's")

    def __post_init__(self):
        for name, minimum in dict(num_samples=1, max_new_tokens=1, top_k=1, temperature=0).items():
            value = getattr(self, name)
            require(value is None or value >= minimum,
                    f"--{name} is {value}, and must be at least {minimum}")
        require(not self.compile or shutil.which(os.environ.get("CXX", "g++")),
                "--compile needs a C++ compiler, and there is no g++")


def write(model, tokenizer, prompt, cfg):
    """Print a text as it comes: the prompt (a list of ids) and its continuation."""
    cache = make_cache(model.config, 1, cfg.device, model.embed.weight.dtype)
    n_tokens = cfg.max_new_tokens or (sys.maxsize if cfg.stream else 500)
    ids = torch.tensor([prompt], device=cfg.device)
    tokens = model.generate(ids, n_tokens, cfg.temperature, cfg.top_k, cache, cfg.compile)
    decoder = tokenizer.decoder()
    print(decoder.step(prompt), end="")
    # on a terminal the text itself shows how far it is
    bar = tqdm(total=cfg.max_new_tokens, unit="token", unit_scale=True, mininterval=0.5,
               disable=sys.stdout.isatty())
    start = time.perf_counter()
    n_written = 0
    try:
        for token in tokens:
            if token.item() in tokenizer.eos_ids and not cfg.stream:
                break
            print(decoder.step(token.tolist()), end="", flush=True)
            n_written += 1
            bar.update()
    except KeyboardInterrupt:
        sys.exit()  # which is how a stream ends
    finally:
        bar.close()
        seconds = time.perf_counter() - start
        print(decoder.flush(), flush=True)
        print(f"{n_written:,} tokens in {seconds:.1f} s, {n_written / seconds:,.0f} tokens/s; "
              f"{status_of(cache)}", file=sys.stderr)


@torch.inference_mode()
def score(model, tokenizer, file, device):
    """Read a binary file as one stream, and print how well each token is predicted from the last.

    Perplexity is e to the mean loss. Nothing predicts the first token, so it does not count.
    """
    cache = make_cache(model.config, 1, device, model.embed.weight.dtype)
    ids = torch.empty(0, dtype=torch.int64)
    n_bytes = n_tokens = nats = 0
    bar = tqdm(None, "scoring", unit="token", unit_scale=True)
    for text in read_pieces(file):
        is_first = len(ids) == 0
        new_ids = torch.tensor(tokenizer.encode(text, is_first), dtype=torch.int64)
        n_bytes += len(text.encode(errors="surrogateescape"))
        if is_first:
            n_bytes -= tokenizer.n_bytes(new_ids[:1].tolist())
        ids = torch.cat([ids[-1:], new_ids])  # the last token predicts the next
        for i in range(0, len(ids) - 1, CHUNK_SIZE):
            chunk = ids[None, i:i + CHUNK_SIZE + 1].to(device)
            _, loss = model(chunk[:, :-1], chunk[:, 1:], cache=cache)
            nats += loss.item() * (chunk.shape[1] - 1)
            n_tokens += chunk.shape[1] - 1
            bar.set_postfix_str(f"{nats / n_tokens:.4f} nats per token", refresh=False)
            bar.update(chunk.shape[1] - 1)
    bar.close()
    require(n_tokens, "the text to score is too short: nothing predicts its first token")
    print(f"{n_tokens:,} tokens: perplexity {math.exp(min(nats / n_tokens, 700)):.4f}, "
          f"{nats / math.log(2) / n_bytes:.4f} bits per byte")
    print(status_of(cache), file=sys.stderr)


def status_of(cache):
    """What the cache holds, beside one that keeps everything."""
    _, n_rows = cache.row_position.shape
    mib = cache.nbytes / 2 ** 20
    full_mib = mib * cache.n_tokens / max(n_rows, 1)
    return (f"{cache.row_visible.sum():,} of {cache.n_tokens:,} keys, "
            f"cache {mib:,.2f} MiB (a full cache: {full_mib:,.2f})")


def run(cfg, attention):
    """Do what the options ask for."""
    device = torch.device(cfg.device)
    dtype = torch.bfloat16 if is_modern(device) else torch.float32
    model = load_model(cfg.ckpt, dtype, device, **attention)
    tokenizer = tokenizer_of(cfg.ckpt, model)
    torch.manual_seed(cfg.seed % 2 ** 63)
    if cfg.score:
        with sys.stdin.buffer if cfg.score == "-" else open(cfg.score, "rb") as file:
            score(model, tokenizer, file, device)
        return
    if sum(weight.numel() for weight in model.parameters()) < 10_000_000:
        # the products of one token take microseconds: more threads would only wait for each other
        torch.set_num_threads(1)
    prompt = cfg.prompt
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode(errors="surrogateescape")
    ids = tokenizer.encode(prompt)
    require(ids, "the prompt is empty; give --prompt some text")
    for _ in range(cfg.num_samples):
        write(model, tokenizer, ids, cfg)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, SampleConfig, dict(prompt="a line break"))
    add_options(parser, SepConfig, dict.fromkeys(asdict(SepConfig()), "the model's"))
    options = vars(parser.parse_args())
    try:
        cfg = SampleConfig(**fields_of(SampleConfig, options))
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.reconfigure(encoding="utf-8")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends it as Ctrl-C does
    run(cfg, fields_of(SepConfig, options))


if __name__ == "__main__":
    run_script(main)
