"""Using a model: samples, a stream without end in constant memory, and the perplexity of a text.

    python sample.py --prompt "To be, " --num_samples 3    samples
    python sample.py --stream                              text without end, until Ctrl-C
    python sample.py --score FILE                          perplexity of a text of any length
    python sample.py --attn sep --window 64 --stream       another attention than in training
    python sample.py --ckpt FOLDER --stream                a pretrained model, see `pretrained.py`

The one idea: all of it is a loop over `model(ids, cache=cache)`.
"""
import math
import sys
import time
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from data.tokenizer import Decoder, read_pieces
from model import CHUNK_SIZE
from options import check_minima, fields_of, option, parse_options, require, run_script
from pretrained import load_model, tokenizer_of
from sep_kernel import is_modern
from sep_mask import SepConfig


@dataclass
class SampleConfig:
    """What to do with a model. ValueError names the field that is out of range."""
    ckpt: str = option("out/ckpt.pt", "a checkpoint of train.py, or the folder of a pretrained "
                                      "model: config.json, *.safetensors, tokenizer.json")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where to compute")
    dtype: str = option(None, "float32, bfloat16 or float16, of the weights; None: bfloat16 on a "
                              "GPU of compute capability 8.0 or more, else float32")
    prompt: str = option("\n", "text to begin with; -: standard input")
    stream: bool = option(False, "write without end; in constant memory, unless attn is full")
    score: str = option(None, "read this file as a stream and print its perplexity; -: standard "
                              "input")
    num_samples: int = option(1, "how many samples", 1)
    max_new_tokens: int | None = option(None, "length of a sample; None: 500, of a stream no end",
                                        1)
    temperature: float = option(0.8, "0: the likeliest token; 1: as trained", 0)
    top_k: int | None = option(None, "sample among the k likeliest tokens; None: among all", 1)
    seed: int = option(0, "of the samples")
    compile: bool = option(False, "compile the work of a token: half a minute, then small models "
                                  "write twice as fast on a CPU; needs a C++ compiler")
    # goes to SepConfig
    separators: str = option(None, "the characters that separate segments, a line break in bash: "
                                   "$'.,\\n'")

    def __post_init__(self):
        check_minima(self)
        require(self.dtype in (None, "float32", "bfloat16", "float16"),
                f"dtype is {self.dtype}, and must be float32, bfloat16 or float16")


def write(model, tokenizer, prompt, cfg):
    """Print a text as it comes: the prompt (a list of ids) and its continuation."""
    cache = model.new_cache()
    n_tokens = cfg.max_new_tokens or (sys.maxsize if cfg.stream else 500)
    ids = torch.tensor([prompt], device=cfg.device)
    tokens = model.generate(ids, n_tokens, cfg.temperature, cfg.top_k, cache, cfg.compile)
    decoder = Decoder(tokenizer)
    print("".join(map(decoder.step, prompt)), end="")
    # on a terminal the text itself shows how far it is
    bar = tqdm(map(int, tokens), total=cfg.max_new_tokens, unit="token", unit_scale=True,
               disable=sys.stdout.isatty())
    start = time.perf_counter()
    n_written = 0
    try:
        for token_id in bar:
            require(token_id >= 0, "the model's logits are not finite: it is broken")
            if token_id in tokenizer.special_ids and not cfg.stream:
                break
            print(decoder.step(token_id), end="", flush=True)
            n_written += 1
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
    """Read a binary file as one stream, and print how well each token is predicted.

    Perplexity is e to the mean loss. Nothing predicts the first token, so it does not count.
    """
    cache = model.new_cache()
    ids = []
    nats = 0
    bar = tqdm(None, "scoring", unit="token", unit_scale=True)
    for text in read_pieces(file):
        ids = ids[-1:] + tokenizer.encode(text, is_first=not ids)  # the last one predicts the next
        for i in range(0, len(ids) - 1, CHUNK_SIZE):
            chunk = torch.tensor([ids[i:i + CHUNK_SIZE + 1]], device=device)
            x, y = chunk[:, :-1], chunk[:, 1:]
            _, loss = model(x, y, cache=cache)
            nats += loss.item() * y.numel()
            bar.update(y.numel())
            bar.set_postfix_str(f"{nats / cache.n_tokens:.4f} nats per token", refresh=False)
    bar.close()
    require(cache.n_tokens, "the text to score is too short: nothing predicts its first token")
    loss = nats / cache.n_tokens
    print(f"{cache.n_tokens:,} tokens: perplexity {math.exp(min(loss, 700)):.4f}")
    print(status_of(cache), file=sys.stderr)


def status_of(cache):
    """What the cache holds, beside one that keeps everything."""
    _, n_rows = cache.row_position.shape
    mib = sum(x.nbytes for x in cache.kv) / 2 ** 20
    full_mib = mib * cache.n_tokens / max(n_rows, 1)
    return (f"{cache.row_visible.sum():,} of {cache.n_tokens:,} keys, "
            f"cache {mib:,.2f} MiB (a full cache: {full_mib:,.2f})")


def main():
    shown = dict.fromkeys(asdict(SepConfig()), "the model's") | dict(prompt="a line break")
    options = parse_options(__doc__, [SampleConfig, SepConfig], shown=shown)
    run(SampleConfig(**fields_of(SampleConfig, options)), fields_of(SepConfig, options))


def run(cfg, attention):
    """Do what the options ask for."""
    device = torch.device(cfg.device)
    dtype = cfg.dtype or ("bfloat16" if is_modern(device) else "float32")
    model = load_model(cfg.ckpt, getattr(torch, dtype), device, **attention)
    tokenizer = tokenizer_of(model)
    torch.manual_seed(cfg.seed)
    if cfg.score is not None:
        with open(0 if cfg.score == "-" else cfg.score, "rb") as file:
            score(model, tokenizer, file, device)
        return
    if sum(weight.numel() for weight in model.parameters()) < 10_000_000:
        # the products of one token take microseconds: more threads would only wait for each other
        torch.set_num_threads(1)
    prompt = cfg.prompt
    if prompt == "-":
        prompt = open(0, "rb").read().decode(errors="surrogateescape")
    ids = tokenizer.encode(prompt)
    require(ids, "the prompt is empty; give --prompt some text")
    for _ in range(cfg.num_samples):
        write(model, tokenizer, ids, cfg)


if __name__ == "__main__":
    run_script(main)
