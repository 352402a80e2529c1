"""Who sees whom: the mask, the far list that replaces it, and the bounded key/value cache.

Attention costs T x T because every query looks at every key. SepLLM (arXiv 2412.12094) lets a query
look at three kinds of keys: its window (the last `window` tokens), the sinks (the first `sinks`
tokens of the text) and the separators (`. , ? ! ; :` and line breaks). `sees` below is the whole
mask; the tests hold everything else against it.

The one idea of this file: the sinks and separators, the *kept* tokens, are few and known before the
first layer, so we write their positions into a list, the *far list*. What a query sees of it are
two ranges of entries; with its window, three ranges in all. No T x T mask is ever made. The
example, used again further down, is the text `a,b.cd` with window 2, sinks 1, block_size 4 and no
max_seps:

    position    0  1  2  3  4  5      far list: 0, 1, 3 (the sink `a`, the separators `,` and `.`)
    token       a  ,  b  .  c  d
    query 0     w                     w  in the window
    query 1     w  w                  s  a sink that has left the window
    query 2     s  w  w               f  a separator that has left the window
    query 3     s  f  w  w            .  hidden: an ordinary token (position 2), or a separator
    query 4     s  f  .  w  w            at a distance of block_size or more (position 1)
    query 5     s  .  .  f  w  w

Read this file first, then `sep_kernel.py` (attention over these ranges) and `model.py`; the cache
at the end is best read after the model. `python sep_cache.py "Some text. And more!"` draws the map
of a text and what the cache holds.
"""
import argparse
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def sees(i, j, kept, config):
    """The definition: whether query i sees key j <= i. kept[j] (bool): whether token j is kept."""
    if config.attn == "full":
        return True
    if i - j < config.window:
        return True
    if j < config.sinks:
        return True
    if not kept[j]:
        return False
    newer = sum(kept[m] for m in range(max(j + 1, config.sinks), i - config.window + 1))
    below_cap = config.max_seps is None or newer < config.max_seps
    within_horizon = i - j < config.block_size  # training has shown no larger distance
    return below_cap and within_horizon


def option(default, help):
    """A dataclass field that is also a command line option, with its help text."""
    return field(default=default, metadata={"help": help})


def require(ok, sentence):
    """ValueError with this sentence unless ok."""
    if not ok:
        raise ValueError(sentence)


@dataclass
class SepConfig:
    """The settings of the attention. ValueError names the field that is out of range."""
    attn: str = option("sep", "full: every token; streamingllm: sinks + window; fixed: these and "
                              "every fixed_every-th token; sep: these and the separators")
    window: int = option(64, "a query sees the last `window` tokens, itself included")
    sinks: int = option(4, "how many of the first tokens of the text stay visible")
    separators: tuple = tuple(b".,?!;:\n")  # token ids; they belong to the data
    max_seps: int | None = option(None, "how many separators beyond the window are visible, the "
                                        "latest; None: all within block_size")
    fixed_every: int = option(16, "with attn=fixed, the positions divisible by this stay visible")
    block_size: int = option(256, "training length in tokens, and the horizon: beyond the window, "
                                  "no key but a sink is used at this distance or more")

    def __post_init__(self):
        self.separators = tuple(self.separators)
        require(self.attn in ("full", "streamingllm", "fixed", "sep"),
                f"attn is {self.attn!r}, and must be one of full, streamingllm, fixed, sep")
        for name in ("window", "fixed_every", "block_size"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}, and must be at least 1")
        require(self.sinks >= 0, f"sinks is {self.sinks}, and must be at least 0")
        require(self.max_seps is None or self.max_seps >= 0,
                f"max_seps is {self.max_seps}, and must be None or at least 0")

    @property
    def far_capacity(self):
        """How many far tokens that are not sinks can be visible at once."""
        if self.attn in ("full", "streamingllm"):
            return 0
        within_horizon = max(self.block_size - self.window, 0)
        return within_horizon if self.max_seps is None else min(self.max_seps, within_horizon)


