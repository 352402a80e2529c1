"""Recall: can a model look back past its window? Ledgers of facts, `a7.b2.a7.`, and a figure.

    python experiments/recall.py --seeds 5

trains `sep`, `streamingllm` and `fixed` with each seed and `full` with two, each in
out-recall/<attn>-<seed>. It goes on where it was stopped. Prints the accuracy by distance, and
writes experiments/figures/recall.svg.

The window holds one fact and the full stop before it (4 bytes), so what lies further back can be
recalled only through a separator, or in small steps from layer to layer.
"""
import argparse
import random
import subprocess
import sys
from pathlib import Path

import torch
from plotting import GREY, new_figure, save_figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.prepare import prepare  # noqa: E402
from train import load_checkpoint  # noqa: E402

N_FACTS = 21  # of 3 bytes in a ledger; with its line break it has 64 bytes
KEYS = "abcdefgh"
VALUES = "0123456789"
OPTIONS = ("--n_layer 3 --n_head 4 --n_embd 128 --block_size 64 --window 4 --sinks 1 "
           "--fixed_every 3 --max_seps None --batch_size 64 --max_steps 400 "
           "--learning_rate 5e-4").split()
DISTANCES = ["1-3", "4-6", "7-10", "11-20"]  # facts back to the latest mention of the key


def make_ledgers(n_ledgers, seed):
    """Lines of facts `key value .` in which a key has the same value at each mention.

    Each ledger draws new values, so a value can be known only from an earlier mention of its key.
    """
    rng = random.Random(seed)
    for _ in range(n_ledgers):
        value_of = dict(zip(KEYS, rng.choices(VALUES, k=len(KEYS)), strict=True))
        keys = rng.choices(KEYS, k=N_FACTS)
        yield "".join(f"{key}{value_of[key]}." for key in keys) + "\n"


def prepare_ledgers(folder):
    if not (folder / "meta.json").exists():
        text = "".join(make_ledgers(100_000, seed=0)).encode()
        # the loss is taken on the values alone, and a training text is one whole ledger
        prepare(folder, [text], answers=list(VALUES.encode()), record=3 * N_FACTS + 1)


def train_or_resume(out_dir, options):
    """Run train.py with these options, or go on where it was stopped."""
    if (out_dir / "ckpt.pt").exists():
        options = ["--resume"]
    command = [sys.executable, ROOT / "train.py", "--out_dir", out_dir, *options]
    subprocess.run(command, check=True)


@torch.inference_mode()
def accuracy(model):
    """The share of values that are the likeliest token, by distance in facts: {"1-3": ...}."""
    right, total = dict.fromkeys(DISTANCES, 0), dict.fromkeys(DISTANCES, 0)
    ledgers = list(make_ledgers(2_000, seed=1))
    ids = torch.tensor([list(ledger.encode()) for ledger in ledgers])
    predicted = model(ids)[0].argmax(-1)
    for ledger, row in zip(ledgers, predicted.tolist(), strict=True):
        last_mention = {}
        for fact in range(N_FACTS):
            key = ledger[3 * fact]
            if key in last_mention:
                distance = fact - last_mention[key]
                name = next(d for d in DISTANCES if distance <= int(d.split("-")[1]))
                total[name] += 1
                right[name] += chr(row[3 * fact]) == ledger[3 * fact + 1]
            last_mention[key] = fact
    return {name: right[name] / total[name] for name in DISTANCES}


def draw(results):
    """One mean per kind of attention, with the range of its seeds."""
    figure, axes = new_figure()
    for attn, runs in reversed(results.items()):
        values = torch.tensor([[100 * run[name] for name in DISTANCES] for run in runs])
        label = f"{attn} ({len(runs)} seeds)"
        style = "o--" if attn == "sep" else "o-"  # it lies on the line of full
        line, = axes.plot(DISTANCES, values.mean(0), style, label=label)
        color = line.get_color()
        axes.fill_between(DISTANCES, values.amin(0), values.amax(0), alpha=0.2, color=color)
    axes.axhline(10, color=GREY, linestyle=":", label="guessing")
    axes.set(xlabel="facts back to the latest mention", ylabel="values recalled, %", ylim=(0, 103),
             title="Separators carry values over any distance, "
                   "windows alone no further than they reach")
    axes.legend(framealpha=0)
    save_figure(figure, "recall")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="of each attention (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("out-recall"), help="where runs go")
    args = parser.parse_args()
    prepare_ledgers(args.out / "data")
    results = {}
    for seed in range(args.seeds):
        for attn in ("sep", "streamingllm", "fixed", "full"):
            if attn == "full" and seed >= 2:
                continue
            out_dir = args.out / f"{attn}-{seed}"
            options = [*OPTIONS, "--attn", attn, "--seed", str(seed), "--data", args.out / "data"]
            train_or_resume(out_dir, options)
            model, _ = load_checkpoint(out_dir / "ckpt.pt")
            results.setdefault(attn, []).append(accuracy(model.eval()))
            print(attn, seed, {name: f"{x:.1%}" for name, x in results[attn][-1].items()},
                  flush=True)
    draw(results)


if __name__ == "__main__":
    main()
