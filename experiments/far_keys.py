"""What is a far key worth to a real model, training-free? Loss against the keys that are used.

    python experiments/far_keys.py --model FOLDER --text BOOKS

reads stretches of 1,024 tokens, evenly spaced over the file, with the lines of a paragraph joined.
It prints the loss on their second halves as the difference to full attention of the same texts,
with its standard error over texts. There are windows alone, with separators and, as controls, with
about as many other tokens: fixed_every=9 keeps as many as there are separators in books.
"""
from unittest import mock

import torch
import torch.nn.functional as F
from common import T, new_parser, print_head, print_row, reach_of, read_texts, with_errors
from tqdm import tqdm

import sep_mask
from pretrained import load_model, tokenizer_of

# ---- which tokens stay visible: each rule may stand in the place of sep_mask.is_kept


AS_CONFIGURED = sep_mask.is_kept  # itself, before anything stands in its place


def token_before(ids, positions, config, separators):
    is_separator = AS_CONFIGURED(ids, positions, config, separators)
    return F.pad(is_separator[:, 1:], (0, 1)) | (positions < config.sinks)


def token_after(ids, positions, config, separators):
    is_separator = AS_CONFIGURED(ids, positions, config, separators)
    return F.pad(is_separator[:, :-1], (1, 0)) | (positions < config.sinks)


def random_tokens(ids, positions, config, separators):
    n = int(AS_CONFIGURED(ids, positions, config, separators).sum())
    chosen = torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(n))[:n]
    return torch.isin(positions, chosen)[None] | (positions < config.sinks)


# ---- loss


def loss_of_halves(model, ids):
    """The mean loss on each half of a text, (2,): in the second, far keys are many."""
    logits, _ = model(ids)
    losses = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    return torch.stack([half.mean() for half in losses.tensor_split(2)])


def n_visible_keys(model, ids):
    """How many keys the last token of a text sees: those that all later queries see."""
    n_later = T - torch.arange(T)
    return int((reach_of(ids, model.config) == n_later).sum())


def cases():
    """{name: (rule, attn, window)}."""
    rows = {"full": (AS_CONFIGURED, "full", T)}
    for window in (32, 128, 140, 228):  # 140 and 228: as many keys as sep 32 and sep 128
        rows[f"streamingllm {window}"] = AS_CONFIGURED, "streamingllm", window
    for window in (32, 64, 128, 256):
        rows[f"sep {window}"] = AS_CONFIGURED, "sep", window
    for window in (32, 128):  # as many far tokens as there are separators
        rows[f"fixed {window}"] = AS_CONFIGURED, "fixed", window
        for rule in (token_before, token_after, random_tokens):
            rows[f"{rule.__name__} {window}"] = rule, "sep", window
    return rows


SAME_ROOM = {"streamingllm 140": "sep 32", "streamingllm 228": "sep 128"}


def main():
    args = new_parser(__doc__, "model", "text", texts=49).parse_args()
    model = load_model(args.model, max_seps=None, fixed_every=9)
    texts = read_texts(tokenizer_of(model), args.text, args.texts)
    losses, keys = {}, {}
    for ids in tqdm(texts, "texts"):
        for name, (rule, attn, window) in cases().items():
            model.configure(attn=attn, window=window)
            with mock.patch("sep_mask.is_kept", rule), torch.inference_mode():
                losses.setdefault(name, []).append(loss_of_halves(model, ids)[1])
                keys.setdefault(name, []).append(n_visible_keys(model, ids))
    losses = {name: torch.stack(values) for name, values in losses.items()}
    print(f"full attention: {losses['full'].mean():.4f} nats, {args.texts} texts")
    print_head("", "keys", "loss - full", "loss - sep, same window or room")
    for name, values in losses.items():
        cells = [name, f"{sum(keys[name]) / args.texts:.0f}"]
        sep = SAME_ROOM.get(name, f"sep {name.split()[-1]}")
        for other in ("full", sep):
            if other in losses:
                cells += with_errors((values - losses[other])[None], "+.4f")
        print_row(*cells)


if __name__ == "__main__":
    main()
