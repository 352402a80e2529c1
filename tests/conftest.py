"""What all tests share: seeds, small models and data, and a way to call a script's main().

Where there is no GPU, the kernel runs in Triton's interpreter.
"""
import contextlib
import io
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
# Tests that run in the background of a shell are deaf to Ctrl-C, and so are programs they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# What everything rests on comes first, and takes seconds; the scripts come last.
ORDER = ("test_mask", "test_stream", "test_kernel", "test_hostile", "test_scripts")
TEXT = ("It is a truth universally acknowledged, that a single man in possession of a good "
        "fortune, must be in want of a wife. However little known the feelings may be; this truth "
        "is well fixed!\n") * 40
# options of a model that trains in a second
SHAPE = ("--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--window", 8, "--block_size", 32,
         "--batch_size", 4, "--eval_every", 20, "--eval_batches", 2)


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.path.stem
        return ORDER.index(name) if name in ORDER else ORDER.index("test_kernel")

    items.sort(key=place)  # a stable sort: the tests of a file stay in their order


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
    from data import prepare
    folder = tmp_path_factory.mktemp("data")
    (folder / "some.txt").write_text(TEXT)
    prepare.prepare(folder / "text", path=folder / "some.txt")
    return folder / "text"


@pytest.fixture(scope="session")
def full_checkpoint(data, tmp_path_factory):
    """A small trained model with full attention. Tests share it: they read it only."""
    import train
    out_dir = tmp_path_factory.mktemp("full")
    options = ("--data", data, "--out_dir", out_dir, "--attn", "full", "--max_steps", 40, *SHAPE)
    code, _, err = run(train, *options)
    assert code == 0, err
    return out_dir / "ckpt.pt"


def run(module, *options):
    """Call a script's main() in this process: (exit code, stdout, stderr)."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    err = io.StringIO()
    old_argv = sys.argv
    old_handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [module.__file__, *map(str, options)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            module.main()
    except SystemExit as end:
        if isinstance(end.code, str):  # what Python itself does with sys.exit("a sentence")
            print(end.code, file=err)
            code = 1
        else:
            code = end.code or 0
    finally:
        sys.argv = old_argv
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
    out.flush()
    return code, out.buffer.getvalue().decode("utf-8"), err.getvalue()
