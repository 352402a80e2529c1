"""A folder of tokens -> batches. train.bin and val.bin are raw token ids, meta.json describes them.

`prepare.py` writes such folders. nanoGPT's folders of GPT-2 tokens are read as they are.
"""
import json
import zlib
from pathlib import Path

import numpy as np
import torch

from sep_cache import require

# ! , . : ; ? and line breaks as GPT-2 writes them: alone, doubled, or after a space
GPT2_META = dict(
    vocab_size=50304, dtype="uint16",
    separators=[0, 11, 13, 25, 26, 30, 198, 628, 5145, 837, 764, 1058, 2162, 5633])


def find_data(name):
    """The data folder `name`, or data/<name>."""
    folder = Path(name)
    return folder if (folder / "train.bin").exists() else Path(__file__).parent / name


def load_data(name):
    """The data in the folder `name`, or in data/<name>: (train tokens, validation tokens, meta).

    The tokens stay on the disk. meta is meta.json, without one that of nanoGPT's tokens:

        vocab_size   number of different tokens
        dtype        uint8, uint16 or uint32, of the tokens in the .bin files
        separators   token ids
        answers      token ids; if there are any, the loss is taken where one of them is the target
        record       batches start at multiples of this many tokens (default 1: anywhere)

    and their checksums, so that a training can tell whether its data has changed. OSError and
    ValueError for files that are missing or cannot be used.
    """
    folder = find_data(name)
    meta = GPT2_META
    if (folder / "meta.json").exists():
        meta = json.loads((folder / "meta.json").read_text())
    meta = dict(answers=[], record=1, checksums=[]) | meta
    parts = []
    for path in (folder / "train.bin", folder / "val.bin"):
        tokens = np.memmap(path, dtype=meta["dtype"], mode="r")
        require(tokens.max() < meta["vocab_size"], f"{path} holds token {tokens.max()}, beyond the "
                f"vocabulary of {meta['vocab_size']}")
        meta["checksums"].append(zlib.crc32(tokens))
        parts.append(tokens)
    return *parts, meta


def get_batch(tokens, meta, batch_size, block_size, rng):
    """Random stretches of the text: x and its targets y, each (batch_size, block_size) int64.

    y is x one token later, and -1 where no loss is taken. `rng`: a NumPy generator.
    """
    record = meta["record"]
    n_starts = (len(tokens) - block_size - 1) // record + 1
    require(n_starts > 0, f"the data has {len(tokens)} tokens in one part, and block_size "
            f"{block_size} needs one more than itself")
    starts = rng.integers(n_starts, size=batch_size) * record
    stretches = np.stack([tokens[start:start + block_size + 1] for start in starts])
    stretches = torch.from_numpy(stretches.astype(np.int64))  # (batch_size, block_size + 1)
    x = stretches[:, :-1]
    y = stretches[:, 1:].clone()  # x stays as it is when targets are struck out below
    if meta["answers"]:
        y[~torch.isin(y, torch.tensor(meta["answers"]))] = -1
    return x, y
