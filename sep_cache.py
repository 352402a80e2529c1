"""The bounded key/value cache: keys and values of what the next tokens can still see.

The one idea: **a bounded cache has a constant shape.** A key whose reach is over is never seen
again, since every key is seen by one unbroken range of queries (`sep_mask.py`). So a fixed number
of rows is enough for a text of any length, and new tokens are written into rows that are free.
Decoding a token is then the same work on the same memory, every time. It can be recorded once and
replayed (`RecordedStep` in `model.py`).

Rows hold keys in the order of the text. The example of `sep_mask.py`, `a,b.cd` with window 2 and 1
sink, in six rows, before and after room is made for a seventh token. (A real cache has 64 rows or
more.)

    row         0  1  2  3  4  5                    0  1  2  3  4  5
    token       a  ,  b  .  c  d                    a  .  c  d
    position    0  1  2  3  4  5                    0  3  4  5  empty
    seen by d   x        x  x  x                    next_row is 4

Softmax does not depend on the order of its keys, so attention is dense over all rows, with a mask:
rows that are hidden or empty have the weight 0. Next: `model.py`.
"""
import torch

import sep_mask
from sep_mask import FOREVER, key_reach, visible

SPARE_ROWS = 16  # free rows after hidden ones have been dropped, at least
EMPTY = -2 * FOREVER  # the position of a row that holds no token: no reach is so long


