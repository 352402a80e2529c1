"""Where does a real model look? Attention to separators and to the first tokens, by layer and head.

    python experiments/attention.py --model FOLDER --text BOOKS

reads texts of 1,024 tokens with full attention. Lift: the share of the attention beyond so many
tokens that separators receive, over their share of the keys there. The first four tokens, which
draw attention by their position, are left out of it and shown apart. The control is the lift of the
most frequent words, as many. Draws experiments/figures/attention.svg and sentence.svg.
"""
import argparse
from collections import Counter
from pathlib import Path
from unittest import mock

import matplotlib
import torch
from far_keys import GPT, T, Tokenizer, mean_and_error, read_texts
from plotting import GREY, new_figure, save_figure
from tqdm import tqdm

N_FIRST = 4
LATER = 4  # so many tokens on, attention is no longer to the neighbours
SENTENCE = (b"The old man put his hat on the table, looked at the letter, and said nothing. His "
            b"daughter, who had waited all day, asked: what does it say?")


@torch.inference_mode()
def attention_weights(model, ids):
    """The attention of each layer to a text, a list of (H, T, T)."""
    layers = []

    def explicit_attention(q, k, v, is_causal):
        is_future = torch.ones(q.shape[2], q.shape[2]).triu(1).bool()
        scores = q @ k.mT * q.shape[-1] ** -0.5
        weights = scores.masked_fill(is_future, -torch.inf).softmax(-1)
        layers.append(weights[0])
        return weights @ v

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", explicit_attention):
        model(ids)  # its own forward, apart from this
    return layers


def frequent_words(tokenizer, ids, is_separator):
    """Whether each id is one of the most frequent tokens of letters, together as frequent as the
    separators, (V,) bool; and the first of these words."""
    n_left = int(is_separator[ids].sum())
    is_word = torch.zeros_like(is_separator)
    words = []
    for token, count in Counter(ids.tolist()).most_common():
        word = tokenizer.tokenizer.decode([token]).strip()
        if word.isalpha() and count <= n_left:
            n_left -= count
            is_word[token] = True
            words.append(word)
    return is_word, words[:8]


def lift(weights, chosen, beyond):
    """Share of the attention beyond so many tokens, over the share of the keys: (H,)."""
    position = torch.arange(weights.shape[-1])
    far = (position[:, None] - position > beyond) & (position >= N_FIRST)  # (T, T)
    attention_to_key = (weights * far).sum(1)  # (H, T)
    pairs_of_key = far.sum(0)  # (T,)
    share_of_attention = attention_to_key[:, chosen].sum(1) / attention_to_key.sum(1)
    return share_of_attention / (pairs_of_key[chosen].sum() / pairs_of_key.sum())


def measure(model, ids, tables):
    """{what: (layers, H)} of one text."""
    results = {}
    for weights in attention_weights(model, ids):
        for beyond in (8, 64):
            for name, table in tables.items():
                values = lift(weights, table[ids[0]], beyond)
                results.setdefault(f"{name}, lift beyond {beyond}", []).append(values)
        first = weights[:, T // 2:, :N_FIRST].sum(-1).mean(1)
        results.setdefault(f"attention to the first {N_FIRST} tokens", []).append(first)
    return {name: torch.stack(values) for name, values in results.items()}


def print_table(results):
    """results: {what: (texts, layers, H)}."""
    print(f"\n| layers | {' | '.join(results)} |\n| --- {'| --- ' * len(results)}|")
    n_layer = next(iter(results.values())).shape[1]
    for start in range(0, n_layer, 5):
        cells = [f"{values[:, start:start + 5].mean():.2f}" for values in results.values()]
        print(f"| {start}-{min(start + 5, n_layer) - 1} | {' | '.join(cells)} |")
    cells = []
    for values in results.values():
        mean, error = mean_and_error(values.mean((1, 2)))
        cells.append(f"{mean:.2f} ± {error:.2f}")
    print(f"| all | {' | '.join(cells)} |")
    cells = [f"{(values.mean(0) > 2).float().mean():.0%}" for values in results.values()]
    print(f"| heads above 2 | {' | '.join(cells)} |")


def draw_heads(results):
    shown = [name for name in results if "64" not in name]
    figure, axes = new_figure(len(shown), height=2.1, sharex=True)
    for ax, name in zip(axes, shown, strict=True):
        colors = dict(cmap="viridis", vmin=0, vmax=1)
        if "lift" in name:
            colors = dict(cmap="RdBu_r", norm=matplotlib.colors.LogNorm(1 / 8, 8))
        mesh = ax.pcolormesh(results[name].mean(0).T, **colors)
        bar = figure.colorbar(mesh, ax=ax)
        if "lift" in name:
            bar.set_ticks([1 / 8, 1 / 2, 1, 2, 8], labels=["1/8", "1/2", "1", "2", "8"])
            bar.minorticks_off()
        ax.set(title=name, ylabel="head")
    axes[-1].set_xlabel("layer")
    save_figure(figure, "attention")


def draw_sentence(model, tokenizer):
    """How much attention each token of a sentence receives from a later one, on average."""
    ids = torch.tensor([tokenizer.encode(SENTENCE)])
    n = ids.shape[1] - 2 * LATER  # tokens with enough later ones
    names = [tokenizer.tokenizer.decode([token]) for token in ids[0, :n].tolist()]
    weights = torch.stack(attention_weights(model, ids)).mean((0, 1))  # (T, T)
    n_later = ids.shape[1] - LATER - torch.arange(n)
    received = weights.tril(-LATER).sum(0)[:n] / n_later
    is_separator = torch.isin(ids[0, :n], torch.tensor(model.config.separators))
    figure, axes = new_figure(height=2.4)
    axes.bar(range(n), 100 * received, color=["tab:orange" if x else GREY for x in is_separator])
    axes.set_xticks(range(n), names, rotation=90)
    axes.set(ylabel="attention, %", ylim=(0, 6),
             title=f"Attention from tokens {LATER} and more later (orange: separators; cut at 6 %)")
    save_figure(figure, "sentence")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a pretrained model")
    parser.add_argument("--text", type=Path, required=True, help="a text file of books")
    parser.add_argument("--texts", type=int, default=8, help="how many (default: 8)")
    args = parser.parse_args()
    tokenizer = Tokenizer(args.model)
    model = GPT.from_pretrained(args.model, attn="full")
    texts = read_texts(args.model, args.text, args.texts)
    is_separator = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    is_separator[list(model.config.separators)] = True
    all_ids = torch.cat(texts, dim=1)[0]
    is_word, words = frequent_words(tokenizer, all_ids, is_separator)
    tables = {"separators": is_separator, "frequent words": is_word}
    results = {}
    for ids in tqdm(texts, "texts"):
        for name, values in measure(model, ids, tables).items():
            results.setdefault(name, []).append(values)
    results = {name: torch.stack(values) for name, values in results.items()}
    print(f"{is_separator[all_ids].sum()} separators and {is_word[all_ids].sum()} frequent words "
          f"({', '.join(words)} ...) of {len(all_ids)} tokens")
    print_table(results)
    draw_heads(results)
    draw_sentence(model, tokenizer)


if __name__ == "__main__":
    main()
