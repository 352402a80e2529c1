"""What all tests share: seeds, small models and data, and a way to call a script.

Where there is no GPU, the kernel runs in Triton's interpreter.
"""
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TEXT = ("It is a truth universally acknowledged, that a single man in possession of a good "
        "fortune, must be in want of a wife. However little known the feelings may be; this truth "
        "is well fixed!\n") * 40
# options of a model that trains in a second
SHAPE = ["--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--window", 8, "--block_size", 32,
         "--batch_size", 4, "--eval_every", 20]


@pytest.fixture
def seed():
    """The seed of this test, set everywhere: 0, or SEED=n; SEED=random explores.

    It is printed, so that a failure shows it.
    """
    chosen = os.environ.get("SEED", "0")
    value = random.SystemRandom().randrange(2 ** 31) if chosen == "random" else int(chosen)
    print(f"SEED={value}")
    random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture
def tiny():
    """A GPTConfig small enough for loops in Python, from changes to it."""
    from model import GPTConfig
    settings = dict(block_size=16, vocab_size=12, n_layer=2, n_head=2, n_embd=16, window=5, sinks=2,
                    separators=(1, 2), fixed_every=4)
    return lambda **changes: GPTConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data folder with TEXT. Tests share it: they read it only."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "some.txt").write_text(TEXT)
    code, _, err = run("data/prepare.py", "--text", folder / "some.txt", "--out", folder / "text")
    assert code == 0, err
    return folder / "text"


@pytest.fixture(scope="session")
def checkpoint(data, tmp_path_factory):
    """A small trained model with full attention. Tests share it: they read it only."""
    out_dir = tmp_path_factory.mktemp("full")
    code, _, err = run("train.py", "--data", data, "--out_dir", out_dir, "--attn", "full",
                       "--max_steps", 40, *SHAPE)
    assert code == 0, err
    return out_dir / "ckpt.pt"


def start(script, *options, **how):
    """Start a script of the repository, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **how.pop("env", {})}
    options = [option if isinstance(option, bytes) else str(option) for option in options]
    command = [sys.executable, str(ROOT / script), *options]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, env=environment, text=True, **pipes | how)


def run(script, *options, **how):
    """Run a script to its end: (exit code, stdout, stderr)."""
    process = start(script, *options, **how)
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in (err or ""), err
    return process.returncode, out, err