# ---- the far list and its ranges


class SepLayout(NamedTuple):
    """Who sees whom, for the queries of one forward; made once and shared by all layers.

    far (B, S) int32: key rows of the kept tokens, oldest first (so sinks first), padded with 0
    start, stop (B, T) int32: query t sees the far entries [start, stop), the sinks
        [0, min(sinks, stop)), and its window

    `stop` counts the entries that have left the window of query t. `start >= sinks` is the first
    one, not a sink, that the cap and the horizon leave visible; it may pass `stop`, then the range
    is empty. Neither ever decreases from one query to the next. So an entry e is seen by a range of
    queries, too, which is what the backward pass needs: from the first query with stop > e up to
    the first with start > e (a sink: to the end). In the example:

        far    0  1  3                query   0  1  2  3  4  5
                                      stop    0  0  1  2  2  3
                                      start   1  1  1  1  1  2

    Entry 1, the comma, is seen by queries 3 and 4 beyond their windows; entry 0, the sink, from
    query 2 on.
    """
    far: Tensor
    start: Tensor
    stop: Tensor


_separator_tables = {}


@torch.compiler.assume_constant_result
def separator_table(separators, device):
    """Whether each id is a separator, (n,) bool; the last entry, False, serves all larger ids."""
    key = separators, device
    if key not in _separator_tables:
        with torch.inference_mode(False):  # training could not use a tensor of inference mode
            table = torch.zeros(max(separators, default=-1) + 2, dtype=torch.bool)
            table[list(separators)] = True
            _separator_tables[key] = table.to(device)  # once: the CPU waits for a copy to a GPU
    return _separator_tables[key]


def is_kept(ids, positions, config):
    """Which tokens stay visible beyond the window: ids (B, T), positions (T,) -> bool (B, T)."""
    kept = (positions < config.sinks).expand(ids.shape)
    if config.attn == "fixed":
        kept = kept | (positions % config.fixed_every == 0)
    elif config.attn == "sep":
        is_separator = separator_table(config.separators, ids.device)
        kept = kept | is_separator[ids.clamp(max=len(is_separator) - 1)]
    return kept


def list_kept(kept, positions, n_queries, config):
    """The layout of the last `n_queries` of M rows: kept (B, M) bool, positions (B, M) ascending.

    Static shapes, no device synchronisation.
    """
    B, M = kept.shape
    n_kept = kept.cumsum(1)  # (B, M) kept rows up to and including each row
    rows = torch.arange(M, dtype=torch.int32, device=kept.device).expand(B, M)
    # a kept row goes to the column of its number, all others to a spare column that is cut off
    column = torch.where(kept, n_kept - 1, M)
    far = rows.new_zeros(B, M + 1).scatter_(1, column, rows)[:, :M]

    n_kept_before = F.pad(n_kept, (1, 0))  # (B, M + 1) kept rows before each row
    query_positions = positions[:, M - n_queries:]

    def n_kept_at(distance):
        """How many kept rows are at this distance or more from each query: (B, n_queries)."""
        n_rows = torch.searchsorted(positions, query_positions - distance, right=True)
        return n_kept_before.gather(1, n_rows)

    stop = n_kept_at(config.window)
    start = n_kept_at(config.block_size).clamp(min=config.sinks)  # the horizon
    if config.max_seps is not None:
        start = torch.maximum(start, stop - config.max_seps)
    return SepLayout(far.contiguous(), start.int(), stop.int())


def far_layout(ids, config):
    """The SepLayout of whole texts, ids (B, T) integer. With attn="full" there is none: None."""
    if config.attn == "full":
        return None
    positions = torch.arange(ids.shape[1], device=ids.device)
    kept = is_kept(ids, positions, config)
    return list_kept(kept, positions.expand(ids.shape).contiguous(), ids.shape[1], config)


# ---- the cache


