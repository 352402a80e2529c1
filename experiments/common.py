"""What the experiments share: the command line, markdown tables, errors of means, texts, runs."""
import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sep_mask  # noqa: E402

T = 1024  # tokens of a text of books
LINE_IN_PARAGRAPH = re.compile(r"(?<!\n)\n(?!\n)")


def new_parser(doc, *paths, **defaults):
    """A parser of the command line: paths that must be given, and options with their defaults.

    A default that is a list is all that may be chosen. What the names mean says doc, of the script.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in paths:
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name, default in defaults.items():
        kind = dict(type=type(default))
        if isinstance(default, list):
            kind = dict(nargs="+", choices=default)
        parser.add_argument(f"--{name}", default=default, help=f"default: {default}", **kind)
    return parser


def print_row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_head(*names):
    print()
    print_row(*names)
    print_row(*["---"] * len(names))


def with_errors(values, form):
    """Mean ± standard error of each row, as text."""
    errors = values.std(1) / values.shape[1] ** 0.5
    return [f"{mean:{form}} ± {error:{form.lstrip('+')}}"
            for mean, error in zip(values.mean(1), errors, strict=True)]


def train_or_resume(out_dir, options):
    """Run train.py with these options, or go on where it was stopped."""
    if (out_dir / "ckpt.pt").exists():
        options = [*options, "--resume"]
    command = [sys.executable, ROOT / "train.py", "--out_dir", out_dir, *options]
    subprocess.run(command, check=True)


def read_log(out_dir, name):
    """{step: number} of a run of train.py. A resumed run evaluates its first step again."""
    lines = map(json.loads, (out_dir / "log.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def reach_of(ids, config):
    """How many queries of its text see each key: ids (B, T) -> (B, T)."""
    _, T = ids.shape
    positions = torch.arange(T).expand(ids.shape)
    kept = sep_mask.is_kept(ids, positions[0], config, torch.tensor(config.separators))
    return sep_mask.key_reach(kept, positions, config).minimum(T - positions)


def read_texts(tokenizer, path, n_texts):
    """Token ids (1, T) of stretches of books, evenly spaced over all of them."""
    books = LINE_IN_PARAGRAPH.sub(" ", path.read_text(errors="replace"))
    starts = torch.linspace(0, len(books) - 12 * T, n_texts).long().tolist()
    stretches = [books[start:start + 12 * T] for start in starts]
    return [torch.tensor([tokenizer.encode(stretch)[:T]]) for stretch in stretches]


def times_or_nan(function, *args):
    """What function returns, two times; nan where it fails, and what went wrong on stderr."""
    try:
        return function(*args)
    except Exception as error:  # the next measurements may go well
        print(repr(error), file=sys.stderr)
        return torch.nan, torch.nan
