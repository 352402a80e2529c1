"""The bounded key/value cache: keys and values of what the next tokens can still see.

The one idea: **a bounded cache has a constant shape.** A key whose reach is over is never seen
again, since every key is seen by one unbroken range of queries (`sep_mask.py`). So a fixed number
of rows is enough for a text of any length, new tokens are written into rows that are free, and
decoding a token is the same work on the same memory, every time: it can be recorded once and
replayed (`RecordedStep` in `model.py`).

Rows hold keys in the order of the text. The example of `sep_mask.py`, `a,b.cd` with window 2 and 1
sink, in six rows (spare ones left out), before and after room is made for a seventh token:

    row         0  1  2  3  4  5                    0  1  2  3  4  5
    token       a  ,  b  .  c  d                    a  .  c  d
    position    0  1  2  3  4  5                    0  3  4  5  empty
    seen by d   x        x  x  x                    next_row is 4

Softmax does not depend on the order of its keys, so attention is dense over all rows, with a mask:
rows that are hidden or empty have the weight 0. Next: `model.py`.
"""
import torch

from sep_mask import FOREVER, is_kept, key_reach

SPARE_ROWS = 16  # free after hidden rows have been dropped, at least
EMPTY = -2 * FOREVER  # the position of an empty row, further away than any reach


