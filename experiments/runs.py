"""The runs of train.py behind the results: which there are, and the folder that holds them.

A run that is finished is not repeated, nor is a loss that was measured once with it.
"""
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.loader import load_data
from experiments.measures import block_nats, stream_nats
from train import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
MODES = ("full", "streamingllm", "fixed", "sep")
SEEDS = (0, 1, 2)
BYTES_PER_STEP = 4096  # of every run: batch_size x block_size

VALIDATION_BYTES = 65_536  # for the loss of a run: spread over the validation text

BOOKS = ("--batch_size", 4, "--block_size", 1024)
RECALL = ("--data", "recall", "--n_layer", 3, "--n_head", 4, "--n_embd", 128, "--block_size", 64,
          "--window", 8, "--sinks", 1, "--max_seps", "None", "--batch_size", 64,
          "--max_steps", 2000, "--learning_rate", 1e-3, "--eval_every", 100)


class Run(NamedTuple):
    """A run of train.py. Its name is that of its folder: data, attn, window, seed."""
    name: str
    options: tuple
    init_from: str | None = None  # the run whose checkpoint it starts from
    keeps_snapshots: bool = False  # a copy of every checkpoint, ckpt-STEP.pt

    @property
    def data(self):
        return self.name.split("-")[0]

    @property
    def mode(self):
        """attn and window, as a label."""
        return ", window ".join(self.name.split("-")[1:-1])

    @property
    def seed(self):
        return int(self.name.split("-")[-1])


def docs_run(attn, seed=0, window=32):
    """The CPU preset on the documentation: block_size 256, 16 separators, 1,000 steps."""
    options = ["--attn", attn, "--seed", seed]
    if attn != "full":
        return Run(f"docs-{attn}-{window}-{seed}", (*options, "--window", window))
    if seed > 0:
        return Run(f"docs-full-{seed}", tuple(options))
    return Run("docs-full-0", (*options, "--eval_every", 50), keeps_snapshots=True)


def books_run(attn, window, seed=0, data="books"):
    """Books: block_size 1,024, as many separators as the window has tokens, 700 steps."""
    name = f"{data}-full-{seed}" if attn == "full" else f"{data}-{attn}-{window}-{seed}"
    return Run(name, ("--data", data, *BOOKS, "--max_steps", 700, "--eval_every", 100,
                      "--attn", attn, "--window", window, "--max_seps", window, "--seed", seed))


BOOKS_FULL = books_run("full", 64)


def longer_run(attn, window):
    """Books, twice as many steps."""
    options = ("--max_steps", 1400, "--eval_every", 200)  # the later of two options counts
    return Run(f"books-longer_{attn}-{window}-0", (*books_run(attn, window).options, *options))


def post_run(attn, window):
    """The books' model with full attention, trained on for 150 steps with another attention."""
    options = ("--data", "books", "--batch_size", 4, "--max_steps", 150, "--eval_every", 50,
               "--learning_rate", 1e-3, "--attn", attn, "--window", window, "--max_seps", window)
    return Run(f"books-post_{attn}-{window}-0", options, init_from=BOOKS_FULL.name)


def recall_run(attn, seed=0):
    """The ledger of facts: three layers, whose windows of 8 reach 21 tokens; 2,000 steps."""
    options = (*RECALL, "--attn", attn, "--seed", seed)
    return Run(f"recall-{attn}-{seed}", options, keeps_snapshots=seed == 0)


