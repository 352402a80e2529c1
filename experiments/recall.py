"""Recall: can a model look back past its window? Ledgers of facts, `a7.b2.a7.`, and a figure.

    python experiments/recall.py --seeds 5

writes 100,000 ledgers to out-recall/ledgers.txt, a text file like any other. On it train.py trains
`sep`, `streamingllm` and `fixed` with each seed and `full` with two, in out-recall/<attn>-<seed>;
what was stopped goes on. Prints the accuracy by distance on other ledgers, the mean of the seeds
and the worst seed, and draws experiments/figures/recall.svg.

The window holds one fact and the full stop before it (4 bytes), so what lies further back can be
recalled only through a separator, or in small steps from layer to layer.
"""
import random
from pathlib import Path

import torch
from common import new_parser, print_head, print_row, train_or_resume
from plotting import GREY, new_figure, save_figure

from data.prepare import prepare
from pretrained import load_model

N_FACTS = 21  # of 3 bytes in a ledger; with its line break it has 64 bytes
KEYS = "abcdefgh"
VALUES = "0123456789"
OPTIONS = ("--n_layer 3 --n_head 4 --n_embd 128 --block_size 64 --window 4 --sinks 1 "
           "--fixed_every 3 --max_seps None --batch_size 64 --max_steps 800 --eval_every 200 "
           "--learning_rate 5e-4").split()
DISTANCES = [(1, 3), (4, 6), (7, 10), (11, 20)]  # facts back to the latest mention of the key
NAMES = [f"{low}-{high}" for low, high in DISTANCES]


def make_ledgers(n_ledgers, seed):
    """Lines of facts `key value .` in which a key has the same value at each mention.

    Each ledger draws new values, so a value can be known only from an earlier mention of its key.
    """
    rng = random.Random(seed)
    for _ in range(n_ledgers):
        value_of = dict(zip(KEYS, rng.choices(VALUES, k=len(KEYS)), strict=True))
        keys = rng.choices(KEYS, k=N_FACTS)
        yield "".join(f"{key}{value_of[key]}." for key in keys) + "\n"


@torch.inference_mode()
def accuracy(model):
    """The share of values that are the likeliest token, for each of DISTANCES."""
    results = []  # (distance, whether the value is right)
    ledgers = list(make_ledgers(2_000, seed=1))
    ids = torch.tensor([list(ledger.encode()) for ledger in ledgers])
    predicted = model(ids)[0].argmax(-1)
    for ledger, row in zip(ledgers, predicted.tolist(), strict=True):
        last_mention = {}
        for fact in range(N_FACTS):
            key, value = ledger[3 * fact:3 * fact + 2]
            if key in last_mention:
                results.append((fact - last_mention[key], row[3 * fact] == ord(value)))
            last_mention[key] = fact
    distance, is_right = torch.tensor(results).double().T
    return [is_right[(low <= distance) & (distance <= high)].mean() for low, high in DISTANCES]


def draw(results):
    """A line for each seed, in the colour of its kind of attention."""
    figure, axes = new_figure()
    for i, (attn, shares) in enumerate(reversed(results.items())):
        # sep, the last and thinnest, lies on full, the first and widest
        lines = axes.plot(NAMES, 100 * shares.T, color=f"C{i}", linewidth=6.5 - 1.5 * i)
        lines[0].set_label(f"{attn} ({len(shares)} seeds)")
    axes.axhline(10, color=GREY, linestyle=":", label="guessing")
    axes.set(xlabel="facts back to the latest mention", ylabel="values recalled, %", ylim=(0, 105),
             title="With separators every seed recalls far values, windows alone only near ones")
    axes.legend(framealpha=0)
    save_figure(figure, "recall")


def main():
    args = new_parser(__doc__, seeds=5, out=Path("out-recall")).parse_args()
    args.out.mkdir(exist_ok=True)
    text = "".join(make_ledgers(100_000, seed=0))
    (args.out / "ledgers.txt").write_text(text)
    data = args.out / "data"
    if not data.exists():
        prepare(data, [text])
    print_head("values recalled, mean of the seeds (worst seed), by facts back", *NAMES)
    results = {}
    for attn in ("sep", "streamingllm", "fixed", "full"):
        shares = []
        for seed in range(min(args.seeds, 2) if attn == "full" else args.seeds):
            out_dir = args.out / f"{attn}-{seed}"
            options = [*OPTIONS, "--attn", attn, "--seed", str(seed), "--data", data]
            train_or_resume(out_dir, options)
            shares.append(accuracy(load_model(out_dir)))
        results[attn] = torch.tensor(shares)  # (seeds, distances)
        rows = zip(results[attn].mean(0), results[attn].amin(0), strict=True)
        cells = [f"{mean:.1%} ({worst:.1%})" for mean, worst in rows]
        print_row(f"{attn}, {len(shares)} seeds", *cells)
    draw(results)


if __name__ == "__main__":
    main()