class SepCache:
    """Keys and values of `batch_size` texts, in rows. For inference: no gradient flows through it.

    config: a GPTConfig, or any SepConfig that has n_layer, n_kv_head and head_dim, too. dtype: of
    keys and values, default float32.

    New tokens are read by four calls. `make_room` is work of the host: it counts tokens, and drops
    hidden rows where there is no room. `advance`, in each layer `update`, and `take_in` are work of
    the device alone, of the same shapes and addresses as long as `row_position` is the same tensor.

    **The promise**: up to rounding, the logits do not depend on how a text is split into chunks,
    and up to block_size they are those of one forward over the whole text. Each sequence of a batch
    has its own separators; rows that one with fewer visible keys does not need stay empty.

    Costs for a text of T tokens, with w = window, and c = the most other tokens that are visible at
    once, sinks + max_seps or, where that is less, sinks + block_size - window:

        |                   | full    | sep, streamingllm, fixed |
        | training, prefill | T^2 / 2 | T (w + c) at most        | visible pairs of query and key
        | decoding          | T       | w + c at most            | visible keys of a token
        | cache             | T       | w + c at most            | rows, and spare ones

    The spare rows are an eighth and, if more than another eighth, those of a chunk, in steps of 64;
    after long chunks up to twice as many rows stay.

    With attn="full" no row is ever hidden, so nothing is dropped, and the cache grows.
    """

    @torch.inference_mode(False)  # else only code in inference mode could write to the tensors
    def __init__(self, config, batch_size=1, device=None, dtype=None):
        self.config = config
        # upper bounds, known to the host; a forward that fails leaves them too large, harmlessly
        self.n_rows = 0  # in use
        self.n_asked = 0  # tokens that room was made for
        self.past_horizon = False  # some distance is block_size or more
        # known to the device
        self.next_row = torch.zeros(1, dtype=torch.int64, device=device)
        self.next_position = torch.zeros(1, dtype=torch.int64, device=device)
        # tensors of their own: for a write into a larger one torch.compile would copy all of it
        empty = torch.zeros(batch_size, config.n_kv_head, 0, config.head_dim,  # (B, H, M, D)
                            device=device, dtype=dtype)
        self.kv = [empty] * 2 * config.n_layer  # keys, values, keys, values, ...
        self._resize(0)

    @torch.inference_mode(False)
    def _resize(self, n_rows):
        """New buffers of so many empty rows."""
        B, H, _, D = self.kv[0].shape
        self.kv = [x.new_zeros(B, H, n_rows, D) for x in self.kv]
        self.row_position = self.next_row.new_full((B, n_rows), EMPTY)
        self.row_kept = torch.zeros_like(self.row_position, dtype=torch.bool)

    @property
    def n_tokens(self):
        """How many tokens have been taken in."""
        return self.next_position.item()

    @property
    def nbytes(self):
        """Bytes of keys and values."""
        return sum(x.nbytes for x in self.kv)

    @property
    def row_visible(self):
        """Which rows the latest query sees, (B, M) bool; no later query sees any other of them."""
        return self._visible_rows(self.next_position - 1)[:, 0]

    def _visible_rows(self, positions):
        """Which rows the queries at these positions (T,) see, (B, T, M) bool."""
        distance = positions[:, None] - self.row_position[:, None]
        reach = key_reach(self.row_kept, self.row_position, self.config)
        return (0 <= distance) & (distance < reach[:, None])

    def make_room(self, T):
        """Let T new tokens fit, before `advance`. Asks the device for a number once in 16 tokens or
        more, and replaces the buffers only where they are too small or far too large."""
        if self.n_rows + T > self.row_position.shape[1]:
            self._drop_hidden_rows(T)
        self.n_rows += T
        self.n_asked += T
        is_longer = self.n_asked > self.config.block_size
        self.past_horizon = is_longer and self.config.attn != "full"

    def advance(self, ids):
        """Who sees whom, for new tokens ids (B, T).

        Returns their positions (T,) and the mask (B, 1, T, M) of their queries over the M rows that
        `update` returns: 0 where a query sees a row, else -inf. Memory is T x M: give long texts in
        chunks, say of 512 tokens. RuntimeError if B is not the cache's batch size.
        """
        B, T = ids.shape
        offset = torch.arange(T, device=ids.device)
        positions = self.next_position + offset
        self.new_rows = self.next_row + offset
        self.row_position.index_copy_(1, self.new_rows, positions.expand(B, T))
        self.row_kept.index_copy_(1, self.new_rows, is_kept(ids, positions, self.config))
        visible = self._visible_rows(positions)
        mask = torch.where(visible, 0.0, -torch.inf).to(self.kv[0].dtype)
        return positions, mask[:, None]

    @torch.no_grad()
    def update(self, k, v, layer_idx):
        """Store a layer's new keys and values (B, H, T, D); return those of all rows (B, H, M, D).

        RuntimeError if k is not of the cache's dtype.
        """
        keys, values = self.kv[2 * layer_idx:2 * layer_idx + 2]
        keys.index_copy_(2, self.new_rows, k)
        values.index_copy_(2, self.new_rows, v)
        return keys, values

    def take_in(self, T):
        """The T new tokens have gone through all layers. If a forward fails before, their rows lie
        in the future, hidden, until they are written again."""
        self.next_row += T
        self.next_position += T

    def _drop_hidden_rows(self, n_new):
        """Move the rows that the latest query sees to the front, in order; let n_new more fit.

        In a batch the sequence with the most visible rows says how many stay. The sinks, which are
        the first rows of the text and never dropped, stay the first rows of the cache.
        """
        visible = self.row_visible
        n_visible = int(visible.sum(1).max())
        # what a sequence with fewer visible rows has after them is hidden, so it becomes empty
        order = visible.byte().argsort(dim=1, descending=True, stable=True)[:, :n_visible]
        position = self.row_position.where(visible, EMPTY).gather(1, order)
        kept = (self.row_kept & visible).gather(1, order)
        kv = [x.take_along_dim(order[:, None, :, None], dim=2) for x in self.kv]

        needed = n_visible + max(n_new, SPARE_ROWS, n_visible // 8)
        _, capacity = visible.shape
        # an eighth more than needed: else a growing cache would be resized at each drop
        new_size = (needed + n_visible // 8) // 64 * 64 + 64
        if needed > capacity or new_size < capacity / 2:
            self._resize(new_size)
        for buffer, rows in zip(self.kv, kv):
            buffer[:, :, :n_visible] = rows
        self.row_position.fill_(EMPTY)[:, :n_visible] = position
        self.row_kept.zero_()[:, :n_visible] = kept
        self.next_row.fill_(n_visible)
        self.n_rows = n_visible


make_cache = SepCache  # what a model calls for an empty one
