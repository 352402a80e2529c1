"""Who sees whom: the kept tokens, the far list, and the bounded key/value cache built on them.

The one idea: every visible set is an interval of a list. A query sees its window (an interval of the text) and part of
the *far list*, the positions of the kept tokens in order (sinks first), of which `n_far` have left its window:

    far entries [0, min(sinks, n_far))  and  [max(sinks, n_far - max_seps), n_far)

So no T x T mask is ever made; and because the same lists can be laid over "cached rows, then new rows", training,
prefill and decoding are one function. Read after `model.py` and before `sep_kernel.py`.
`python sep_cache.py "Some text. And more!"` draws the attention map of a text and the cache after each of its tokens.
"""
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SepLayout(NamedTuple):
    """What the queries of a forward see beyond their window."""
    far: Tensor  # (B, S) int32: key rows of the kept tokens in order, sinks first, padded with 0
    start: Tensor  # (B, Tq) int32, never decreasing: the first entry, not a sink, that a query sees
    stop: Tensor  # (B, Tq) int32, never decreasing: how many entries have left a query's window


def reach(config):
    """(window, sinks, max_seps) of a GPTConfig as the attention understands them: `full` is an endless window."""
    if config.attn == "full":
        return 1 << 30, 0, 0
    return config.window, config.sinks, 0 if config.attn == "stream" else config.max_seps


def is_kept(ids, positions, config):
    """Which tokens stay visible after they leave the window: ids (B, T), positions (T,) -> bool (B, T)."""
    kept = (positions < reach(config)[1]).expand(ids.shape)
    if config.attn == "fixed":
        kept = kept | (positions % config.fixed_every == 0)
    elif config.attn == "sep":
        for separator in config.separators:  # compared one by one: a table of ids would have to be copied to the GPU
            kept = kept | (ids == separator)
    return kept


def far_list(kept, window, n_queries):
    """The far list of M rows and, for the queries at the last `n_queries` of them, how much of it they have behind them.

    kept (B, M) bool -> far (B, M) int32: indices of the kept rows in order, padded with 0; n_far (B, n_queries) int32:
    how many of them are at least `window` rows before the query. Static shapes, no device synchronisation.
    """
    B, M = kept.shape
    rank = kept.cumsum(1)  # (B, M) kept rows up to and including each row
    rows = torch.arange(M, dtype=torch.int32, device=kept.device).expand(B, M)
    far = rows.new_zeros(B, M + 1).scatter_(1, torch.where(kept, rank - 1, M), rows)[:, :M]  # column M takes the rest
    n_far = F.pad(rank, (min(window, M), 0))[:, M - n_queries:M]  # rank[row - window], 0 before the start
    return far.contiguous(), n_far.to(torch.int32).contiguous()


def far_layout(ids, config):
    """The attention layout of whole texts, computed once per forward and shared by all layers (DESIGN: the mask).

    ids (B, T) integer -> far (B, T) int32, the positions of the kept tokens in order, padded with 0;
    n_far (B, T) int32, how many of them have left the window of each query.
    """
    positions = torch.arange(ids.shape[1], device=ids.device)
    return far_list(is_kept(ids, positions, config), reach(config)[0], ids.shape[1])


