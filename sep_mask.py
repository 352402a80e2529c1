"""Who sees whom: the one idea of this repository.

Attention costs T x T because every query looks at every key. SepLLM (arXiv 2412.12094) lets a query
look at three kinds of keys. They are its window (the last `window` tokens), the sinks (the first
`sinks` tokens of the text) and the separators (`. , ? ! ; :` and line breaks).

The idea: **every key has a reach**. The query at position i sees the key at position j if

    0 <= i - j < reach[j]

This is the whole mask. An ordinary token reaches over the window. A sink reaches to the end. A
separator reaches until `max_seps` newer ones have left the window, for `block_size` queries at
most.

Training texts have at most `block_size` tokens, so this last bound acts in streams only. To show it
in six lines, the example has a block_size that is shorter than the text. It is the stream `a,b.cd`
with window 2, sinks 1, block_size 4 and no max_seps:

    position    0  1  2  3  4  5      w  in the window
    token       a  ,  b  .  c  d      s  a sink that has left the window
    reach      end 4  2  4  2  2      f  a separator that has left the window: it is far
    query 0     w                     ·  hidden: out of reach
    query 1     w  w
    query 2     s  w  w
    query 3     s  f  w  w
    query 4     s  f  ·  w  w
    query 5     s  ·  ·  f  w  w

Down a column, a key is seen by one unbroken range of queries, which begins with its own. Two things
follow. A cache may drop a key for good when its reach is over. And the backward pass of a key is a
loop over that range.

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


def visible(query, key, reach):
    """The map: which queries see which keys.

    query (..., T) and key (..., M): positions; reach (..., M) of the keys -> bool (..., T, M)
    """
    distance = query[..., None] - key[..., None, :]
    return (0 <= distance) & (distance < reach[..., None, :])


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


def is_kept(ids, positions, config, separators):
    """Which tokens stay visible beyond the window: ids (B, T), positions (T,) -> bool (B, T).

    separators (n,): config.separators on the device. The kept tokens are the sinks and the
    *separators*. From here on, that word stands for all kept tokens but the sinks, so with
    attn=fixed for every fixed_every-th.

    For another choice of tokens, change this function; everything else follows. A token must be
    judged by its own id and position, since a cache sees a text in pieces: a rule that looks at a
    neighbour would hold in training and not in decoding. Write the rule into `definition_mask` in
    tests/test_mask.py as well, and the whole suite checks it: tests/test_stream.py fails for a rule
    that looks at neighbours, while the worked example is for this rule alone.
    """
    kept = (positions < config.sinks).expand(ids.shape)
    if config.attn == "fixed":
        kept = kept | (positions % config.fixed_every == 0)
    elif config.attn == "sep":
        kept = kept | (ids[..., None] == separators).any(-1)
    return kept


def key_reach(kept, positions, config):
    """How many queries see each key, its own the first: kept, positions (B, M) -> (B, M) int64.

    With p_0 < p_1 < ... the positions of the separators:

        reach[p_e] = max(window, min(block_size, p_(e + max_seps) + window - p_e))

    The last term is the rule of max_seps. Separator e + max_seps leaves the window at the query
    p_(e + max_seps) + window. From this query on, the max_seps separators after e are the latest.

    A separator changes nothing for queries before it. So the M rows may be a whole text, or what a
    cache holds of one. The positions of kept rows ascend. A row at a negative position holds no
    token: it counts as a sink, and is further away than any reach.
    """
    if config.attn == "full":
        return torch.full_like(positions, FOREVER)
    is_sink = positions < config.sinks
    is_separator = kept & ~is_sink
    reach = torch.full_like(positions, config.block_size)
    if config.max_seps is not None:
        # The row of the separator that is max_seps later: the first row whose count is so much
        # higher. With max_seps 1 and separators in rows 1 and 3 of 5, the counts are 0 1 1 2 2. For
        # row 1 the search is for 2, and finds row 3. For row 3 it is for 3, and finds the end, 5.
        # What it finds for rows without a separator, `where` below discards.
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

    far (B, T): all rows of the text in another order. First come the kept tokens, oldest first, so
        the sinks lead: this part is the *far list*. Then come all others, the latest first.
        Queries do not use these. The backward pass takes all keys in the order of far.
    start, stop (B, T): what query t sees beyond its window is two ranges of far, the sinks
        [0, min(sinks, stop)) and the separators [start, stop)
    reach (B, T): of each row, at most T
    window, sinks: of the config, at most T

    The tensors are int32. Neither start nor stop ever decreases from one query to the next. In the
    example:

        far    0  1  3  5  4  2       query   0  1  2  3  4  5
                                      stop    0  0  1  2  2  3
                                      start   0  0  1  1  1  2

    blocks: None, or what plain PyTorch makes of the layout, see `in_blocks` in sep_kernel.py
    """
    far: Tensor
    start: Tensor
    stop: Tensor
    reach: Tensor
    window: int
    sinks: int
    blocks: tuple | None = None


@torch.inference_mode(False)  # a layout that was made in inference mode can be trained on
def far_layout(ids, config, separators=None):
    """The SepLayout of whole texts, ids (B, T) integer. With attn="full" there is none: None.

    separators: as for `is_kept`; by default they are copied to the device of ids.
    Static shapes, no device synchronisation, nothing of size T x T.
    """
    if config.attn == "full":
        return None
    if separators is None:
        separators = torch.tensor(config.separators, device=ids.device)
    _, T = ids.shape
    window = min(config.window, T)
    sinks = min(config.sinks, T)
    # the numbers of the rows, of the entries of far, and of the queries
    index = torch.arange(T, device=ids.device).expand_as(ids).contiguous()
    kept = is_kept(ids, index[0], config, separators)
    reach = key_reach(kept, index, config)
    # kept first, ascending, then the others, descending: neighbours in far are near each other in
    # the text, and long reaches come first
    far = torch.where(kept, index, 2 * T - index).argsort(dim=1)

    # stop[t]: how many kept tokens have left the window, those up to position t - window
    n_kept = kept.cumsum(1)
    stop = F.pad(n_kept, (window, 0))[:, :T]  # stop[t] = n_kept[t - window], before that 0
    # start[t]: how many entries of the far list end at or before t. The ends of separators ascend,
    # as the positions do that they are made of, so a binary search counts them. The sinks have a
    # range of their own. With end 0 they always count, so start lies behind them. While they are
    # still in the window, that is too far: hence the minimum.
    end = torch.where(index < sinks, 0, index + reach)  # the first query that sees no more
    is_in_list = index < n_kept[:, -1:]
    end = end.gather(1, far).where(is_in_list, FOREVER)
    start = torch.minimum(torch.searchsorted(end, index, right=True), stop)
    return SepLayout(far.int(), start.int(), stop.int(), reach.clamp(max=T).int(), window, sinks)


# ---- the map of a text: python sep_mask.py "Some text. And more!"


def draw(text, config):
    """The attention map of a text, as lines to print; a character is a token."""
    ids = torch.tensor([list(map(ord, text))]).long()  # (1, T)
    positions = torch.arange(len(text))
    kept = is_kept(ids, positions, config, torch.tensor(config.separators))
    reach = key_reach(kept, positions[None], config)[0].tolist()
    shown = text.replace("\n", "⏎")
    names = [character if character.isprintable() else "·" for character in shown]
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
    print("\n".join(draw(text, SepConfig(**defaults | options))))


if __name__ == "__main__":
    run_script(main)
