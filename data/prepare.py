"""Text into tokens: writes data/<name>/train.bin, val.bin (one byte a token) and meta.json.

    python data/prepare.py                        documentation of Python, NumPy and torch, from
                                                  this machine
    python data/prepare.py --text FILE_OR_FOLDER  any text of yours; the last tenth of each file is
                                                  for validation
    python data/prepare.py --source shakespeare   the small classic, downloaded
    python data/prepare.py --source recall        a ledger of facts, `a7.b2.a7.`: can a model look
                                                  back past its window?

Tokens are bytes, so every text is valid and nothing has to be learned before training. A folder
with nanoGPT's uint16 train.bin and val.bin (GPT-2 tokens) needs no preparation: train.py takes it
as it is.
"""
import argparse
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

SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt")
SEPARATORS = ".,?!;:\n"

# A ledger has 21 facts of 3 bytes ("a7.") and a line break: 64 bytes.
RECALL_KEYS = 8
RECALL_VALUES = 10
RECALL_FACTS = 21


def prepare(folder, source="docs", path=None, separators=SEPARATORS, seed=0):
    """Write train.bin, val.bin and meta.json of a data folder, from `source` or the text at `path`.

    Nothing is replaced before all of it is there. Raises OSError and ValueError.
    """
    meta = dict(vocab_size=256, dtype="uint8", separators=separator_ids(separators),
                separators_text=separators, source=str(path.resolve()) if path else source)
    check_folder(folder, path, meta["source"])
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / (name + ".partial") for name in ("train.bin", "val.bin", "meta.json")}
    try:
        with open(partial["train.bin"], "wb") as train, open(partial["val.bin"], "wb") as val:
            if path:
                write_text(path, train, val)
            elif source == "docs":
                write_docs(train, val)
            elif source == "shakespeare":
                write_shakespeare(train, val)
            elif source == "recall":
                write_recall(train, val, seed)
                # the loss is taken on the values alone, and a training text is one whole ledger
                meta["answers"] = list(b"0123456789"[:RECALL_VALUES])
                meta["record"] = 3 * RECALL_FACTS + 1
        train_size = partial["train.bin"].stat().st_size
        val_size = partial["val.bin"].stat().st_size
        if min(train_size, val_size) < 2:
            raise ValueError(f"{meta['source']} holds too little text: "
                             f"{train_size} bytes to train, {val_size} to validate")
        partial["meta.json"].write_text(json.dumps(meta, indent=1))
        for name, file in partial.items():
            os.replace(file, folder / name)
    finally:
        for file in partial.values():
            file.unlink(missing_ok=True)
    print(f"{folder}: {train_size:,} bytes to train, {val_size:,} to validate", file=sys.stderr)


def separator_ids(characters):
    """The bytes that separate segments, if these characters do. ValueError if one is no byte."""
    if not characters.isascii() or "\\" in characters:
        raise ValueError(f"--separators {characters!r} must be ASCII characters without a "
                         f"backslash; bash writes a line break as $'\\n'")
    return sorted(set(characters.encode()))


