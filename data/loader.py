"""A folder of tokens -> batches. train.bin and val.bin are raw token ids, meta.json describes them.

`prepare.py` writes such folders. Whoever has files of token ids can write the meta.json by hand.
"""
import zlib
from pathlib import Path

import numpy as np
import torch

from options import read_json, require


def find_data(name):
    """The data folder `name`, or data/<name>."""
    folder = Path(name)
    return folder if (folder / "train.bin").exists() else Path(__file__).parent / name


def load_data(name):
    """The data in the folder `name`, or in data/<name>: (train tokens, validation tokens, meta).

    The tokens stay on the disk. meta is meta.json,

        vocab_size   all ids are below it
        dtype        uint8, uint16 or uint32, of the tokens in the .bin files
        separators   token ids
        tokenizer    the text of a tokenizer.json; null or missing: bytes, if vocab_size is 256

    and the checksums of the two files, so that a training can tell whether they have changed.
    OSError and ValueError for files that are missing or cannot be used.
    """
    folder = find_data(name)
    path = folder / "meta.json"
    meta = dict(tokenizer=None, checksums=[]) | (read_json(path) if path.exists() else {})
    require(meta.get("dtype") in ("uint8", "uint16", "uint32")
            and {"vocab_size", "separators"} <= meta.keys(), f"{path}, which says what tokens "
            "there are, is missing or incomplete; to prepare a text: data/prepare.py --text FILE")
    parts = []
    for path in (folder / "train.bin", folder / "val.bin"):
        tokens = np.memmap(path, dtype=meta["dtype"], mode="r")
        require(tokens.max() < meta["vocab_size"], f"{path} holds token {tokens.max()}, beyond the "
                f"vocabulary of {meta['vocab_size']}")
        meta["checksums"].append(zlib.crc32(tokens))
        parts.append(tokens)
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