class SepCache:
    """Keys and values of `batch_size` texts, in rows. For inference: no gradient flows through it.

    config: a GPTConfig, or a SepConfig with n_layer, n_head, n_kv_head and head_dim. dtype: of keys
    and values, default float32.

    New tokens are read by four calls. `make_room` is work of the host: it counts tokens, and drops
    hidden rows where there is no room. `advance`, in each layer `update`, and `take_in` are work of
    the device alone. Their shapes and addresses stay the same as long as `row_position` is the same
    tensor.

    **The promise**: up to rounding, the logits do not depend on how a text is split into chunks.
    Up to block_size they are those of one forward over the whole text. Each sequence of a batch has
    its own separators; rows that one with fewer visible keys does not need stay empty.

    Costs for a text of T tokens, with w = window, and c = the most other tokens that are visible at
    once, sinks + max_seps or, where that is less, sinks + block_size - window:

        |          | full    | sep, streamingllm, fixed |
        | training | T^2 / 2 | T (w + c) at most        | visible pairs of query and key
        | decoding | T       | w + c at most            | visible keys of a token
        | cache    | T       | w + c at most            | rows, and spare ones

    New buffers have a row for each visible key, a quarter more, and rows for the new chunk (16 or
    more), up to the next multiple of 64: while decoding with 52 visible keys, 128. Buffers are
    replaced where they are too small, or more than twice as large as new ones. Attention is dense
    over all rows, so a chunk of a prompt costs its tokens times these.

    With attn="full" no row is ever hidden, so nothing is dropped, and the cache grows.
    """

    @torch.inference_mode(False)  # else only code in inference mode could write to the tensors
    def __init__(self, config, batch_size=1, device=None, dtype=None):
        self.config = config
        self.separators = torch.tensor(config.separators, device=device)
        # upper bounds, for the host: make_room counts tokens before they are read
        self.n_rows = 0  # in use
        self.n_tokens_asked = 0
        self.past_horizon = False  # whether some distance is block_size or more
        # known to the device
        self.next_row = torch.zeros(1, dtype=torch.int64, device=device)
        self.next_position = torch.zeros(1, dtype=torch.int64, device=device)
        # keys, values, keys, values, ... of the layers, each (B, H, M, D) with memory of its own:
        # torch.compile copies the whole tensor where a part of it is written
        empty = torch.zeros(batch_size, config.n_kv_head, 0, config.head_dim,
                            device=device, dtype=dtype)
        self.kv = [empty] * 2 * config.n_layer
        self.row_position = self.next_row.new_zeros(batch_size, 0)
        self.row_kept = self.row_position.bool()

    @property
    def n_tokens(self):
        """How many tokens have been taken in."""
        return self.next_position.item()

    @property
    def row_visible(self):
        """Which rows the latest query sees, (B, M) bool. Later queries see no others of these."""
        return self._visible_rows(self.next_position - 1)[:, 0]

    def _visible_rows(self, positions):
        """Which rows the queries at these positions (T,) see, (B, T, M) bool."""
        reach = key_reach(self.row_kept, self.row_position, self.config)
        return visible(positions, self.row_position, reach)

    def make_room(self, T):
        """Let T new tokens fit, before `advance`. Asks the device for a number once in 16 tokens or
        more, and replaces the buffers only where they are too small or far too large."""
        _, capacity = self.row_position.shape
        if self.n_rows + T > capacity:
            self._drop_hidden_rows(T)
        self.n_rows += T
        self.n_tokens_asked += T
        self.past_horizon = (self.config.attn != "full"
                             and self.n_tokens_asked > self.config.block_size)

    def advance(self, ids):
        """Who sees whom, for new tokens ids (B, T).

        Returns their positions (T,) and a mask over the M rows that `update` returns: 0 where a
        query sees a row, else -inf. The mask is (B, 1, G T, M): the T queries are repeated for each
        of the G = n_head / n_kv_head heads that share a head of keys. Give long texts in chunks,
        say of 512 tokens, since the mask is so large. RuntimeError if B is not the cache's batch
        size.
        """
        _, T = ids.shape
        offset = torch.arange(T, device=ids.device)
        positions = self.next_position + offset
        self.new_rows = self.next_row + offset
        self.row_position.index_copy_(1, self.new_rows, positions.expand_as(ids))
        kept = sep_mask.is_kept(ids, positions, self.config, self.separators)
        self.row_kept.index_copy_(1, self.new_rows, kept)
        seen = self._visible_rows(positions)[:, None]  # (B, 1, T, M)
        n_shared = self.config.n_head // self.config.n_kv_head
        mask = torch.where(seen.expand(-1, n_shared, -1, -1), 0.0, -torch.inf)
        return positions, mask.flatten(1, 2)[:, None].to(self.kv[0].dtype)

    @torch.no_grad()
    def update(self, k, v, layer_idx):
        """Store a layer's new keys and values (B, H, T, D); return those of all rows (B, H, M, D).

        RuntimeError if k is not of the cache's dtype.
        """
        keys, values = self.kv[2 * layer_idx:2 * layer_idx + 2]
        return keys.index_copy_(2, self.new_rows, k), values.index_copy_(2, self.new_rows, v)

    def take_in(self, T):
        """The T new tokens have gone through all layers: from now on they are part of the text.

        If a forward fails before this call, the cache is as it was. What has been written then lies
        at positions in the future, hidden, until it is written again.
        """
        self.next_row += T
        self.next_position += T

    @torch.inference_mode(False)
    def _drop_hidden_rows(self, n_new):
        """Move the rows that the latest query sees to the front, in order; let n_new more fit.

        In a batch the sequence with the most visible rows says how many stay. The sinks, which are
        the first rows of the text and never dropped, stay the first rows of the cache.
        """
        seen = self.row_visible
        n_seen = int(seen.sum(1).max())
        order = seen.byte().argsort(dim=1, descending=True, stable=True)[:, :n_seen]
        # what a sequence with fewer visible rows has after them becomes empty
        position = self.row_position.where(seen, EMPTY).gather(1, order)
        kept = self.row_kept.gather(1, order)

        needed = n_seen + max(n_new, SPARE_ROWS)
        new_size = (needed + n_seen // 4) // 64 * 64 + 64
        B, capacity = seen.shape
        is_replaced = needed > capacity or 2 * new_size < capacity
        if is_replaced:
            self.row_position = position.new_zeros(B, new_size)
            self.row_kept = kept.new_zeros(B, new_size)
        self.row_position.fill_(EMPTY)[:, :n_seen] = position
        self.row_kept[:, :n_seen] = kept
        for i, rows in enumerate(self.kv):  # one by one, so that few are in memory twice
            seen_rows = rows.take_along_dim(order[:, None, :, None], dim=2)
            if is_replaced:
                _, H, _, D = rows.shape
                self.kv[i] = rows = rows.new_zeros(B, H, new_size, D)
            rows[:, :, :n_seen] = seen_rows
        self.next_row.fill_(n_seen)
        self.n_rows = n_seen
