"""A folder of tokens -> batches. train.bin and val.bin are raw token ids, meta.json describes them.

`prepare.py` writes such folders. Whoever has files of token ids can write the meta.json by hand.
"""
import zlib
from pathlib import Path

import numpy as np
import torch

from data.tokenizer import Tokenizer
from options import explain, read_json, require


def find_data(name):
    """The data folder `name`, or data/<name>."""
    folder = Path(name)
    return folder if (folder / "train.bin").exists() else Path(__file__).parent / name


def load_data(name):
    """The data in the folder `name`, or in data/<name>: (train tokens, validation tokens, meta).

    The tokens stay on the disk. meta is meta.json,

        vocab_size   all ids are below it
        dtype        uint8, uint16 or uint32, of the tokens in the .bin files
        separators   token ids, a list
        tokenizer    the text of a tokenizer.json; null or missing: bytes, if vocab_size is 256

    and the checksums of the two files, so that a training can tell whether they have changed.
    OSError and ValueError for files that are missing or cannot be used.
    """
    folder = find_data(name)
    with explain(f"{folder} needs a meta.json as data/prepare.py --text FILE writes it, with dtype "
                 "uint8, uint16 or uint32, separators below vocab_size, and maybe a tokenizer's "
                 "text", KeyError, TypeError, ValueError):
        meta = dict(tokenizer=None) | read_json(folder / "meta.json")
        ids = range(meta["vocab_size"])
        require(meta["dtype"] in ("uint8", "uint16", "uint32")
                and all(type(i) is int and i in ids for i in meta["separators"]),
                f"dtype is {meta['dtype']}, and separators are {meta['separators']}")
        if meta["tokenizer"] is not None:
            Tokenizer(meta["tokenizer"])
    parts = [np.memmap(folder / name, meta["dtype"], "r") for name in ("train.bin", "val.bin")]
    for tokens in parts:
        require(tokens.max() in ids, f"{tokens.filename} holds token {tokens.max()}, beyond the "
                f"vocabulary of {len(ids)}")
    meta["checksums"] = [zlib.crc32(tokens) for tokens in parts]
    return *parts, meta


def get_batch(tokens, batch_size, block_size, rng):
    """Random stretches of the text: x and its targets y, each (batch_size, block_size) int64.

    y is x one token later. `rng`: a NumPy generator.
    """
    n_starts = len(tokens) - block_size
    require(n_starts > 0, f"the data has {len(tokens)} tokens in one part, and block_size "
            f"{block_size} needs one more than itself")
    positions = rng.integers(n_starts, size=(batch_size, 1)) + np.arange(block_size + 1)
    stretches = torch.from_numpy(tokens[positions].astype(np.int64))
    return stretches[:, :-1], stretches[:, 1:]
