"""Who sees whom, and the bounded key/value cache that follows from it.

Attention costs T x T because every query looks at every key. SepLLM (arXiv 2412.12094) lets a query
look at three kinds of keys: its window (the last `window` tokens), the sinks (the first `sinks`
tokens of the text) and the separators (`. , ? ! ; :` and line breaks).

The one idea: **every key has a reach**. The query at position i sees the key at position j if

    0 <= i - j < reach[j]

This is the whole mask. A sink reaches to the end, an ordinary token over the window, a separator as
far as training has shown any distance (`block_size`), but no further than until `max_seps` newer
separators have left the window. The example is the text `a,b.cd` with window 2, sinks 1,
block_size 4 and no max_seps:

    position    0  1  2  3  4  5      w  in the window
    token       a  ,  b  .  c  d      s  a sink that has left the window
    reach      end 4  2  4  2  2      f  a separator that has left the window
    query 0     w                     .  hidden: out of reach
    query 1     w  w
    query 2     s  w  w
    query 3     s  f  w  w
    query 4     s  f  .  w  w
    query 5     s  .  .  f  w  w

Down a column, a key is seen by one unbroken range of queries, from its own on. So a cache may drop
a key for good when its reach is over, and the backward pass of a key is a loop over that range.

Read the first half (`key_reach`, `far_layout`), then `sep_kernel.py` and `model.py`; the cache is
best read after the model. `python sep_cache.py "Some text. And more!"` draws the map of a text.
"""
import argparse
import dataclasses
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FOREVER = 1 << 40  # a reach beyond the end of every text


def option(default, help):
    """A dataclass field that is also a command line option, with its help text."""
    return dataclasses.field(default=default, metadata={"help": help})


def add_options(parser, config_class, **defaults):
    """A command line option for each field made by `option`; only those given will be parsed.

    defaults: what the help shows as default, where it is not the field's.
    """
    for field in dataclasses.fields(config_class):
        if "help" in field.metadata:
            kind = dict(type=int_or_none if field.type == int | None else field.type,
                        metavar=field.name.upper())
            if field.type is bool:
                kind = dict(action=argparse.BooleanOptionalAction)
            default = defaults.get(field.name, field.default)
            parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **kind,
                                help=f"{field.metadata['help']} (default: {default})")


def int_or_none(text):
    return None if text == "None" else int(text)


