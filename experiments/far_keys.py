"""What is a far key worth to a real model, training-free? Loss against the keys that are used.

    python experiments/far_keys.py --model FOLDER --text BOOKS

reads stretches of 1,024 tokens, evenly spaced over the file, with the lines of a paragraph joined.
It prints the loss on their second halves as the difference to full attention of the same texts,
with its standard error over texts. There are windows alone, with separators and, as controls, with
about as many other tokens: fixed_every=9 keeps as many as there are separators in books.
"""
import argparse
import re
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sep_cache  # noqa: E402
from model import GPT  # noqa: E402
from pretrained import Tokenizer  # noqa: E402

T = 1024
LINE_IN_PARAGRAPH = re.compile(r"(?<!\n)\n(?!\n)")


def read_texts(model_folder, path, n_texts):
    """Token ids (1, T) of stretches of books, evenly spaced over all of them."""
    tokenizer = Tokenizer(model_folder)
    books = LINE_IN_PARAGRAPH.sub(" ", path.read_text(errors="replace"))
    starts = torch.linspace(0, len(books) - 12 * T, n_texts).long().tolist()
    texts = [tokenizer.encode(books[start:start + 12 * T].encode())[:T] for start in starts]
    return [torch.tensor([ids]) for ids in texts]


# ---- which tokens stay visible: each rule may stand in the place of sep_cache.is_kept


AS_CONFIGURED = sep_cache.is_kept  # itself, before anything stands in its place


def token_before(ids, positions, config):
    is_separator = AS_CONFIGURED(ids, positions, config)
    return F.pad(is_separator[:, 1:], (0, 1)) | (positions < config.sinks)


def token_after(ids, positions, config):
    is_separator = AS_CONFIGURED(ids, positions, config)
    return F.pad(is_separator[:, :-1], (1, 0)) | (positions < config.sinks)


def random_tokens(ids, positions, config):
    n = int(AS_CONFIGURED(ids, positions, config).sum())
    chosen = torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(n))[:n]
    return torch.isin(positions, chosen)[None] | (positions < config.sinks)


# ---- loss


def loss_of_halves(model, ids):
    """The mean loss on each half of a text, (2,): in the second, far keys are many."""
    logits, _ = model(ids)
    losses = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    return torch.stack([half.mean() for half in losses.tensor_split(2)])


def n_visible_keys(model, ids, rule):
    """How many keys the last token of a text sees."""
    positions = torch.arange(T)
    kept = rule(ids, positions, model.config)
    reach = sep_cache.key_reach(kept, positions[None], model.config)
    return int((T - 1 - positions < reach).sum())


def mean_and_error(values):
    """Mean and standard error over the last dimension."""
    return values.mean(-1), values.std(-1) / values.shape[-1] ** 0.5


def cases():
    """{name: (rule, settings)}."""
    rows = {"full": (AS_CONFIGURED, dict(attn="full"))}
    for window in (32, 128, 140, 228):  # 140 and 228: as many keys as sep 32 and sep 128
        rows[f"streamingllm {window}"] = AS_CONFIGURED, dict(attn="streamingllm", window=window)
    for window in (32, 64, 128, 256):
        rows[f"sep {window}"] = AS_CONFIGURED, dict(attn="sep", window=window)
    for window in (32, 128):  # as many far tokens as there are separators
        rows[f"fixed {window}"] = AS_CONFIGURED, dict(attn="fixed", window=window, fixed_every=9)
        for rule in (token_before, token_after, random_tokens):
            rows[f"{rule.__name__} {window}"] = rule, dict(attn="sep", window=window)
    return rows


SAME_ROOM = {"streamingllm 140": "sep 32", "streamingllm 228": "sep 128"}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a pretrained model")
    parser.add_argument("--text", type=Path, required=True, help="a text file of books")
    parser.add_argument("--texts", type=int, default=49, help="how many (default: 49)")
    args = parser.parse_args()
    model = GPT.from_pretrained(args.model, max_seps=None)
    losses, keys = {}, {}
    for ids in tqdm(read_texts(args.model, args.text, args.texts), "texts"):
        for name, (rule, settings) in cases().items():
            model.configure(**settings)
            with mock.patch("sep_cache.is_kept", rule), torch.inference_mode():
                losses.setdefault(name, []).append(loss_of_halves(model, ids)[1])
                keys.setdefault(name, []).append(n_visible_keys(model, ids, rule))
    losses = {name: torch.stack(values) for name, values in losses.items()}
    print(f"full attention: {losses['full'].mean():.4f} nats, {args.texts} texts\n")
    print("| | keys | loss - full | error | loss - sep, same window or room | error |\n"
          "| --- | --- | --- | --- | --- | --- |")
    for name, values in losses.items():
        to_full, error = mean_and_error(values - losses["full"])
        row = f"| {name} | {sum(keys[name]) / args.texts:.0f} | {to_full:+.4f} | {error:.4f} |"
        sep = losses.get(SAME_ROOM.get(name, f"sep {name.split()[-1]}"))
        if sep is not None:
            to_sep, error = mean_and_error(values - sep)
            row += f" {to_sep:+.4f} | {error:.4f} |"
        print(row)


if __name__ == "__main__":
    main()
