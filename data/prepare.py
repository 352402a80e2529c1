"""Text into tokens: writes data/<name>/train.bin, val.bin (token ids) and meta.json.

    python data/prepare.py                        documentation inside Python, NumPy and torch, from
                                                  this machine
    python data/prepare.py --text FILE_OR_FOLDER  any text of yours
    python data/prepare.py --text FILE --tokenizer FOLDER
                                                  in tokens of a pretrained model's tokenizer.json

Without a tokenizer, tokens are bytes. The last tenth of every text is for validation. Each file of
a folder is a text; a file by itself, or a pipe, is cut into texts of about 256,000 characters.
"""
import inspect
import json
import re
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tqdm import tqdm

if not __package__:  # as a script, Python looks for modules in data/ alone
    sys.path.insert(0, str(Path(__file__).parent.parent))
from data.tokenizer import ByteTokenizer, Tokenizer, read_pieces
from options import option, parse_options, require, run_script


@dataclass
class PrepareConfig:
    """What to prepare."""
    text: Path = option(None, "a file or folder of yours; None: the documentation, as data/docs")
    tokenizer: Path = option(None, "folder of a pretrained model, whose tokens replace bytes")
    out: Path = option(None, "the folder to write; None: data/<name of the text>")


def prepare(folder, texts, tokenizer_folder=None):
    """Write a data folder from texts, an iterator of str. Raises OSError and ValueError.

    Nothing is written before all texts have been read, and train.bin, without which the folder is
    not used, comes last.
    """
    tokenizer = ByteTokenizer()
    if tokenizer_folder:
        tokenizer = Tokenizer(Path(tokenizer_folder, "tokenizer.json").read_text("utf-8"))
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    parts = {"val.bin": [], "train.bin": []}
    for text in texts:
        cut = len(text) * 9 // 10
        line_end = text.rfind("\n", cut * 8 // 9, cut) + 1  # 0 if no line ends just before
        cut = line_end or cut
        for name, piece in (("train.bin", text[:cut]), ("val.bin", text[cut:])):
            parts[name].append(np.array(tokenizer.encode(piece, is_first=False), dtype))
    require(sum(map(len, parts["train.bin"])), "there is too little text")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.bin").unlink(missing_ok=True)
    meta = dict(vocab_size=tokenizer.vocab_size, dtype=dtype.name,
                separators=tokenizer.separators(), tokenizer=tokenizer.json)
    (folder / "meta.json").write_text(json.dumps(meta))
    for name, tokens in parts.items():  # a training that reads the old files keeps them
        np.concatenate(tokens).tofile(folder / ".part")
        (folder / ".part").replace(folder / name)


# ---- sources: each yields texts


def read_files(path, out):
    """A file or pipe, or all text below a folder: no links, hidden files, files with NUL bytes, or
    what is in the folder `out`."""
    if not path.is_dir():
        yield from read_pieces(open(path, "rb"))
        return
    n_skipped = 0
    for file in tqdm(sorted(path.rglob("*")), "reading"):
        is_hidden = any(part[0] == "." for part in file.relative_to(path).parts)
        if is_hidden or not file.is_file() or out.resolve() in file.resolve().parents:
            continue
        text = file.read_bytes().decode(errors="surrogateescape")
        if file.is_symlink() or "\0" in text:
            n_skipped += 1
        else:
            yield text
    print(f"skipped {n_skipped} files that are links or no text", file=sys.stderr)


def read_docs():
    """What stands in triple quotes, nearly all of it documentation, in each file of the standard
    library, NumPy and torch."""
    for name in ("inspect", "numpy", "torch"):
        folder = Path(find_spec(name).origin).parent
        for file in tqdm(sorted(folder.rglob("*.py")), f"reading docstrings beside {name}"):
            if "site-packages" not in file.relative_to(folder).parts:
                text = file.read_text("utf-8", "replace")
                texts = re.findall('"""(.*?)"""', text, re.DOTALL)
                yield "\n\n".join(map(inspect.cleandoc, texts))


def main():
    cfg = PrepareConfig(**parse_options(__doc__, [PrepareConfig]))
    name = cfg.text.resolve().stem if cfg.text else "docs"
    folder = cfg.out or Path(__file__).parent / name
    texts = read_files(cfg.text, folder) if cfg.text else read_docs()
    prepare(folder, texts, cfg.tokenizer)
    print(f"{folder} is ready; train on it with: python train.py --data {str(folder)!r}",
          file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
