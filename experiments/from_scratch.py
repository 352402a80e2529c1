"""Trained from scratch, what does each attention lose against full attention? A table.

    python experiments/from_scratch.py                  the quick start's preset
    python experiments/from_scratch.py --attn full sep --data NAME --block_size 1024

trains each attention with each seed in out-scratch/<attn>-<seed>, and goes on where it was stopped.
Options that it does not know go to train.py. A row of the table: the validation loss at the start
and after each eval_every steps, the mean over seeds ± its standard error; how many keys a query
sees, the mean over the validation text; the tokens per second.
"""
import statistics
from pathlib import Path

import torch
from common import new_parser, print_row, reach_of, read_log, train_or_resume, with_errors

from data.loader import load_data
from pretrained import load_checkpoint


def mean_keys(out_dir):
    """How many keys a query of a run sees, the mean over the validation texts."""
    model, state = load_checkpoint(out_dir / "ckpt.pt")
    _, tokens, _ = load_data(state["info"]["train_config"]["data"])
    T = model.config.block_size
    ids = torch.tensor(tokens).unfold(0, T, T).long()  # (texts, T)
    # there are as many queries as keys, so this is also how many queries see a key
    return reach_of(ids, model.config).double().mean()


def main():
    parser = new_parser(__doc__, attn=["full", "streamingllm", "fixed", "sep"], seeds=3,
                        out=Path("out-scratch"))
    args, options = parser.parse_known_args()
    for attn in args.attn:
        losses = []  # (seeds, evaluations)
        speeds = []  # of the steps of all seeds
        for seed in range(args.seeds):
            out_dir = args.out / f"{attn}-{seed}"
            train_or_resume(out_dir, ["--attn", attn, "--seed", str(seed), *options])
            losses.append(list(read_log(out_dir, "val_loss").values()))
            speeds += read_log(out_dir, "tokens_per_s").values()
        print_row(attn, *with_errors(torch.tensor(losses).T, ".4f"), f"{mean_keys(out_dir):.1f}",
                  f"{statistics.median(speeds):,.0f}")


if __name__ == "__main__":
    main()