class Lab:
    """The folder of all runs, `out_dir`. may_train: whether missing runs are made. unseen: the text
    of the long stream."""

    def __init__(self, out_dir, may_train, unseen=None):
        self.out_dir = out_dir.resolve()
        self.may_train = may_train
        self.unseen = unseen
        self.measured = self.out_dir / "measured"
        self.measured.mkdir(parents=True, exist_ok=True)

    # ---- training

    def finished(self, runs):
        """Those of the runs that are finished. The missing ones are trained first, if allowed."""
        if self.may_train:
            if any(run.init_from for run in runs) and not self.is_finished(BOOKS_FULL):
                self._train(BOOKS_FULL)
            missing = [run for run in runs if not self.is_finished(run)]
            with ThreadPoolExecutor(max_workers=2) as pool:  # two side by side
                list(pool.map(self._train, missing))
        return [run for run in runs if self.is_finished(run)]

    def is_finished(self, run):
        return (self.out_dir / run.name / "done").exists()

    def _train(self, run):
        folder = self.out_dir / run.name
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "train.py", "--device", "cpu", *run.options, "--out_dir", folder]
        if run.init_from:
            command += ["--init_from", self.out_dir / run.init_from / "ckpt.pt"]
        command = [str(word) for word in command]
        print("$ python", *command[1:], file=sys.stderr)
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=one_thread)
        if run.keeps_snapshots:
            keep_snapshots(process, folder)
        if process.wait() != 0:
            raise SystemExit(f"results.py: the run {run.name} ended with {process.returncode}")
        for stale in self.measured.glob(f"{run.name}-*.npz"):
            stale.unlink()  # of an earlier run of this name
        (folder / "done").touch()

    # ---- what a run has left

    def model(self, run, snapshot=None, **changes):
        """The model of a run, or of its snapshot at a step, with other settings of attention."""
        name = "ckpt.pt" if snapshot is None else f"ckpt-{snapshot}.pt"
        model = load_checkpoint(self.out_dir / run.name / name).model
        model.requires_grad_(False)
        model.configure(**changes)
        return model

    def snapshots(self, run):
        """Steps of the checkpoints that were kept, ascending."""
        paths = (self.out_dir / run.name).glob("ckpt-*.pt")
        return sorted(int(path.stem.split("-")[1]) for path in paths)

    def val_losses(self, run):
        """{step: validation loss}, from the log."""
        text = (self.out_dir / run.name / "log.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        return {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}

    # ---- what was measured with it

    def remember(self, name, compute):
        """compute(), a dict of arrays; from the second time on, read from a file of this name.

        If a text or a setting has changed that the name does not tell, delete the file.
        """
        path = self.measured / f"{name}.npz"
        if not path.exists():
            print(f"measuring {name}", file=sys.stderr)
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, **compute())
            partial.replace(path)
        return dict(np.load(path))

    def block_nats(self, run, **changes):
        """The loss of 65,536 validation bytes, in texts of block_size spread over all: (N, T)."""

        def compute():
            model = self.model(run, **changes)
            _, val, _ = load_data(run.data)
            n_blocks = VALIDATION_BYTES // model.config.block_size
            return dict(nats=block_nats(model, val, n_blocks))

        return self.remember(describe(run, changes) + "-blocks64k", compute)["nats"]

    def loss(self, run, **changes):
        """The mean of `block_nats`: on the same bytes for all runs of the same data."""
        return self.block_nats(run, **changes).mean()

    def stream(self, run, tokens, label, chunk_size=1024, **changes):
        """`stream_nats` of tokens, a text that is called `label`, as a dict."""

        def compute():
            return stream_nats(self.model(run, **changes), tokens, chunk_size)._asdict()

        return self.remember(f"{describe(run, changes)}-stream-{label}", compute)


def describe(run, changes):
    """A file name for a run with other settings of attention."""
    return "-".join([run.name, *(f"{key}_{value}" for key, value in changes.items())])


def keep_snapshots(process, folder):
    """While a training runs, keep a copy of each checkpoint that it writes."""
    checkpoint = folder / "ckpt.pt"
    seen = None
    while True:
        is_over = process.poll() is not None
        if checkpoint.exists() and checkpoint.stat().st_mtime_ns != seen:
            seen = checkpoint.stat().st_mtime_ns
            copy = folder / "copy.pt"
            shutil.copy(checkpoint, copy)
            copy.rename(folder / f"ckpt-{load_checkpoint(copy).info['step']}.pt")
        if is_over:
            return
        time.sleep(0.5)