def fields_of(config_class, settings):
    """Those of the settings (a dict) that are fields of a dataclass."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in settings.items() if name in names}


def require(ok, sentence):
    """ValueError with this sentence unless ok."""
    if not ok:
        raise ValueError(sentence)


@dataclass(kw_only=True)
class SepConfig:
    """The settings of the attention. ValueError names the field that is out of range."""
    attn: str = option("sep", "full: every token; streamingllm: sinks and window; fixed: these and "
                              "every fixed_every-th token; sep: these and the separators")
    window: int = option(64, "a query sees the last `window` tokens, itself included")
    sinks: int = option(4, "how many of the first tokens of the text stay visible")
    separators: tuple = tuple(b".,?!;:\n")  # token ids; they belong to the data
    max_seps: int | None = option(None, "how many separators beyond the window are visible, the "
                                        "latest; None: all within block_size")
    fixed_every: int = option(16, "with attn=fixed, the positions divisible by this are treated as "
                                  "separators are with attn=sep")
    block_size: int = option(256, "length of a training text in tokens; no key but a sink is used "
                                  "at this distance or more, unless the window is longer")

    def __post_init__(self):
        self.separators = tuple(self.separators)
        modes = ("full", "streamingllm", "fixed", "sep")
        require(self.attn in modes, f"attn is {self.attn!r}, and must be one of {', '.join(modes)}")
        self.require_range("window", "fixed_every", "block_size", minimum=1)
        self.require_range("sinks", minimum=0)
        if self.max_seps is not None:
            self.require_range("max_seps", minimum=0)

    def require_range(self, *names, minimum):
        for name in names:
            value = getattr(self, name)
            require(minimum <= value < 2 ** 31,
                    f"{name} is {value}, and must be from {minimum} to {2 ** 31 - 1}")


# ---- who sees whom


_separator_tables = {}


def separator_table(separators, device):
    """Whether each id is a separator, (n,) bool; the last entry, False, serves all larger ids."""
    key = separators, device
    if key not in _separator_tables:  # once: the CPU waits for a copy to a GPU
        with torch.inference_mode(False):  # training could not use a tensor of inference mode
            table = torch.zeros(max(separators, default=-1) + 2, dtype=torch.bool)
            table[list(separators)] = True
            _separator_tables[key] = table.to(device)
    return _separator_tables[key]


# torch.compile takes its result as a constant. The public way to say so, the decorator
# torch.compiler.assume_constant_result, would load the compiler: 1.5 seconds.
separator_table._dynamo_marked_constant = True


def is_kept(ids, positions, config):
    """Which tokens stay visible beyond the window: ids (B, T), positions (T,) -> bool (B, T).

    They are the sinks and, by whatever rule, the *separators*: all others that are kept.
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

        reach[p_e] = min(block_size, p_(e + max_seps) + window - p_e), at least window

    A separator at p shortens older reaches for the queries from p + window on, and for no earlier
    one. So the rows may be a whole text, or what a cache holds of one: neither hidden rows nor
    those still to come change anything. positions ascend; rows that hold no token are not kept.
    """
    if config.attn == "full":
        return torch.full_like(positions, FOREVER)
    is_sink = kept & (positions < config.sinks)
    is_separator = kept & ~is_sink
    reach = torch.full_like(positions, config.block_size)
    if config.max_seps is not None:
        # the row of the separator that is max_seps later: the first with a count so much larger
        n_separators = is_separator.cumsum(1)
        row = torch.searchsorted(n_separators, n_separators + config.max_seps)
        later_position = F.pad(positions, (0, 1), value=FOREVER).gather(1, row)
        reach = torch.minimum(reach, later_position + config.window - positions)
    reach = reach.where(is_separator, config.window).clamp(min=config.window)
    return reach.masked_fill(is_sink, FOREVER)


class SepLayout(NamedTuple):
    """Who sees whom in whole texts; made once per forward, and shared by all layers.

    far (B, T): all rows of the text in another order: first the kept tokens, oldest first, so the
        sinks lead (the *far list*); then all others, the last first
    start, stop (B, T): what query t sees beyond its window is two ranges of far, the sinks
        [0, min(sinks, stop)) and the separators [start, stop)
    reach (B, T): of each row

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
    # the number of a row, of an entry of far, or of a query
    index = torch.arange(T, device=ids.device).expand(B, T).contiguous()
    kept = is_kept(ids, index[0], config)
    reach = key_reach(kept, index, config)
    far = torch.where(kept, index, 2 * T - index).argsort(dim=1)

    # stop: the kept tokens at positions <= t - window
    n_kept = kept.cumsum(1)
    stop = F.pad(n_kept, (min(config.window, T), 0))[:, :T]
    # start: the sinks, which have a range of their own, and the separators whose reach is over
    end = torch.where(index < config.sinks, 0, index + reach)  # the first query that sees no more
    end = end.gather(1, far).where(index < n_kept[:, -1:], FOREVER)  # ascends
    start = torch.searchsorted(end, index, right=True)
    start = torch.minimum(start, stop)
    return SepLayout(far.int(), start.int(), stop.int(), reach.clamp(max=T).int())


# ---- the cache

SPARE_ROWS = 16  # hidden rows are dropped once in so many tokens


def make_cache(config, batch_size=1, device=None, dtype=None):
    """An empty cache for `model(ids, cache=cache)`: a SepCache or, with attn="full", a FullCache.

    config: needs n_layer, n_kv_head, head_dim and the fields of SepConfig. dtype: of keys and
    values, default float32. A cache is for inference: no gradient flows through it.
    """
    cache_class = FullCache if config.attn == "full" else SepCache
    return cache_class(config, batch_size, device, dtype)


