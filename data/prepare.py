"""Text into tokens: writes data/<name>/train.bin, val.bin (one byte a token) and meta.json.

    python data/prepare.py                          the docstrings of Python, NumPy and torch on this machine, no network
    python data/prepare.py --text FILE_OR_FOLDER    any text of yours; the last tenth of each file is for validation
    python data/prepare.py --source shakespeare     the small classic, downloaded
    python data/prepare.py --source recall          a ledger of facts, `a7.b2.a7.`: can a model look back past its window?

Tokens are bytes, so every text is valid and nothing has to be learned before training. A folder with nanoGPT's uint16
train.bin and val.bin (GPT-2 tokens) needs no preparation: train.py takes it as it is.
"""
import ast
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
import urllib.request
import warnings
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this file runs as a script, too
from train import Parser  # noqa: E402

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
RECALL = dict(keys=8, values=10, facts=21)  # a ledger: 21 facts of 3 bytes and a line break, 64 bytes


def docs(train, val):
    """Docstrings of the standard library, NumPy and torch, each once; about every tenth byte's file is for validation."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    roots = [stdlib] + [Path(importlib.util.find_spec(name).origin).parent for name in ("numpy", "torch")]
    files = [path for root in roots for path in sorted(root.rglob("*.py"))
             if "site-packages" not in path.relative_to(root).parts]
    seen, sizes = set(), [0, 0]
    warnings.simplefilter("ignore", SyntaxWarning)  # other people's string escapes
    for path in tqdm(files, desc="reading docstrings", unit="file"):
        try:
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
        except (SyntaxError, ValueError, OSError):
            continue  # test data of the standard library that is not meant to be parsed
        found = [ast.get_docstring(node) for node in nodes
                 if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
        # torch and NumPy hand the documentation of compiled functions to a call
        found += [arg.value for node in nodes if isinstance(node, ast.Call) for arg in node.args
                  if isinstance(arg, ast.Constant) and isinstance(arg.value, str) and arg.value.count("\n") > 2]
        fresh = [text for text in dict.fromkeys(found) if text and text not in seen]
        seen.update(fresh)
        data = "".join(text.strip() + "\n\n" for text in fresh).encode(errors="replace")
        part = int(9 * sizes[1] < sizes[0])  # keeps validation at a tenth, in whole files
        (train, val)[part].write(data)
        sizes[part] += len(data)


def text(path, train, val):
    """The bytes of a file, or of all files below a folder in sorted order, copied in bounded memory."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
    for file in tqdm(files, desc="reading", unit="file"):
        rest = file.stat().st_size * 9 // 10
        with open(file, "rb") as f:
            while rest and (piece := f.read(min(rest, 1 << 20))):
                train.write(piece)
                rest -= len(piece)
            shutil.copyfileobj(f, val)


def shakespeare(train, val):
    print(f"downloading {SHAKESPEARE}", file=sys.stderr)
    with urllib.request.urlopen(SHAKESPEARE, timeout=30) as reply:
        data = reply.read()
    train.write(data[:len(data) * 9 // 10])
    val.write(data[len(data) * 9 // 10:])


def recall(train, val, seed):
    """Ledgers with fresh random values for the keys a, b, ...: a fact's value can be known only from its last mention."""
    rng, (keys, values, facts) = np.random.default_rng(seed), RECALL.values()
    for out, count in ((train, 100_000), (val, 2_000)):
        ledger = rng.integers(values, size=(count, keys))  # (ledgers, keys)
        key = rng.integers(keys, size=(count, facts))
        lines = np.full((count, facts, 3), ord("."), dtype=np.uint8)
        lines[..., 0] = key + ord("a")
        lines[..., 1] = np.take_along_axis(ledger, key, 1) + ord("0")
        ends = np.full((count, 1), ord("\n"), dtype=np.uint8)
        out.write(np.concatenate([lines.reshape(count, -1), ends], 1).tobytes())


def prepare(out, source="docs", path=None, separators=".,?!;:\n", seed=0):
    """Write `out`/train.bin, val.bin and meta.json. Nothing is replaced before all of it is there. OSError, ValueError."""
    out.mkdir(parents=True, exist_ok=True)
    meta = dict(vocab_size=256, dtype="uint8", separators=sorted(set(separators.encode())),
                separators_text=separators, source=str(path or source))
    parts = {name: out / (name + ".partial") for name in ("train.bin", "val.bin", "meta.json")}
    try:
        with open(parts["train.bin"], "wb") as train, open(parts["val.bin"], "wb") as val:
            if path:
                text(path, train, val)
            elif source == "recall":
                recall(train, val, seed)
                # the loss is taken on the values alone, and each training text is one whole ledger
                meta.update(answers=list(b"0123456789"[:RECALL["values"]]), record=3 * RECALL["facts"] + 1)
            else:
                {"docs": docs, "shakespeare": shakespeare}[source](train, val)
        sizes = [parts[name].stat().st_size for name in ("train.bin", "val.bin")]
        if min(sizes) < 2:
            raise ValueError(f"{meta['source']} holds too little text: {sizes[0]} bytes to train, {sizes[1]} to validate")
        parts["meta.json"].write_text(json.dumps(meta, indent=1))
        for name, part in parts.items():
            os.replace(part, out / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    print(f"{out}: {sizes[0]:,} bytes to train, {sizes[1]:,} to validate", file=sys.stderr)


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", default="docs", choices=["docs", "shakespeare", "recall"], help="what to prepare")
    parser.add_argument("--text", type=Path, help="a file or folder of text to prepare instead")
    parser.add_argument("--out", type=Path, help="folder to write; default: data/<source>, or data/<name of the text>")
    parser.add_argument("--separators", default=".,?!;:\n", help="the characters that separate segments")
    parser.add_argument("--seed", type=int, default=0, help="of the recall ledgers")
    args = parser.parse_args()
    if args.text and not args.text.exists():
        parser.error(f"--text {args.text} does not exist; give a file or a folder")
    out = args.out or Path(__file__).parent / (args.text.resolve().stem if args.text else args.source)
    try:
        prepare(out, args.source, args.text, args.separators, args.seed)
    except (OSError, ValueError) as error:
        sys.exit(f"prepare.py: could not prepare {args.text or args.source}: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: stopped, nothing was written")


if __name__ == "__main__":
    main()
