"""Text into tokens: writes data/<name>/train.bin, val.bin (token ids) and meta.json.

    python data/prepare.py                        documentation inside Python, NumPy and torch, from
                                                  this machine
    python data/prepare.py --text FILE_OR_FOLDER  any text of yours
    python data/prepare.py --text FILE --tokenizer FOLDER
                                                  in tokens of a pretrained model's tokenizer.json

Without a tokenizer, tokens are bytes. Each file is a text; one of more than about 256,000
characters is cut into several. About the last tenth of every text is for validation.
"""
import inspect
import json
import os
import re
import shlex
import sys
import tempfile
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
    text: str = option(None, "a file or folder of yours; -: standard input; None: the "
                             "documentation, as data/docs")
    tokenizer: Path = option(None, "folder of a pretrained model, whose tokens replace bytes")
    out: Path = option(None, "the folder to write, new or empty; None: data/<name of the text>")


def prepare(folder, texts, tokenizer_folder=None):
    """Write the data folder `folder` from texts, an iterator of str.

    All files are written into a temporary folder beside it. When they are whole, that one gets the
    name `folder`. So no data is ever half written, and none is replaced: of two runs at the same
    time the first counts, and the other raises FileExistsError.
    Raises FileExistsError where there is something already, other OSErrors and ValueError.
    """
    is_taken = FileExistsError(f"{folder} is there already; give another --out, or delete it")
    if any(folder.glob("*")):
        raise is_taken
    tokenizer = ByteTokenizer()
    if tokenizer_folder:
        tokenizer = Tokenizer(Path(tokenizer_folder, "tokenizer.json").read_text("utf-8"))
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    meta = dict(vocab_size=tokenizer.vocab_size, dtype=dtype.name,
                separators=tokenizer.separators(), tokenizer=tokenizer.json)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new = Path(temporary, "new")
        new.mkdir()  # others may read it, unlike `temporary`
        (new / "meta.json").write_text(json.dumps(meta))
        with open(new / "train.bin", "wb") as train, open(new / "val.bin", "wb") as val:
            for text in texts:
                cut = len(text) * 9 // 10
                line_end = text.rfind("\n", cut * 8 // 9, cut) + 1  # 0 if no line ends just before
                cut = line_end or cut
                for file, piece in ((train, text[:cut]), (val, text[cut:])):
                    file.write(np.array(tokenizer.encode(piece, is_first=False), dtype))
            require(train.tell(), "there is too little text")
        try:
            new.rename(folder)
        except OSError:  # another run has been faster
            raise is_taken from None


# ---- sources: each yields texts


def read_files(path):
    """The text of a file, of a pipe, or of all files below a folder. "-" is standard input.

    A folder's hidden files are no texts. Nor are links, and files with NUL bytes: a message counts
    them. OSError for what cannot be read.
    """
    if not os.path.isdir(path):
        yield from read_pieces(open(0 if path == "-" else path, "rb"))
        return
    n_skipped = 0
    for file in tqdm(sorted(Path(path).rglob("*")), "reading"):
        if "/." in f"/{file.relative_to(path)}":  # hidden
            continue
        if file.is_dir():
            os.listdir(file)  # rglob would silently leave out a folder that cannot be read
        elif file.is_symlink() or not file.is_file() or b"\0" in file.read_bytes():
            n_skipped += 1
        else:
            yield from read_pieces(open(file, "rb"))
    print(f"skipped {n_skipped} files that are links or no text", file=sys.stderr)


def read_docs():
    """The documentation inside the standard library, NumPy and torch: a text for each file.

    It is what stands in triple quotes; nearly all of that is documentation.
    """
    for name in ("inspect", "numpy", "torch"):
        folder = Path(find_spec(name).origin).parent
        for file in tqdm(sorted(folder.rglob("*.py")), f"reading docstrings beside {name}"):
            if "site-packages" not in file.relative_to(folder).parts:
                text = file.read_text("utf-8", "replace")
                texts = re.findall('"""(.*?)"""', text, re.DOTALL)
                yield "\n\n".join(map(inspect.cleandoc, texts))


def main():
    cfg = PrepareConfig(**parse_options(__doc__, [PrepareConfig]))
    name = "docs"
    texts = read_docs()
    if cfg.text is not None:
        name = Path(cfg.text).absolute().name
        texts = read_files(cfg.text)
    folder = cfg.out or Path(__file__).parent / name
    prepare(folder, texts, cfg.tokenizer)
    print(f"{folder} is ready; train on it with: "
          f"python train.py --data={shlex.quote(str(folder))}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
