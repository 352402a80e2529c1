"""What all tests share: the interpreter for the kernel where there is no GPU, and a fresh seed that a failure prints."""
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
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture
def seed():
    """The seed of this test, set everywhere: 0, or SEED=n of the environment; SEED=random explores. A failure prints it."""
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
    return lambda **changes: GPTConfig(**{**dict(block_size=16, vocab_size=12, n_layer=2, n_head=2, n_embd=16, window=5, sinks=2,
                                                 separators=(1, 2), fixed_every=4), **changes})

SHAPE = ("--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--window", 8, "--block_size", 32, "--batch_size", 4,
         "--eval_every", 20, "--eval_batches", 2)  # options of a model that trains in a second


def run(module, *options):
    """Call a script's main() in this process: (exit code, stdout, stderr)."""
    out, err, old = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO(), sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [module.__file__, *map(str, options)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                module.main()
                code = 0
            except SystemExit as end:
                code = end.code or 0
                if isinstance(code, str):
                    print(code, file=err)
                    code = 1
    finally:
        sys.argv = old
        for number, handler in handlers.items():
            signal.signal(number, handler)
    out.flush()
    return code, out.buffer.getvalue().decode("utf-8"), err.getvalue()
