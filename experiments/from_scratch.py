"""Trained from scratch, what does each attention lose against full attention? A table.

    python experiments/from_scratch.py                  the quick start's preset
    python experiments/from_scratch.py --attn full sep --data NAME --block_size 1024

trains each attention with each seed in out-scratch/<attn>-<seed>, and goes on where it was stopped.
Options that it does not know go to train.py. A row of the table: the validation loss at the start
and after each eval_every steps, the mean over seeds ± its standard error; how many keys a query
sees, the mean over the validation text; the tokens per second.
"""
import argparse
import json
import statistics
from pathlib import Path

import torch
from far_keys import mean_and_error
from recall import train_or_resume

from data.loader import load_data
from sep_cache import is_kept, key_reach
from train import load_checkpoint


def mean_keys(out_dir):
    """How many keys a query of a run sees, the mean over the validation texts."""
    model, state = load_checkpoint(out_dir / "ckpt.pt")
    _, tokens, _ = load_data(state["info"]["train_config"]["data"])
    T = model.config.block_size
    ids = torch.tensor(tokens).unfold(0, T, T).long()  # (texts, T)
    positions = torch.arange(T).expand(ids.shape)
    reach = key_reach(is_kept(ids, positions[0], model.config), positions, model.config)
    # there are as many queries as keys, so this is also how many queries see a key
    return reach.minimum(T - positions).double().mean()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attn", nargs="+", default=["full", "streamingllm", "fixed", "sep"],
                        help="which to train (default: all four)")
    parser.add_argument("--seeds", type=int, default=3, help="of each attention (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("out-scratch"), help="where runs go")
    args, options = parser.parse_known_args()
    for attn in args.attn:
        losses = []  # (seeds, evaluations)
        speeds = []  # of each step of all seeds
        for seed in range(args.seeds):
            out_dir = args.out / f"{attn}-{seed}"
            train_or_resume(out_dir, ["--attn", attn, "--seed", str(seed), *options])
            log = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
            # by step: a resumed run evaluates its first step again
            loss_at = {line["step"]: line["val_loss"] for line in log if "val_loss" in line}
            losses.append(list(loss_at.values()))
            speeds += [line["tokens_per_s"] for line in log if "tokens_per_s" in line]
        means, errors = mean_and_error(torch.tensor(losses).T)
        cells = [f"{mean:.4f} ± {error:.4f}" for mean, error in zip(means, errors, strict=True)]
        print(f"| {attn} | {' | '.join(cells)} | {mean_keys(out_dir):.1f} | "
              f"{statistics.median(speeds):,.0f} |", flush=True)


if __name__ == "__main__":
    main()
