"""One run of train.py as a row of a markdown table: tokens per second, memory of a GPU, loss.

    python experiments/training_speed.py --attn sep --block_size 16384 --max_steps 40

takes all options of train.py. Tokens per second are the median of the steps; GiB are the most that
tensors took.
"""
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from common import print_row, read_log

import train
from options import run_script


def main():
    options = " ".join(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        sys.argv += ["--out_dir", folder]
        train.main()
        speeds = read_log(Path(folder), "tokens_per_s")
        losses = read_log(Path(folder), "val_loss")
    print_row(f"`{options}`", f"{statistics.median(speeds.values()):,.0f}",
              f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f}", f"{losses[max(losses)]:.4f}")


if __name__ == "__main__":
    run_script(main)