def check_folder(folder, path, source):
    """ValueError if writing `folder` would harm the text at `path`, or data of another source."""
    if path:
        text = path.resolve()
        is_inside = text.is_dir() and folder.resolve().is_relative_to(text)
        is_written = text in (folder.resolve() / name for name in ("train.bin", "val.bin"))
        if is_inside or is_written:
            raise ValueError(f"{folder} would be read and written at once; give another --out")
    try:
        old_source = json.loads((folder / "meta.json").read_text())["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # there is no data, or it names no source
    if old_source != source:
        raise ValueError(f"{folder} holds the data of {old_source}; give another --out")


# ---- sources: each writes bytes into two open files


def write_docs(train, val):
    """Docstrings of the standard library, NumPy and torch, each text once.

    Whole files go to training or to validation, so that validation is a tenth of all bytes.
    """
    warnings.simplefilter("ignore", SyntaxWarning)  # other people's string escapes
    seen = set()
    train_size = val_size = 0
    for file in tqdm(docs_files(), desc="reading docstrings", unit="file"):
        texts = [text for text in docs_of(file) if text not in seen]
        seen.update(texts)
        data = "".join(text.strip() + "\n\n" for text in texts).encode(errors="replace")
        if 9 * val_size < train_size:
            val.write(data)
            val_size += len(data)
        else:
            train.write(data)
            train_size += len(data)


def docs_files():
    """The Python files of the standard library, NumPy and torch, in the same order every time."""
    folders = [Path(sysconfig.get_path("stdlib"))]
    for package in ("numpy", "torch"):
        spec = importlib.util.find_spec(package)  # finds the files, and imports nothing
        if spec is None:
            raise ValueError(f"its text is the documentation inside {package}, which is not "
                             f"installed here; prepare a text of your own with --text FILE")
        folders.append(Path(spec.origin).parent)
    files = []
    for folder in folders:
        files += [file for file in sorted(folder.rglob("*.py"))
                  if "site-packages" not in file.relative_to(folder).parts]
    return files


def docs_of(file):
    """The different documentation texts in a Python file, in order."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError, OSError):
        return []  # test data of the standard library that is not meant to be parsed
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in nodes if isinstance(node, documented)]
    # torch and NumPy pass the documentation of compiled functions to a call
    arguments = [argument for node in nodes if isinstance(node, ast.Call) for argument in node.args]
    strings = [argument.value for argument in arguments
               if isinstance(argument, ast.Constant) and isinstance(argument.value, str)]
    texts += [string for string in strings if string.count("\n") > 2]
    return [text for text in dict.fromkeys(texts) if text]


def write_text(path, train, val):
    """The bytes of a file, or of all files below a folder in sorted order; in bounded memory."""
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
    for file in tqdm(files, desc="reading", unit="file"):
        n_left = file.stat().st_size * 9 // 10  # bytes for training, still to be copied
        with open(file, "rb") as source:
            while n_left and (chunk := source.read(min(n_left, 1 << 20))):
                train.write(chunk)
                n_left -= len(chunk)
            shutil.copyfileobj(source, val)


def write_shakespeare(train, val):
    print(f"downloading {SHAKESPEARE}", file=sys.stderr)
    with urllib.request.urlopen(SHAKESPEARE, timeout=30) as reply:
        data = reply.read()
    n_train = len(data) * 9 // 10
    train.write(data[:n_train])
    val.write(data[n_train:])


def write_recall(train, val, seed):
    """Ledgers of facts `key value .` in which a key has the same value at each mention.

    Each ledger draws new values, so a value can be known only from an earlier mention of its key.
    """
    rng = np.random.default_rng(seed)
    for out, n_ledgers in ((train, 100_000), (val, 2_000)):
        value_of = rng.integers(RECALL_VALUES, size=(n_ledgers, RECALL_KEYS))
        key = rng.integers(RECALL_KEYS, size=(n_ledgers, RECALL_FACTS))
        value = np.take_along_axis(value_of, key, axis=1)  # (n_ledgers, RECALL_FACTS)
        facts = np.full((n_ledgers, RECALL_FACTS, 3), ord("."), dtype=np.uint8)
        facts[:, :, 0] = ord("a") + key
        facts[:, :, 1] = ord("0") + value
        line_breaks = np.full((n_ledgers, 1), ord("\n"), dtype=np.uint8)
        ledgers = np.concatenate([facts.reshape(n_ledgers, -1), line_breaks], axis=1)
        out.write(ledgers.tobytes())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="docs", choices=["docs", "shakespeare", "recall"],
                        help="what to prepare (default: docs)")
    parser.add_argument("--text", type=Path, metavar="FILE_OR_FOLDER",
                        help="a text of yours to prepare instead")
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        help="folder to write (default: data/<source>, or data/<name of the text>)")
    parser.add_argument("--separators", default=SEPARATORS, metavar="CHARACTERS",
                        help="the characters that separate segments, in ASCII; a line break in "
                             "bash: $'.,\\n' (default: . , ? ! ; : and line breaks)")
    parser.add_argument("--seed", type=int, default=0, help="of the recall ledgers (default: 0)")
    args = parser.parse_args()
    if args.text and not args.text.exists():
        parser.error(f"--text {args.text} does not exist; give a file or a folder")
    try:
        separator_ids(args.separators)
    except ValueError as error:
        parser.error(str(error))
    name = args.text.resolve().stem if args.text else args.source
    folder = args.out or Path(__file__).parent / name
    try:
        prepare(folder, args.source, args.text, args.separators, args.seed)
    except (OSError, ValueError) as error:
        sys.exit(f"prepare.py: could not prepare {args.text or args.source}: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: stopped; the data is as it was")


if __name__ == "__main__":
    main()
