"""Text into tokens: writes data/<name>/train.bin, val.bin (token ids) and meta.json.

    python data/prepare.py                        documentation inside Python, NumPy and torch, from
                                                  this machine
    python data/prepare.py --text FILE_OR_FOLDER  any text of yours
    python data/prepare.py --text FILE --tokenizer FOLDER
                                                  in tokens of a pretrained model's tokenizer.json

Without a tokenizer, tokens are bytes. The last tenth of every text is for validation; a file is cut
into texts of about 256 KB. A folder with nanoGPT's uint16 train.bin and val.bin needs no
preparation.
"""
import argparse
import ast
import inspect
import json
import os
import random
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tqdm import tqdm

if not __package__:  # as a script, Python looks for modules in data/ alone
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.tokenizer import ByteTokenizer, Tokenizer, read_pieces
from options import require, run_script


def prepare(folder, texts, tokenizer_folder=None):
    """Write a data folder from texts, an iterator of str. Raises OSError and ValueError.

    Nothing is written before all texts have been read, and train.bin, without which the folder is
    not used, comes last.
    """
    tokenizer, tokenizer_json = ByteTokenizer(), b""
    if tokenizer_folder:
        tokenizer = Tokenizer(tokenizer_folder)
        tokenizer_json = Path(tokenizer_folder, "tokenizer.json").read_bytes()
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    meta = dict(vocab_size=tokenizer.vocab_size, dtype=dtype.name,
                separators=tokenizer.separators())
    parts = {"val.bin": [], "train.bin": []}
    for text in texts:
        end = len(text) * 9 // 10
        end = text.rfind("\n", len(text) * 8 // 10, end) + 1 or end  # of a line, if one ends there
        for name, part in (("train.bin", text[:end]), ("val.bin", text[end:])):
            parts[name].append(np.array(tokenizer.encode(part, False), dtype))
    require(sum(map(len, parts["val.bin"])), "there is too little text")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.bin").unlink(missing_ok=True)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    if tokenizer_json:  # whoever samples from a model trained on it needs it
        (folder / "tokenizer.json").write_bytes(tokenizer_json)
    (folder / "meta.json").write_text(json.dumps(meta))
    for name, tokens in parts.items():
        np.concatenate(tokens).tofile(folder / name)


# ---- sources: each yields texts


def read_files(path, out):
    """A file or pipe, or all that is UTF-8 below a folder: no links, hidden files, or what is in
    the folder `out`."""
    if not path.is_dir():
        with open(path, "rb") as file:
            yield from read_pieces(file)
        return
    n_skipped = 0
    for file in tqdm(sorted(path.rglob("*")), "reading"):
        is_hidden = any(part[0] == "." for part in file.relative_to(path).parts)
        if is_hidden or not file.is_file() or out.resolve() in file.resolve().parents:
            continue
        try:
            text = file.read_bytes().decode()
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text or file.is_symlink():
            n_skipped += 1
        else:
            yield text
    if n_skipped:
        print(f"skipped {n_skipped} files that are links or no UTF-8 text", file=sys.stderr)


def read_docs():
    """Each string of four lines or more in the code of the standard library, NumPy and torch, once.

    Nearly all of them are documentation.
    """
    warnings.simplefilter("ignore")  # other people's string escapes
    packages = [Path(find_spec(name).origin).parent for name in ("numpy", "torch")]
    files = [file for folder in (Path(os.__file__).parent, *packages)
             for file in sorted(folder.rglob("*.py"))
             if not {"site-packages", "test", "tests"} & set(file.relative_to(folder).parts)]
    random.Random(0).shuffle(files)  # so that all three are in both parts
    texts = {}  # a set that keeps its order
    for file in tqdm(files, "reading docstrings"):
        try:
            nodes = ast.walk(ast.parse(file.read_bytes()))
        except SyntaxError:  # for another version of Python
            continue
        texts.update((inspect.cleandoc(node.value), None) for node in nodes
                     if isinstance(node, ast.Constant) and isinstance(node.value, str)
                     and node.value.count("\n") > 2)
    yield "\n\n".join(texts)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path,
                        help="a file or folder of yours (default: the documentation, as data/docs)")
    parser.add_argument("--tokenizer", type=Path,
                        help="folder of a pretrained model, whose tokens replace bytes")
    parser.add_argument("--out", type=Path,
                        help="the folder to write (default: data/<name of the text>)")
    args = parser.parse_args()
    name = args.text.resolve().stem if args.text else "docs"
    folder = args.out or Path(__file__).parent / name
    texts = read_files(args.text, folder) if args.text else read_docs()
    prepare(folder, texts, args.tokenizer)
    print(f"{folder} is ready; train on it with: python train.py --data {folder}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
