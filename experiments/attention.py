"""Where does a real model look? Attention to separators and to the first tokens, by layer and head.

    python experiments/attention.py --model FOLDER --text BOOKS

reads texts of 1,024 tokens with full attention. Lift: the share of the attention beyond so many
tokens that separators receive, over their share of the keys there. The first four tokens, which
draw attention by their position, are left out of it and shown apart. The control is the lift of the
most frequent words, as many. Draws experiments/figures/attention.svg and sentence.svg.
"""
from collections import Counter
from unittest import mock

import torch
from common import T, new_parser, print_head, print_row, read_texts, with_errors
from matplotlib.colors import LogNorm
from plotting import GREY, new_figure, save_figure
from tqdm import tqdm

from pretrained import load_model, tokenizer_of

N_FIRST = 4
COLUMNS = ["separators, lift beyond 8", "frequent words, lift beyond 8",
           "separators, lift beyond 64", "frequent words, lift beyond 64",
           "attention to the first 4 tokens"]
LATER = 4  # so many tokens on, attention is no longer to the neighbours
SENTENCE = ("The old man put his hat on the table, looked at the letter, and said nothing. His "
            "daughter, who had waited all day, asked: what does it say?")


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
        word = tokenizer.decode([token]).strip()
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


def measure(model, ids, is_separator, is_word):
    """What COLUMNS names, of one text, (columns, layers, H)."""
    columns = []
    for weights in attention_weights(model, ids):
        lifts = [lift(weights, table[ids[0]], beyond) for beyond in (8, 64)
                 for table in (is_separator, is_word)]
        to_first = weights[:, T // 2:, :N_FIRST].sum(-1).mean(1)
        columns.append(torch.stack([*lifts, to_first]))
    return torch.stack(columns, dim=1)


def print_table(results):
    """results: (columns, texts, layers, H)."""
    print_head("layers", *COLUMNS)
    for start in range(0, results.shape[2], 5):
        layers = results[:, :, start:start + 5]
        means = layers.mean((1, 2, 3))
        print_row(f"{start}-{start + layers.shape[2] - 1}", *[f"{mean:.2f}" for mean in means])
    print_row("all", *with_errors(results.mean((2, 3)), ".2f"))
    shares = (results.mean(1) > 2).float().mean((1, 2))
    print_row("heads above 2", *[f"{share:.0%}" for share in shares])


def draw_heads(results):
    shown = [(COLUMNS[i], results[i].mean(0).T) for i in (0, 1, 4)]  # (H, layers)
    figure, axes = new_figure(len(shown), height=2.1, sharex=True)
    for ax, (name, values) in zip(axes, shown):
        if "lift" in name:
            mesh = ax.pcolormesh(values, cmap="RdBu_r", norm=LogNorm(1 / 8, 8))
            bar = figure.colorbar(mesh, ax=ax, ticks=[1 / 8, 1 / 2, 1, 2, 8], format="%g")
            bar.minorticks_off()
        else:
            figure.colorbar(ax.pcolormesh(values, vmin=0, vmax=1), ax=ax)
        ax.set(title=name, ylabel="head")
    axes[-1].set_xlabel("layer")
    save_figure(figure, "attention")


def draw_sentence(model, tokenizer):
    """How much attention each token of a sentence receives from a later one, on average."""
    ids = torch.tensor([tokenizer.encode(SENTENCE)])
    n = ids.shape[1] - 2 * LATER  # tokens with enough later ones
    names = [tokenizer.decode([token]) for token in ids[0, :n].tolist()]
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
    args = new_parser(__doc__, "model", "text", texts=8).parse_args()
    model = load_model(args.model)
    tokenizer = tokenizer_of(model)
    model.configure(attn="full")  # it keeps the separators
    texts = read_texts(tokenizer, args.text, args.texts)
    is_separator = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    is_separator[list(model.config.separators)] = True
    all_ids = torch.cat(texts, dim=1)[0]
    is_word, words = frequent_words(tokenizer, all_ids, is_separator)
    results = [measure(model, ids, is_separator, is_word) for ids in tqdm(texts, "texts")]
    results = torch.stack(results, dim=1)  # (columns, texts, layers, H)
    print(f"{is_separator[all_ids].sum()} separators and {is_word[all_ids].sum()} frequent words "
          f"({', '.join(words)} ...) of {len(all_ids)} tokens")
    print_table(results)
    draw_heads(results)
    draw_sentence(model, tokenizer)


if __name__ == "__main__":
    main()
