"""What all tests share: seeds, small models and data, and a way to call a script.

Where there is no GPU, the kernel runs in Triton's interpreter.
"""
import multiprocessing
import os
import random
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # of the processes that tests start

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
    """Start a script of the repository, on one thread, with pipes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **how.pop("env", {})}
    options = [option if isinstance(option, bytes) else str(option) for option in options]
    command = [sys.executable, str(ROOT / script), *options]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, env=environment, text=True, **pipes | how)


def run(script, *options, stdin=None):
    """Run a script to its end: (exit code, stdout, stderr).

    In a fork of a process that has loaded PyTorch, so that not every script takes two seconds to
    load it; with stdin in a process of its own.
    """
    if stdin is not None:
        process = start(script, *options, stdin=stdin)
        out, err = process.communicate(timeout=300)
        code = process.returncode
    else:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "out"), Path(folder, "err")
            process = forks.Process(target=run_in_fork, args=(script, options, *output))
            process.start()
            process.join(timeout=300)
            code = process.exitcode
            out, err = (path.read_text() for path in output)
    assert "Traceback" not in err, err
    return code, out, err


def run_in_fork(script, options, *output):
    for number, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [script, *(os.fsdecode(x) if isinstance(x, bytes) else str(x) for x in options)]
    torch.set_num_threads(1)
    runpy.run_path(str(ROOT / script), run_name="__main__")


forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["conftest", "train", "sample"])