class SepCache:
    """Keys and values of what the next tokens can still see, in rows, in the order of the text.

    For each forward, `advance` appends rows for the new tokens and says who sees whom; then
    `update` stores the keys and values of each layer. A row that the latest query does not see will
    not be seen again, since every key is seen by one unbroken range of queries. When the rows are
    full, such rows are dropped, and the others move together. Softmax does not depend on the order
    of keys, so attention is dense over all rows, with a mask.

    **The promise**: however a text is split into chunks, the logits are the same up to rounding,
    and up to block_size those of one forward over the whole text. Each sequence of a batch has its
    own separators; rows that a shorter one does not need stay empty.

    Costs for a text of T tokens, with w = window, and c = the most other tokens that are visible at
    once, sinks + max_seps or, where that is less, sinks + block_size - window:

        |                   | full     | sep, streamingllm, fixed |
        | training, prefill | T^2 / 2  | T (w + c) at most        | visible pairs of query and key
        | decoding          | T        | w + c at most            | visible keys of a token
        | cache             | T        | w + c + 16 at most       | rows; in chunks of more than
                                                                    16 tokens, of a chunk more
    """

    def __init__(self, config, batch_size=1, device=None, dtype=None):
        self.config = config
        self.n_tokens = 0  # taken in so far
        self.n_rows = 0  # in use
        shape = (config.n_layer, 2, batch_size, config.n_kv_head, 0, config.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)  # 2: keys, values
        self.row_position = torch.zeros(batch_size, 0, dtype=torch.int64, device=device)
        self.row_kept = torch.zeros(batch_size, 0, dtype=torch.bool, device=device)
        self.row_visible = self.row_kept  # to the latest query

    @property
    def nbytes(self):
        """Bytes of keys and values."""
        return self.kv.nbytes

    @property
    def max_nbytes(self):
        """The bound on nbytes after chunks of at most SPARE_ROWS tokens, however many."""
        config = self.config
        n_far = config.block_size - config.window
        if config.max_seps is not None:
            n_far = min(n_far, config.max_seps)
        if config.attn == "streamingllm":
            n_far = 0
        return self.nbytes_of(config.sinks + max(n_far, 0) + config.window + SPARE_ROWS)

    def nbytes_of(self, n_rows):
        """Bytes of so many keys and values: of an ordinary cache after n_rows tokens."""
        layers, two, B, H, _, D = self.kv.shape
        return layers * two * B * H * n_rows * D * self.kv.element_size()

    @property
    def n_visible_keys(self):
        """How many keys the latest token sees, the mean over the batch."""
        return self.row_visible.sum(1).float().mean().item()

    @property
    def past_horizon(self):
        """Whether some distance is block_size or more, so that sinks need queries of their own."""
        return self.n_tokens > self.config.block_size

    @torch.no_grad()
    def advance(self, ids):
        """Take in new tokens ids (B, T), before the first layer; `update` must follow in each.

        Returns their positions (T,) and the mask (B, 1, T, M) of their queries over the M rows that
        `update` returns: 0 where a query sees a row, else -inf. Memory is T x M: give long texts in
        chunks, say of 512 tokens. ValueError if B is not the cache's batch size.
        """
        B, T = ids.shape
        batch_size = len(self.row_position)
        require(B == batch_size, f"this cache holds {batch_size} sequences, and got ids of {B}")
        if self.n_rows + T > self.kv.shape[4]:
            self._drop_hidden_rows(n_new=T)
        positions = torch.arange(self.n_tokens, self.n_tokens + T, device=ids.device)
        self.n_tokens += T
        self.n_rows += T

        new_kept = is_kept(ids, positions, self.config)
        self.row_position = torch.cat([self.row_position, positions.expand(B, T)], dim=1)
        self.row_kept = torch.cat([self.row_kept, new_kept], dim=1)
        reach = key_reach(self.row_kept, self.row_position, self.config)
        distance = positions[:, None] - self.row_position[:, None]  # (B, T, M)
        visible = distance < reach[:, None]
        if T > 1:
            visible &= distance >= 0
        self.row_visible = visible[:, -1]
        mask = torch.where(visible, 0.0, -torch.inf).to(self.kv.dtype)
        return positions, mask[:, None]

    @torch.no_grad()
    def update(self, k, v, layer_idx):
        """Store a layer's new keys and values (B, H, T, D); return those of all rows (B, H, M, D).

        ValueError if they are not of the cache's dtype.
        """
        require(k.dtype == self.kv.dtype,
                f"this cache holds {self.kv.dtype}, and got keys of {k.dtype}")
        keys, values = self.kv[layer_idx, :, :, :, :self.n_rows].unbind(0)
        first_new = self.n_rows - k.shape[2]
        keys[:, :, first_new:] = k
        values[:, :, first_new:] = v
        return keys, values

    def _drop_hidden_rows(self, n_new):
        """Move the rows that the latest query saw to the front, in order; make room for new ones.

        In a batch the sequence with the most visible rows says how many stay. The sinks, which are
        the first rows of the text and never dropped, stay the first rows of the cache.
        """
        self.n_rows = int(self.row_visible.sum(1).max()) if self.n_rows > 0 else 0
        order = self.row_visible.byte().argsort(dim=1, descending=True, stable=True)
        order = order[:, :self.n_rows]  # (B, n_rows)
        holds_token = self.row_visible.gather(1, order)
        # an empty row is not kept, and further back than any reach
        self.row_kept = self.row_kept.gather(1, order) & holds_token
        self.row_position = self.row_position.gather(1, order).where(holds_token, -FOREVER)
        kept_kv = torch.take_along_dim(self.kv, order[None, None, :, None, :, None], dim=4)
        self.kv = F.pad(kept_kv, (0, 0, 0, max(n_new, SPARE_ROWS)))