class SlotLayout(NamedTuple):
    """Who sees whom in a decoding step, over the slots of a SepCache.

    mask (B, 1, 1, n_slots): 0 where the new token sees a slot, else -inf
    """
    mask: Tensor


EMPTY = -(1 << 40)  # the position of a slot that holds no token: further back than any
ANY_DISTANCE = 1 << 40


class SepCache:
    """Keys and values of what the next tokens can still see, in slots. One layer:

        | sinks | separators, a ring | spare | the last `window` tokens, a ring |
        0     sinks                 spare_slot                               n_slots

    A token at position p enters the window's slot `p % window`. The token that it replaces has just
    left the window, and moves to the far slots if it is kept, else to the spare slot, which nobody
    sees. The positions of the slots' tokens say who is visible. Softmax does not depend on the
    order of keys, so a decoding step (one token) attends over the slots where they are. A chunk of
    several tokens attends over rows in order, [slots sorted by position | new tokens], with a far
    list as in training; then all slots are filled anew.

    **The promise**: however a text is split into chunks, the logits are those of one forward over
    the whole text. It holds because a key is seen by one unbroken range of queries, from its own
    on: while it is in the window, then while the cap and the horizon leave it visible. Once it is
    out of sight, no later query asks for it, so it can be dropped. A mask that shows an old key
    again (windows that jump back, every tenth query sees all) would break the promise.

    Costs for a text of T tokens, with w = window, f = far tokens visible on average, and c = the
    most that can be: sinks + min(max_seps, block_size - window):

        |                   | full     | sep, streamingllm, fixed |
        | training, prefill | T^2 / 2  | T (w + f)                | query-key pairs
        | decoding          | T        | w + c                    | query-key pairs per token
        | cache             | T        | w + c                    | keys a layer, from the start

    config: needs n_layer, n_kv_head, head_dim and the fields of SepConfig. batch_size: each
    sequence has its own separators. dtype: of keys and values, default float32. With attn="full"
    it is an ordinary cache that grows. A cache is for inference: no gradient flows through it.
    """

    def __init__(self, config, batch_size=1, device=None, dtype=None):
        self.config = config
        self.batch_size = batch_size
        self.n_tokens = 0
        self.is_full = config.attn == "full"
        self.spare_slot = config.sinks + config.far_capacity
        self.first_window_slot = self.spare_slot + 1
        n_slots = 0 if self.is_full else self.first_window_slot + config.window
        shape = (config.n_layer, 2, batch_size, config.n_kv_head, n_slots, config.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)  # 2: keys, values
        self.sink_keys = self.kv[:, 0, :, :, :config.sinks].clone()  # see `show_sinks`
        self.sink_position = torch.arange(config.sinks, device=device)[:, None]
        self.slot_position = torch.full((batch_size, n_slots), EMPTY, device=device)
        self.slot_kept = torch.zeros(batch_size, n_slots, dtype=torch.bool, device=device)
        seen_below = [ANY_DISTANCE] * config.sinks
        seen_below += [config.block_size] * config.far_capacity
        seen_below += [0]  # the spare slot
        seen_below += [config.window] * config.window
        # a slot is seen by queries at a smaller distance than this
        self.seen_below = torch.tensor(seen_below[:n_slots], device=device)
        # the next separator to leave the window takes slot n_seps % far_capacity of the ring; it
        # counts from -sinks, since the sinks leave first, and a chunk fills the ring from slot 0
        self.n_seps = torch.full((batch_size, 1), -config.sinks, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # n_tokens, on the device

    @property
    def nbytes(self):
        """Bytes of what is stored between two forwards. Constant, but for attn="full"."""
        state = (self.kv, self.sink_keys, self.sink_position, self.slot_position, self.slot_kept,
                 self.seen_below, self.n_seps, self.position)
        return sum(tensor.nbytes for tensor in state)

    def nbytes_of(self, n_tokens):
        """Bytes that an ordinary cache of so many tokens would hold."""
        layers, two, B, H, _, D = self.kv.shape
        return layers * two * B * H * D * self.kv.element_size() * n_tokens

    @property
    def n_visible_keys(self):
        """How many keys the latest token sees, the mean over the batch."""
        if self.is_full or self.n_tokens == 0:
            return float(self.n_tokens)
        return self.visible_slots(self.position - 1).sum(1).float().mean().item()

    def visible_slots(self, position):
        """Which slots a token at this position (1,) sees: (B, n_slots) bool."""
        return position - self.slot_position < self.seen_below

    @torch.no_grad()
    def advance(self, ids):
        """Take in new tokens ids (B, T), before the first layer; `update` must follow in each.

        Returns their positions (T,) and the layout of their queries over what `update` returns: a
        SlotLayout for one token, else a SepLayout, or None with attn="full". ValueError if B is not
        the cache's batch size.
        """
        B, T = ids.shape
        require(B == self.batch_size,
                f"this cache holds {self.batch_size} sequences, and got ids of {B}")
        positions = self.position + torch.arange(T, device=ids.device)
        if self.is_full:
            layout = None
            self._reserve(self.n_tokens + T)
        elif T == 1:
            layout = self._advance_token(ids, positions)
        else:
            layout = self._advance_chunk(ids, positions)
        self.position += T
        self.n_tokens += T
        return positions, layout

    @torch.no_grad()
    def update(self, k, v, layer_idx):
        """Store a layer's new keys and values (B, H, T, D); return those to use (B, H, M, D).

        ValueError if they are not of the cache's dtype.
        """
        if k.dtype != self.kv.dtype:
            raise ValueError(f"this cache holds {self.kv.dtype}, and got keys of {k.dtype}")
        store = self.kv[layer_idx]  # (2, B, H, n_slots, D)
        T = k.shape[2]
        if self.is_full:
            store[0, :, :, self.n_tokens - T:self.n_tokens] = k
            store[1, :, :, self.n_tokens - T:self.n_tokens] = v
            return store[:, :, :, :self.n_tokens].unbind(0)
        if T == 1:
            store[0].index_copy_(2, self.new_slot, k)
            store[1].index_copy_(2, self.new_slot, v)
            return store[:, :, :, self.slots_to_read].unbind(0)
        old = _gather_rows(store, self.row_to_slot)
        rows = torch.cat([old, torch.stack([k, v])], dim=3)  # (2, B, H, M, D)
        store.copy_(_gather_rows(rows, self.slot_to_row))
        self.sink_keys[layer_idx] = store[0, :, :, :self.config.sinks]  # in case `show_sinks` comes
        return rows.unbind(0)

    def show_sinks(self, keys):
        """Put these keys (n_layer, B, H, sinks, D) into the sinks' slots, until the next call.

        A decoding step has no q_sink: it is cheaper to rotate the few keys of the sinks, once for
        all layers. `sink_keys` keeps them as they were computed.
        """
        self.kv[:, 0, :, :, :self.config.sinks] = keys

    def _reserve(self, n_tokens):
        """Room for so many tokens, with attn="full": at least doubled whenever it grows."""
        room = self.kv.shape[4]
        if n_tokens > room:
            grown = self.kv.new_zeros(*self.kv.shape[:4], max(n_tokens, 2 * room), self.kv.shape[5])
            grown[..., :room, :] = self.kv
            self.kv = grown

    def _advance_token(self, ids, position):
        """One new token: fixed shapes and addresses, so a GPU can replay it as a captured graph."""
        config = self.config
        B = self.batch_size

        # the slot of the new token, and the token that leaves the window with it
        self.new_slot = self.first_window_slot + position % config.window  # (1,)
        leaving = position - config.window  # (1,) its position
        leaving_kept = self.slot_kept.index_select(1, self.new_slot)  # (B, 1)

        # where it goes: a sink to its own slot, a separator to the next slot of the ring, anything
        # else to the spare slot
        ring_slot = config.sinks + self.n_seps % max(config.far_capacity, 1)
        far_slot = torch.where(leaving < config.sinks, leaving, ring_slot)  # (B, 1)
        far_slot = torch.where(leaving_kept, far_slot, self.spare_slot)
        leaving_kv = self.kv.index_select(4, self.new_slot)  # (n_layer, 2, B, H, 1, D)
        self.kv.scatter_(4, far_slot.view(1, 1, B, 1, 1, 1).expand(leaving_kv.shape), leaving_kv)
        is_leaving = self.sink_position == leaving  # (sinks, 1)
        self.sink_keys.copy_(torch.where(is_leaving, leaving_kv[:, 0], self.sink_keys))
        self.slot_position.scatter_(1, far_slot, leaving.expand(B, 1))
        self.slot_kept.scatter_(1, far_slot, leaving_kept)
        self.n_seps += leaving_kept

        # the new token in its place
        self.slot_position.index_copy_(1, self.new_slot, position.expand(B, 1))
        self.slot_kept.index_copy_(1, self.new_slot, is_kept(ids, position, config))
        mask = torch.where(self.visible_slots(position), 0.0, -torch.inf).to(self.kv.dtype)

        # the first tokens of a text have filled only the first slots of the window; on a GPU all
        # slots are read, since a captured graph needs fixed shapes
        self.slots_to_read = slice(None)
        if self.n_tokens < config.window and not ids.is_cuda:
            first = self.first_window_slot
            self.slots_to_read = slice(first, first + self.n_tokens + 1)
        return SlotLayout(mask[:, None, None, self.slots_to_read])

    def _advance_chunk(self, ids, positions):
        """Several new tokens: a far list over rows in order of position, then all slots anew."""
        config = self.config
        B, T = ids.shape

        self.show_sinks(self.sink_keys)  # the queries of a chunk have a q_sink each

        # 1. the rows to attend to: slots sorted by position, empty ones first, then the new tokens
        old_positions, slots = self.slot_position.sort(dim=1)  # (B, n_slots)
        if self.n_tokens < config.window:
            # empty slots would be rows before the text, and the window, which counts rows, would
            # show them
            n_empty = slots.shape[1] - self.n_tokens
            old_positions = old_positions[:, n_empty:]
            slots = slots[:, n_empty:]
        self.row_to_slot = slots
        row_positions = torch.cat([old_positions, positions.expand(B, T)], dim=1)  # (B, M)
        old_kept = self.slot_kept.gather(1, slots)
        row_kept = torch.cat([old_kept, is_kept(ids, positions, config)], dim=1)
        layout = list_kept(row_kept, row_positions, T, config)

        # 2. what survives in the far slots: the far entries that the last query sees
        start = layout.start[:, -1:].long()  # (B, 1)
        stop = layout.stop[:, -1:].long()
        sink_entries = torch.arange(config.sinks, device=ids.device).expand(B, -1)
        ring_entries = start + torch.arange(config.far_capacity, device=ids.device)
        entries = torch.cat([sink_entries, ring_entries], dim=1)  # (B, spare_slot)
        far_rows = layout.far.long().gather(1, entries.clamp(max=layout.far.shape[1] - 1))
        far_rows = torch.where(entries < stop, far_rows, -1)  # -1: nothing
        self.n_seps.copy_(stop - start)

        # 3. what survives in the window's slots: the last tokens, at `position % window`
        newest = positions[-1]
        slot = torch.arange(config.window, device=ids.device)
        distance = (newest - slot) % config.window  # (window,) of each slot's token
        M = row_positions.shape[1]
        window_rows = torch.where(distance <= newest, M - 1 - distance, -1).expand(B, -1)

        spare_row = far_rows.new_full((B, 1), -1)
        rows = torch.cat([far_rows, spare_row, window_rows], dim=1)  # (B, n_slots)
        self.slot_to_row = rows.clamp(min=0)
        slot_position = row_positions.gather(1, self.slot_to_row)
        self.slot_position.copy_(torch.where(rows >= 0, slot_position, EMPTY))
        self.slot_kept.copy_(row_kept.gather(1, self.slot_to_row) & (rows >= 0))
        return layout


def _gather_rows(x, index):
    """x (2, B, H, N, D), index (B, M) -> (2, B, H, M, D)."""
    two, _, H, _, D = x.shape
    return x.gather(3, index[None, :, None, :, None].expand(two, -1, H, -1, D))


# ---- the map of a text: python sep_cache.py "Some text. And more!"


@dataclass
class MapConfig(SepConfig):
    """A model of one channel: all that a map needs."""
    n_layer: int = 1
    n_kv_head: int = 1
    head_dim: int = 1


def draw(text, config):
    """The attention map of a text, and what the cache holds after each token, as lines to print."""
    ids = torch.tensor([list(text.encode())])  # (1, T)
    T = ids.shape[1]
    names = [printable(chr(byte)) for byte in ids[0].tolist()]
    kept = is_kept(ids, torch.arange(T), config)[0].tolist()

    # the real cache, with each token's position as its key: what it holds can be read back
    cache = SepCache(config, dtype=torch.float64)
    lines = ["one row a query:  █ window   ▓ separator   ▒ sink   · hidden",
             f"attn {config.attn}, window {config.window}, sinks {config.sinks}, "
             f"max_seps {config.max_seps}, block_size {config.block_size}",
             "",
             f"      {''.join(names)}   the cache after this token: sinks and separators | window"]
    for i in range(T):
        marks = "".join(mark(i, j, kept, config) for j in range(i + 1))
        cache.advance(ids[:, i:i + 1])
        key = torch.full((1, 1, 1, 1), float(i), dtype=torch.float64)
        cache.update(key, key, layer_idx=0)
        keys = cache.kv[0, 0, 0, 0, :, 0].long()  # (n_slots,)
        if not cache.is_full:
            keys = keys[cache.visible_slots(torch.tensor([i]))[0]]
        seen = sorted(keys[:i + 1].tolist())
        window = T if cache.is_full else config.window
        far = "".join(names[j] for j in seen if i - j >= window)
        near = "".join(names[j] for j in seen if i - j < window)
        lines.append(f"{i:4} {names[i]}{marks:{T}}   {far} | {near}")
    return lines


def mark(i, j, kept, config):
    """How the map shows key j in the row of query i."""
    if not sees(i, j, kept, config):
        return "·"
    if config.attn == "full" or i - j < config.window:
        return "█"
    return "▒" if j < config.sinks else "▓"


def printable(char):
    if char == "\n":
        return "⏎"
    return char if char.isprintable() else "·"


def main():
    parser = argparse.ArgumentParser(
        description="Draw the attention map of a text, and what the cache holds after each token.")
    parser.add_argument("text", help="the text, 1 to 200 bytes")
    defaults = {"attn": "sep", "window": 8, "sinks": 2, "max_seps": None, "fixed_every": 16,
                "block_size": 256}
    for name, default in defaults.items():
        help_text = SepConfig.__dataclass_fields__[name].metadata["help"]
        parser.add_argument(f"--{name}", type=str if name == "attn" else int, default=default,
                            help=f"{help_text} (default: {default})")
    args = vars(parser.parse_args())
    text = args.pop("text")
    n_bytes = len(text.encode())
    if not 1 <= n_bytes <= 200:
        parser.error(f"the text has {n_bytes} bytes; a map can show 1 to 200")
    for name in ("window", "sinks", "block_size"):
        args[name] = min(args[name], 200)  # more means the same for such a text
    try:
        config = MapConfig(**args)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.reconfigure(encoding="utf-8")
    print("\n".join(draw(text, config)))


if __name__ == "__main__":
    main()
