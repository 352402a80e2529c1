"""A folder of tokens -> batches. train.bin and val.bin are raw token ids, meta.json describes them.

`prepare.py` writes such folders. nanoGPT's folders of GPT-2 tokens are read as they are.
"""
import zlib
from pathlib import Path

import numpy as np
import torch

from data.tokenizer import read_json
from options import require

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

    and their checksums, so that a training can tell whether its data has changed. OSError and
    ValueError for files that are missing or cannot be used.
    """
    folder = find_data(name)
    meta = GPT2_META
    if (folder / "meta.json").exists():
        meta = read_json(folder / "meta.json")
    else:
        require(not (folder / "meta.pkl").exists(), f"{folder} holds nanoGPT's characters; prepare "
                f"their text with: python data/prepare.py --text {folder / 'input.txt'}")
    require(GPT2_META.keys() <= meta.keys(), f"{folder}/meta.json is not of data/prepare.py")
    meta = meta | dict(checksums=[])
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
    starts = rng.integers(n_starts, size=batch_size)
    stretches = np.stack([tokens[start:start + block_size + 1] for start in starts])
    stretches = torch.from_numpy(stretches.astype(np.int64))  # (batch_size, block_size + 1)
    return stretches[:, :-1], stretches[:, 1:]