class SepCache:
    """Keys and values of the sinks, of the latest `max_seps` separators beyond the window, and of the window.

    Rows of each layer, (B, H, rows, D): `far_room` slots for far tokens, of which row b fills the first `n_far[b]`, then
    the last `window - 1` tokens. A forward attends over [cached rows | new rows]; then one gather per layer, with indices
    computed once, keeps what the next token can still see. Memory is fixed from the start, except where the mask itself
    has no bound (`max_seps=None`, or `attn="full"`, an ordinary cache): there the room doubles when it is full.

    config: a GPTConfig; batch_size: rows, each with its own separators; dtype: of keys and values, default float32.
    Attributes: `n_tokens` (int) seen so far, `nbytes` (int) held, `n_rows` (float) rows in use per sequence.
    """

    def __init__(self, config, batch_size=1, device=None, dtype=None):
        self.config, self.batch_size = config, batch_size
        self.window, self.sinks, self.max_seps = reach(config)
        self.full = config.attn == "full"
        self.far_room = self.sinks + (64 if self.max_seps is None else self.max_seps)
        near = 0 if self.full else self.window - 1
        self.kv = torch.zeros(config.n_layer, 2, batch_size, config.n_head, self.far_room + near,
                              config.n_embd // config.n_head, device=device, dtype=dtype)
        self.n_far = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.near_kept = torch.zeros(batch_size, near, dtype=torch.bool, device=device)
        self.position = torch.zeros((), dtype=torch.int64, device=device)  # n_tokens, where a captured step can read it
        self.n_tokens = 0

    @property
    def nbytes(self):
        return self.kv.nbytes + self.n_far.nbytes + self.near_kept.nbytes + self.position.nbytes

    def nbytes_of(self, rows):
        """Bytes of keys and values of so many rows per sequence."""
        return self.kv[..., :1, :].nbytes * rows if self.kv.shape[4] else 0

    @property
    def n_rows(self):
        return self.n_far.float().mean().item() + min(self.n_tokens, self.window - 1)

    @property
    def is_static(self):
        """Whether no shape will change any more: the window is full, and the mask is bounded."""
        return not self.full and self.max_seps is not None and self.n_tokens >= self.window - 1

    def _grow(self, rows):
        bigger = self.kv.new_zeros(*self.kv.shape[:4], rows, self.kv.shape[5])
        bigger[..., :self.kv.shape[4], :] = self.kv
        self.kv = bigger

    def advance(self, ids):
        """Take in new tokens ids (B, T): returns their positions (T,) and (far, n_far), the layout of their queries over
        [cached rows | new rows], None for `full`, and decides which rows survive. `extend` must follow once for each layer.
        ValueError if B is not the cache's batch size."""
        (B, T), device = ids.shape, ids.device
        if B != self.batch_size:
            raise ValueError(f"this cache holds {self.batch_size} sequences, and got ids of {B}")
        near, next_near = (min(n, self.window - 1) for n in (self.n_tokens, self.n_tokens + T))
        far_room = self.far_room if near == self.window - 1 else 0  # before, nothing is far, and slots would look near
        self.cached = slice(self.far_room - far_room, self.far_room + near)  # what `extend` puts before the new rows
        positions = self.position + torch.arange(T, device=device)
        self.position += T
        self.n_tokens += T
        if self.full:  # nothing ever leaves: append in place
            if self.n_tokens > self.kv.shape[4]:
                self._grow(max(self.n_tokens, 2 * self.kv.shape[4]))
            return positions, None

        slots = torch.arange(self.far_room, device=device)
        kept = torch.cat([slots[:far_room] < self.n_far[:, None], self.near_kept[:, :near],
                          is_kept(ids, positions, self.config)], dim=1)  # (B, M)
        M = kept.shape[1]
        far, n_far = far_list(kept, self.window, T)
        n_next = kept[:, :M - next_near].sum(1)  # far entries of the next token
        if self.max_seps is None:
            most = int(n_next.max())
            if most > self.far_room:
                self.far_room = max(most, 2 * self.far_room)
                self._grow(self.far_room + self.near_kept.shape[1])
                slots = torch.arange(self.far_room, device=device)
            entries = slots.expand(B, -1)
        else:  # sinks, then the latest max_seps: entries between them are never seen again
            skipped = (n_next - self.far_room).clamp(min=0)[:, None]
            entries = torch.where(slots < self.sinks, slots, slots + skipped)
        self.survivors = torch.cat([far.long().gather(1, entries.clamp(max=M - 1)),
                                    torch.arange(M - next_near, M, device=device).expand(B, -1)], dim=1)
        self.n_far.copy_(n_next.clamp(max=self.far_room))
        self.near_kept[:, :next_near] = kept[:, M - next_near:]
        return positions, (far, n_far)

    def extend(self, layer, k, v):
        """New keys and values (B, H, T, D) of one layer -> those of [cached rows | new rows], each (B, H, M, D)."""
        store, new = self.kv[layer], torch.stack([k, v])
        if self.full:
            store[..., self.n_tokens - k.shape[2]:self.n_tokens, :] = new
            return store[..., :self.n_tokens, :].unbind(0)
        rows = torch.cat([store[..., self.cached, :], new], dim=3)  # (2, B, H, M, D)
        index = self.survivors[None, :, None, :, None].expand(2, -1, rows.shape[2], -1, rows.shape[4])
        store[..., :index.shape[3], :] = rows.gather(3, index)
        return rows.unbind(0)


def draw(text, config):
    """The attention map of a text (str) and the cache's contents after each token, as printable lines."""
    ids = torch.tensor([list(text.encode())])  # (1, T)
    T = ids.shape[1]
    far, n_far = (x[0].tolist() for x in far_layout(ids, config))
    window, sinks, max_seps = reach(config)
    # the real cache, with each token's position for its key: what it holds can be read back
    cache = SepCache(config, dtype=torch.float64)
    names = [c if c.isprintable() else "⏎" if c == "\n" else "·" for c in map(chr, ids[0].tolist())]
    lines = [f"attention map, one row a query: █ window  ▓ separator  ▒ sink  · hidden    "
             f"(attn {config.attn}, window {config.window}, sinks {config.sinks}, max_seps {config.max_seps})",
             "", " " * 6 + "".join(names) + "   the cache after this token: sinks and separators | window"]
    for i in range(T):
        entries = far[:n_far[i]]
        seps = entries[max(sinks, n_far[i] - (T if max_seps is None else max_seps)):]
        row = "".join("█" if 0 <= i - j < window else "▒" if j in entries[:sinks] else "▓" if j in seps else
                      "·" if j <= i else " " for j in range(T))
        cache.advance(ids[:, i:i + 1])
        cache.extend(0, *torch.full((2, 1, 1, 1, 2), float(i), dtype=torch.float64))
        held = cache.kv[0, 0, 0, 0, :, 0].long().tolist()
        used, near = int(cache.n_far), min(i + 1, window - 1)
        near_rows = held[cache.far_room:cache.far_room + near]
        show = ["".join(names[j] for j in part) for part in (held[:used], near_rows)]
        lines.append(f"{i:4} {names[i]}{row}   {show[0]} | {show[1]}")
    return lines


def main():
    from model import GPTConfig  # here, because they import this file
    from train import Parser
    parser = Parser(description="Draw the attention map of a text, and the cache after each of its tokens.")
    parser.add_argument("text", help="the text, 1 to 200 bytes")
    parser.add_config(GPTConfig, ("attn", "window", "sinks", "max_seps", "fixed_every"), "window 8, sinks 2, else GPTConfig's")
    args = dict(window=8, sinks=2) | vars(parser.parse_args())
    text = args.pop("text")
    if not 1 <= len(text.encode()) <= 200:
        parser.error(f"the text has {len(text.encode())} bytes; a map can show 1 to 200")
    try:
        config = GPTConfig(n_layer=1, n_head=1, n_embd=2, **args)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.reconfigure(encoding="utf-8")
    print("\n".join(draw(text, config)))


if __name__ == "__main__":
    main()
