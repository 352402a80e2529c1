"""Text into tokens: writes data/<name>/train.bin, val.bin (token ids) and meta.json.

    python data/prepare.py                        documentation inside Python, NumPy and torch, from
                                                  this machine
    python data/prepare.py --text FILE_OR_FOLDER  any text of yours
    python data/prepare.py --text FILE --tokenizer FOLDER
                                                  in tokens of a pretrained model's tokenizer.json

Without a tokenizer, tokens are bytes: every text is valid, and nothing has to be learned before
training. Texts are read in pieces, and the last tenth of each is for validation. A folder with
nanoGPT's uint16 train.bin and val.bin needs no preparation.
"""
import argparse
import ast
import codecs
import inspect
import json
import os
import random
import shutil
import sys
import tempfile
import warnings
from glob import glob
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for pretrained.py

PIECE_SIZE = 1 << 18  # bytes of a text that are read at once


class ByteTokenizer:
    """Tokens are bytes. `pretrained.Tokenizer` has the same methods."""
    vocab_size = 256
    eos_ids = ()  # no token ends a text

    def encode(self, text, is_first=True):
        """The ids of a text (bytes). is_first: of its first piece, which may get a begin token."""
        return list(text)

    def separators(self, characters=".,?!;:\n"):
        return tuple(characters.encode())

    def decoder(self):
        return ByteDecoder("replace")


class ByteDecoder(codecs.getincrementaldecoder("utf-8")):
    """Text from ids as they come; a character whose bytes are not all there yet waits for them."""

    def step(self, ids):
        return self.decode(bytes(ids))

    def flush(self):
        return self.decode(b"", True)


def prepare(folder, texts, tokenizer_folder=None, **meta):
    """Write a data folder from texts, an iterator of bytes; meta: further entries of meta.json.

    Nothing is replaced before all of it is there. Raises OSError and ValueError.
    """
    tokenizer = ByteTokenizer()
    if tokenizer_folder:
        from pretrained import Tokenizer  # needs torch, which bytes do not
        tokenizer = Tokenizer(tokenizer_folder)
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    meta.update(vocab_size=tokenizer.vocab_size, dtype=dtype.name,
                separators=tokenizer.separators())
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as new_folder:
        new = Path(new_folder)
        with open(new / "train.bin", "wb") as train, open(new / "val.bin", "wb") as val:
            for text in texts:
                n_train = len(text) * 9 // 10
                for file, part in ((train, text[:n_train]), (val, text[n_train:])):
                    file.write(np.array(tokenizer.encode(part, False), dtype).tobytes())
            if not val.tell():
                raise ValueError("there is too little text")
        (new / "meta.json").write_text(json.dumps(meta))
        if tokenizer_folder:  # whoever samples from a model trained on it needs it
            shutil.copy(Path(tokenizer_folder, "tokenizer.json"), new)
        (folder / "tokenizer.json").unlink(missing_ok=True)
        for file in new.iterdir():
            file.replace(folder / file.name)


# ---- sources: each yields texts, as bytes


def read_files(path):
    """A file or pipe, or all files below a folder; no name may begin with a dot (.git, .venv)."""
    files = [path]
    if path.is_dir():
        names = glob("**", root_dir=path, recursive=True)  # none with a dot in front
        files = [path / name for name in sorted(names) if (path / name).is_file()]
    for name in tqdm(files, "reading"):
        with open(name, "rb") as file:
            yield from read_pieces(file)


def read_pieces(file):
    """A binary file in pieces of about PIECE_SIZE bytes, cut at the ends of lines."""
    while piece := file.read(PIECE_SIZE) + file.readline(PIECE_SIZE):
        yield piece


def read_docs():
    """The strings of four lines or more in the code of the standard library, NumPy and torch, once.

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
    yield "\n\n".join(texts).encode(errors="replace")


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
    name, texts = "docs", read_docs()
    if args.text:
        name, texts = args.text.resolve().stem, read_files(args.text)
    folder = args.out or Path(__file__).parent / name
    try:
        prepare(folder, texts, args.tokenizer)
    except (OSError, ValueError, KeyboardInterrupt) as error:
        sys.exit(f"prepare.py: {str(error) or 'stopped'}")
    print(f"{folder} is ready; train on it with: python train.py --data {folder}", file=sys.stderr)


if __name__ == "__main__":
    main()
