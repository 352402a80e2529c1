"""A folder of tokens -> batches. train.bin and val.bin are raw token ids, meta.json describes them.

`prepare.py` writes such folders, with one byte for a token. nanoGPT's folders of GPT-2 tokens are
read as they are.
"""
import json
from pathlib import Path

import numpy as np
import torch

from sep_cache import require

DATA_FOLDER = Path(__file__).parent
MAX_VOCAB_SIZE = 65536  # of uint16 tokens

# ! , . : ; ? and line breaks as GPT-2 writes them: alone, doubled, or after a space
GPT2_SEPARATORS = (0, 11, 13, 25, 26, 30, 198, 628, 5145, 837, 764, 1058, 2162, 5633)
GPT2_META = dict(vocab_size=50304, dtype="uint16", separators=GPT2_SEPARATORS,
                 source="GPT-2 tokens")


def load_data(name):
    """The data in the folder `name`, or in data/<name>: (train tokens, validation tokens, meta).

    The tokens stay on the disk (np.memmap). If their dtype can hold values beyond the vocabulary,
    all of them are read once, to be checked.
    ValueError in one sentence for whatever the files hold that cannot be used.
    """
    folder = DATA_FOLDER / name
    if (Path(name) / "train.bin").exists() or not folder.is_dir():
        folder = Path(name)
    require(folder.is_dir(), f"there is no data folder {name}; "
            f"prepare one with: python data/prepare.py --text YOUR_FILE")
    meta = load_meta(folder)
    train_tokens = load_tokens(folder / "train.bin", meta)
    val_tokens = load_tokens(folder / "val.bin", meta)
    return train_tokens, val_tokens, meta


def load_meta(folder):
    """The checked meta.json of a data folder; without one, its tokens are nanoGPT's."""
    path = folder / "meta.json"
    if not path.exists():
        require(not (folder / "meta.pkl").exists(), f"{folder} has a meta.pkl, and pickles are not "
                f"read: write a meta.json with vocab_size, dtype and separators beside it")
        return check_meta(dict(GPT2_META))
    try:
        return check_meta(json.loads(path.read_text()))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} can't be used: {error}") from None


def check_meta(meta):
    """Returns `meta` with what may be left out filled in. ValueError names the entry that is wrong.

    vocab_size   number of different tokens
    dtype        uint8 or uint16, of the tokens in the .bin files
    separators   token ids
    answers      token ids; if there are any, the loss is taken where one of them is the target, so
                 every text of block_size tokens must hold some, best equally many
    record       batches start at multiples of this many tokens (default 1: anywhere)
    """
    require(isinstance(meta, dict), "it is not an object")
    dtype = meta.get("dtype")
    require(dtype in ("uint8", "uint16"), f"dtype is {dtype!r}, and must be uint8 or uint16")

    vocab_size = meta.get("vocab_size")
    require(type(vocab_size) is int and 1 <= vocab_size <= MAX_VOCAB_SIZE,
            f"vocab_size is {vocab_size!r}, and must be a whole number from 1 to {MAX_VOCAB_SIZE}")

    meta.setdefault("answers", [])
    for key in ("separators", "answers"):
        ids = meta.get(key)
        is_list = isinstance(ids, (list, tuple))
        require(is_list and all(type(i) is int and 0 <= i < vocab_size for i in ids),
                f"{key} must be a list of token ids below vocab_size")

    record = meta.setdefault("record", 1)
    require(type(record) is int and 1 <= record < 2 ** 31,
            f"record is {record!r}, and must be a whole number from 1")
    return meta


def load_tokens(path, meta):
    """The token ids in a .bin file. ValueError if they are not what `meta` says."""
    dtype = np.dtype(meta["dtype"])
    size = path.stat().st_size if path.is_file() else 0
    require(size > 0, f"{path} is missing or empty; prepare the data again")
    require(size % dtype.itemsize == 0,
            f"{path} is cut: {size} bytes are no whole number of {dtype} tokens")
    tokens = np.memmap(path, dtype=dtype, mode="r")
    if meta["vocab_size"] <= np.iinfo(dtype).max:  # else every value is a token; no need to look
        require(tokens.max() < meta["vocab_size"],
                f"{path} holds token {tokens.max()}, beyond the vocabulary of {meta['vocab_size']}")
    return tokens


def get_batch(tokens, meta, batch_size, block_size, rng):
    """Random stretches of the text: x and its targets y, each (batch_size, block_size) int64.

    y is x one token later, and -1 where no loss is taken. `rng`: a NumPy generator.
    """
    record = meta["record"]
    n_starts = (len(tokens) - block_size - 1) // record + 1
    starts = rng.integers(n_starts, size=batch_size) * record
    stretches = np.stack([tokens[start:start + block_size + 1] for start in starts])
    stretches = torch.from_numpy(stretches.astype(np.int64))  # (batch_size, block_size + 1)
    x = stretches[:, :-1]
    y = stretches[:, 1:].clone()  # x stays as it is when targets are struck out below
    if meta["answers"]:
        is_answer = torch.isin(y, torch.tensor(meta["answers"]))
        y[~is_answer] = -1
    return x, y