class FullCache(SepCache):
    """An ordinary cache, for attn="full": no row is ever dropped, and its room doubles."""
    max_nbytes = None  # there is no bound
    past_horizon = False

    @property
    def n_visible_keys(self):
        return float(self.n_tokens)

    @torch.no_grad()
    def advance(self, ids):
        """As SepCache.advance; the mask is None where every query sees every row."""
        T = ids.shape[1]
        room = self.kv.shape[4]
        if self.n_rows + T > room:
            self.kv = F.pad(self.kv, (0, 0, 0, max(T, room)))
        positions = torch.arange(self.n_tokens, self.n_tokens + T, device=ids.device)
        self.n_tokens += T
        self.n_rows += T
        if T == 1:
            return positions, None
        row = torch.arange(self.n_rows, device=ids.device)
        mask = torch.where(row <= positions[:, None], 0.0, -torch.inf).to(self.kv.dtype)
        return positions, mask[None, None]


# ---- the map of a text: python sep_cache.py "Some text. And more!"


def draw(text, config):
    """The attention map of a text, and what the cache holds after each token, as lines to print."""
    ids = torch.tensor([list(text)])  # (1, T)
    names = [chr(byte) if chr(byte).isprintable() else "·" for byte in text]
    names = ["⏎" if byte == ord("\n") else name for byte, name in zip(text, names, strict=True)]
    positions = torch.arange(len(text))
    reach = key_reach(is_kept(ids, positions, config), positions[None], config)[0].tolist()
    # the real cache; without keys and values, since positions say what it holds
    cache = SepCache(config)

    yield "one row a query:  █ window   ▓ separator   ▒ sink   · hidden"
    yield ""
    yield f"      {''.join(names)}   the cache after this token: sinks and separators | window"
    for i in range(len(text)):
        cache.advance(ids[:, i:i + 1])
        held = cache.row_position[cache.row_visible].tolist()
        far = "".join(names[j] for j in held if i - j >= config.window)
        near = "".join(names[j] for j in held if i - j < config.window)
        marks = "".join(mark(i, j, reach[j], config) for j in range(i + 1))
        yield f"{i:4} {names[i]}{marks:{len(text)}}   {far} | {near}"


def mark(i, j, reach, config):
    """How the map shows key j in the row of query i."""
    if i - j >= reach:
        return "·"
    if i - j < config.window:
        return "█"
    return "▒" if j < config.sinks else "▓"


@dataclass(kw_only=True)
class MapConfig(SepConfig):
    """A model of one channel: all that a map needs."""
    n_layer: int = 1
    n_kv_head: int = 1
    head_dim: int = 1


def main():
    parser = argparse.ArgumentParser(
        description="Draw the attention map of a text, and what the cache holds after each token.")
    parser.add_argument("text", help="the text, 1 to 200 bytes")
    defaults = dict(window=8, sinks=2)
    add_options(parser, SepConfig, **defaults)
    settings = vars(parser.parse_args())
    text = settings.pop("text").encode(errors="surrogateescape")
    if not 1 <= len(text) <= 200:
        parser.error(f"the text has {len(text)} bytes; a map can show 1 to 200")
    try:
        config = MapConfig(**defaults | settings)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.reconfigure(encoding="utf-8")
    for line in draw(text, config):
        print(line)


if __name__ == "__main__":
    main()
