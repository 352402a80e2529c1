"""Trained from scratch, what does each attention lose against full attention? A table.

    python experiments/from_scratch.py                  the quick start's preset
    python experiments/from_scratch.py --attn full sep --data NAME --block_size 1024

trains each attention with each seed in out-scratch/<attn>-<seed>, and goes on where it was stopped.
Options that it does not know go to train.py. Prints the validation loss, the mean over seeds and
the standard error, and the tokens per second.
"""
import argparse
import json
from pathlib import Path

import torch
from far_keys import mean_and_error
from recall import train_or_resume


def read_log(out_dir):
    """The validation losses of a run, {step: loss}, and its median tokens per second."""
    lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    speeds = sorted(line["tokens_per_s"] for line in lines if "tokens_per_s" in line)
    return losses, speeds[len(speeds) // 2]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attn", nargs="+", default=["full", "streamingllm", "fixed", "sep"])
    parser.add_argument("--seeds", type=int, default=3, help="of each attention (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("out-scratch"), help="where runs go")
    args, options = parser.parse_known_args()
    for attn in args.attn:
        losses, speeds = [], []  # of each seed
        for seed in range(args.seeds):
            out_dir = args.out / f"{attn}-{seed}"
            train_or_resume(out_dir, ["--attn", attn, "--seed", str(seed), *options])
            losses_by_step, speed = read_log(out_dir)
            losses.append(losses_by_step)
            speeds.append(speed)
        for step in losses_by_step:
            mean, error = mean_and_error(torch.tensor([run[step] for run in losses]))
            print(f"| {attn} | {step} | {mean:.4f} | {error:.4f} |")
        print(f"{attn}: {sum(speeds) / args.seeds:,.0f} tokens/s")


if __name__ == "__main__":
    main()
