"""What all tests share: seeds, small models and data, and a way to call a script.

Where there is no GPU, the kernel runs in Triton's interpreter.
"""
import multiprocessing
import os
import random
import runpy
import signal
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

TEXT = ("It is a truth universally acknowledged, that a single man in possession of a good "
        "fortune, must be in want of a wife. However little known the feelings may be; this truth "
        "is well fixed!\n") * 40
# options of a training that is the same on every machine; with SHAPE it takes a second
TRAINING = ("--block_size 32 --batch_size 4 --micro_batch_size None --learning_rate 3e-3 "
            "--warmup_steps 50 --eval_every 20 --device cpu --no-compile").split()
SHAPE = "--n_layer 1 --n_head 2 --n_embd 16 --window 8 --max_seps 16".split() + TRAINING


@pytest.fixture(autouse=True)
def seed():
    """The seed of each test, set everywhere: 0, or SEED=n; SEED=random explores.

    It is printed, so that a failure shows it.
    """
    chosen = os.environ.get("SEED", "0")
    value = random.SystemRandom().randrange(2 ** 31) if chosen == "random" else int(chosen)
    print(f"SEED={value}")
    random.seed(value)
    torch.manual_seed(value)
    return value


def tiny(**changes):
    """A GPTConfig small enough for loops in Python."""
    from model import GPTConfig
    settings = dict(block_size=16, vocab_size=12, n_layer=2, n_head=2, n_embd=16, window=5, sinks=2,
                    separators=(1, 2), fixed_every=4)
    return GPTConfig(**settings | changes)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data folder with TEXT. Tests share it: they read it only."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "some.txt").write_text(TEXT)
    succeed("data/prepare.py", "--text", folder / "some.txt", "--out", folder / "text")
    return folder / "text"


@pytest.fixture(scope="session")
def checkpoint(data, tmp_path_factory):
    """A small trained model with full attention. Tests share it: they read it only."""
    out_dir = tmp_path_factory.mktemp("full")
    succeed("train.py --attn full --max_steps 40", "--data", data, "--out_dir", out_dir, *SHAPE)
    return out_dir / "ckpt.pt"


def succeed(command, *options):
    """Run a script that must succeed: (stdout, stderr)."""
    code, out, err = run(command, *options)
    assert code == 0, err
    return out, err


def run(command, *options):
    """Run a script to its end: (exit code, stdout, stderr).

    command: the script, and words that follow the options, so that they count where both set one.
    In a fork of a process that has loaded PyTorch, so that not every script takes two seconds to
    load it.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out"), Path(folder, "err")
        process = forks.Process(target=run_in_fork, args=(words_of(command, options), *output))
        process.start()
        process.join(timeout=300)
        out, err = (path.read_text() for path in output)
    assert "Traceback" not in err, err
    return process.exitcode, out, err


def words_of(command, options):
    """What a shell would give to Python."""
    script, *words = command.split()
    return [str(ROOT / script), *map(str, options), *words]


def start(command, *options, **how):
    """Start a script as a user does, in a process of its own, with pipes."""
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, *words_of(command, options)], text=True,
                            preexec_fn=heed_signals, **pipes | how)


def heed_signals():
    """As where a terminal starts a program: nohup, or the background of a script, ignores these."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run_in_fork(words, *output):
    """Unlike a process of its own, this one finds our modules from everywhere."""
    for number, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = words
    sys.path.insert(0, os.path.dirname(words[0]))
    runpy.run_path(words[0], run_name="__main__")


# of the scripts that tests start; they wait with their output as they do for users
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(
    ["pytest", "torch._dynamo", "triton", "safetensors.torch", "tokenizers"])
