"""Who sees whom: the one idea of this repository.

Attention costs T x T because every query looks at every key. SepLLM (arXiv 2412.12094) lets a query
look at three kinds of keys: its window (the last `window` tokens), the sinks (the first `sinks`
tokens of the text) and the separators (`. , ? ! ; :` and line breaks).

The idea: **every key has a reach**. The query at position i sees the key at position j if

    0 <= i - j < reach[j]

This is the whole mask. A sink reaches to the end, an ordinary token over the window, a separator to
`block_size` (the length of a training text) or, if sooner, until `max_seps` newer ones have left
the window. The example is the text `a,b.cd` with window 2, sinks 1, block_size 4 and no max_seps:

    position    0  1  2  3  4  5      w  in the window
    token       a  ,  b  .  c  d      s  a sink that has left the window
    reach      end 4  2  4  2  2      f  a separator that has left the window: it is far
    query 0     w                     ·  hidden: out of reach
    query 1     w  w
    query 2     s  w  w
    query 3     s  f  w  w
    query 4     s  f  ·  w  w
    query 5     s  ·  ·  f  w  w

Down a column, a key is seen by one unbroken range of queries, from its own on. So a cache may drop
a key for good when its reach is over, and the backward pass of a key is a loop over that range.

`python sep_mask.py "Some text. And more!"` draws this map for a text. Next: `sep_kernel.py`, the
attention that follows from it.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from options import check_minima, option, parse_options, require, run_script

FOREVER = 1 << 40  # a reach beyond the end of every text


@dataclass(kw_only=True)
class SepConfig:
    """The settings of the attention. ValueError names the field that is out of range."""
    attn: str = option("sep", "full: every token; streamingllm: sinks and window; fixed: these and "
                              "every fixed_every-th token; sep: these and the separators")
    window: int = option(64, "a query sees the last `window` tokens, itself included", 1)
    sinks: int = option(4, "how many of the first tokens of the text stay visible", 0)
    separators: tuple = tuple(b".,?!;:\n")  # token ids; they belong to the data
    max_seps: int | None = option(None, "how many separators beyond the window are visible, the "
                                        "latest; None: all within block_size", 0)
    fixed_every: int = option(16, "with attn=fixed, the positions divisible by this are treated as "
                                  "separators are with attn=sep", 1)
    block_size: int = option(256, "length of a training text in tokens, and how far a separator "
                                  "reaches; with attn=full only the former", 1)

    def __post_init__(self):
        self.separators = tuple(self.separators)
        modes = ("full", "streamingllm", "fixed", "sep")
        require(self.attn in modes, f"attn is {self.attn!r}, and must be one of {', '.join(modes)}")
        check_minima(self)


def is_kept(ids, positions, config):
    """Which tokens stay visible beyond the window: ids (B, T), positions (T,) -> bool (B, T).

    They are the sinks and the *separators*, which from here on means every other kept token, so
    with attn=fixed every fixed_every-th. For another choice of tokens, change this function;
    everything else follows.
    """
    kept = (positions < config.sinks).expand(ids.shape)
    if config.attn == "fixed":
        kept = kept | (positions % config.fixed_every == 0)
    elif config.attn == "sep":
        table = separator_table(config.separators, ids.device)
        kept = kept | table[ids.clamp(max=len(table) - 1)]
    return kept


def key_reach(kept, positions, config):
    """How many queries see each key, its own the first: kept, positions (B, M) -> (B, M) int64.

    With p_0 < p_1 < ... the positions of the separators:

        reach[p_e] = max(window, min(block_size, p_(e + max_seps) + window - p_e))

    The last term: separator e + max_seps leaves the window at p_(e + max_seps) + window, and from
    this query on the max_seps separators after e are the latest. So a separator shortens reaches
    for queries after itself only, and the M rows may be a whole text or what a cache holds of one.
    Rows that hold no token are not kept; the positions of the kept rows ascend.
    """
    if config.attn == "full":
        return torch.full_like(positions, FOREVER)
    is_sink = kept & (positions < config.sinks)
    is_separator = kept & ~is_sink
    reach = torch.full_like(positions, config.block_size)
    if config.max_seps is not None:
        # the row of the separator that is max_seps later: the first whose count is so much higher;
        # what this finds for other rows, `where` below discards
        n_separators = is_separator.cumsum(1)
        later_row = torch.searchsorted(n_separators, n_separators + config.max_seps)
        later_position = F.pad(positions, (0, 1), value=FOREVER).gather(1, later_row)
        reach = torch.minimum(reach, later_position + config.window - positions)
    reach = reach.where(is_separator, config.window).clamp(min=config.window)
    return reach.masked_fill(is_sink, FOREVER)


class SepLayout(NamedTuple):
    """Who sees whom in whole texts, as ranges; made once per forward, and shared by all layers.

    Nearly every 64 x 64 block of the T x T map holds some separator, so skipping empty blocks of it
    saves little. But the kept tokens, written into a list, become neighbours:

    far (B, T): all rows of the text in another order: first the kept tokens, oldest first, so the
        sinks lead (the *far list*); then all others, the latest first
    start, stop (B, T): what query t sees beyond its window is two ranges of far, the sinks
        [0, min(sinks, stop)) and the separators [start, stop)
    reach (B, T): of each row, at most T

    All are int32. Neither start nor stop ever decreases from one query to the next. In the example:

        far    0  1  3  5  4  2       query   0  1  2  3  4  5
                                      stop    0  0  1  2  2  3
                                      start   0  0  1  1  1  2
    """
    far: Tensor
    start: Tensor
    stop: Tensor
    reach: Tensor


def far_layout(ids, config):
    """The SepLayout of whole texts, ids (B, T) integer. With attn="full" there is none: None.

    Static shapes, no device synchronisation, nothing of size T x T.
    """
    if config.attn == "full":
        return None
    B, T = ids.shape
    # the numbers of the rows, of the entries of far, and of the queries
    index = torch.arange(T, device=ids.device).expand(B, T).contiguous()
    kept = is_kept(ids, index[0], config)
    reach = key_reach(kept, index, config)
    # kept first, ascending, then the others, descending: neighbours in far are near each other in
    # the text, and long reaches come first
    far = torch.where(kept, index, 2 * T - index).argsort(dim=1)

    # stop: the kept tokens at positions <= t - window
    n_kept = kept.cumsum(1)
    stop = F.pad(n_kept, (min(config.window, T), 0))[:, :T]
    # start: how many entries end at or before t. The ends of separators ascend, as the positions
    # do that they are made of, so a binary search counts. Sinks have a range of their own: end 0.
    end = torch.where(index < config.sinks, 0, index + reach)  # the first query that sees no more
    is_in_list = index < n_kept[:, -1:]
    end = end.gather(1, far).where(is_in_list, FOREVER)
    start = torch.minimum(torch.searchsorted(end, index, right=True), stop)
    return SepLayout(far.int(), start.int(), stop.int(), reach.clamp(max=T).int())


_separator_tables = {}


def separator_table(separators, device):
    """Whether each id is a separator, (n,) bool; the last entry, False, serves all larger ids."""
    key = separators, device
    if key not in _separator_tables:  # made once, since the CPU waits for a copy to a GPU
        table = torch.zeros(max(separators, default=-1) + 2, dtype=torch.bool)
        table[list(separators)] = True
        _separator_tables[key] = table.to(device)
    return _separator_tables[key]


# To torch.compile its result is a constant. The public way to say so, the decorator
# torch.compiler.assume_constant_result, would load the compiler: 1.5 seconds.
separator_table._dynamo_marked_constant = True


# ---- the map of a text: python sep_mask.py "Some text. And more!"


def draw(text, config):
    """The attention map of a text, as lines to print; a character is a token."""
    ids = torch.tensor([list(map(ord, text))]).long()  # (1, T)
    positions = torch.arange(len(text))
    reach = key_reach(is_kept(ids, positions, config), positions[None], config)[0].tolist()
    names = ["⏎" if character == "\n" else character if character.isprintable() else "·"
             for character in text]
    yield "one row a query:  █ window   ▓ separator   ▒ sink   · hidden\n"
    yield f"       {''.join(names)}"
    for i, name in enumerate(names):
        yield f"{i:4} {name} {''.join(mark(i, j, reach[j], config) for j in range(i + 1))}"


def mark(i, j, reach, config):
    """How the map shows key j in the row of query i."""
    if i - j >= reach:
        return "·"
    if i - j < config.window:
        return "█"
    return "▒" if j < config.sinks else "▓"


def main():
    defaults = dict(window=8, sinks=2)
    options = parse_options("Draw who sees whom in the first 200 characters of a text.",
                            [SepConfig], defaults, arguments=["text"])
    text = options.pop("text")[:200]
    for line in draw(text, SepConfig(**defaults | options)):
        print(line)


if __name__ == "__main__":
    run_script(main)
