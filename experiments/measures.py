"""The arithmetic behind the results: costs, losses, attention by kind of key, mentions of words.

Nothing here trains, prints or draws. `results.py` asks the questions, `figures.py` draws the
answers.
"""
import re
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from model import ROPE_BASE, apply_rope, norm, rope_cos_sin, rope_frequencies
from sep_cache import SepCache, far_layout, is_kept

# ---- costs


def keys_seen(ids, config):
    """How many keys each query sees: ids (B, T) -> (B, T) int64."""
    B, T = ids.shape
    n_so_far = torch.arange(1, T + 1).expand(B, T)
    if config.attn == "full":
        return n_so_far
    layout = far_layout(ids, config)
    n_sinks = layout.stop.clamp(max=config.sinks)
    n_far = (layout.stop - layout.start).clamp(min=0)
    return n_sinks + n_far + n_so_far.clamp(max=config.window)


def flops_per_token(model, mean_keys):
    """Of training: 6 per parameter, 12 per channel, layer and visible key (q k and p v, forward and
    backward)."""
    n_parameters = sum(weight.numel() for weight in model.parameters())
    return 6 * n_parameters + 12 * model.config.n_layer * model.config.n_embd * mean_keys


# ---- losses


def block_starts(tokens, block_size, n_blocks, record=1):
    """Where up to n_blocks texts of block_size + 1 tokens begin, evenly spaced: (N,) int64.

    record: they begin at multiples of this many tokens.
    """
    n_blocks = min(n_blocks, (len(tokens) - 1) // block_size)
    last_start = (len(tokens) - block_size - 1) // record
    return np.linspace(0, last_start, n_blocks).astype(np.int64) * record


def blocks_of(tokens, block_size, n_blocks, record=1):
    """The texts that begin at `block_starts`: (N, block_size + 1) int64."""
    starts = block_starts(tokens, block_size, n_blocks, record)
    blocks = np.stack([tokens[s:s + block_size + 1] for s in starts])
    return torch.from_numpy(blocks.astype(np.int64))


@torch.inference_mode()
def block_nats(model, tokens, n_blocks):
    """The loss of each token of independent texts of block_size tokens: (N, block_size) float32."""
    block_size = model.config.block_size
    nats = []
    for blocks in blocks_of(tokens, block_size, n_blocks).split(max(1, 4096 // block_size)):
        logits, _ = model(blocks[:, :-1])
        nats.append(F.cross_entropy(logits.transpose(1, 2), blocks[:, 1:], reduction="none"))
    return torch.cat(nats).numpy()


class Stream(NamedTuple):
    """A text read as one stream: what `stream_nats` returns."""

    nats: np.ndarray  # (n,) float32, loss of each token but the first
    seconds: np.ndarray  # of each chunk, CPU time
    n_keys: float  # that the last token sees
    mib: float  # of the cache at the end


@torch.inference_mode()
def stream_nats(model, tokens, chunk_size):
    """The Stream of a text: each token predicted from what the cache holds."""
    cache = SepCache(model.config)
    nats, seconds = [], []
    for first in range(0, len(tokens) - 1, chunk_size):
        start = time.process_time()
        ids = torch.from_numpy(tokens[first:first + chunk_size + 1].astype(np.int64))
        logits, _ = model(ids[None, :-1], cache=cache)
        nats.append(F.cross_entropy(logits[0], ids[1:], reduction="none").numpy())
        seconds.append(time.process_time() - start)
    mib = cache.nbytes / 2**20
    return Stream(np.concatenate(nats), np.array(seconds), cache.n_visible_keys, mib)


# ---- a forward pass whose attention can be looked at, and changed


@torch.inference_mode()
def forward_with(model, ids, attention):
    """Logits (B, T, V) of ids (B, T), with `attention(layer_idx, q, k, v)` for the model's own.

    q, k, v and the result: (B, H, T, D); q and k are normalised, and not yet rotated.
    """
    B, T = ids.shape
    config = model.config
    x = model.embed(ids)  # (B, T, C)
    for layer_idx, block in enumerate(model.blocks):
        qkv = block.attn.qkv(norm(x)).view(B, T, 3, config.n_head, config.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        y = attention(layer_idx, norm(q), norm(k), v)
        x = x + block.attn.out(y.transpose(1, 2).reshape(B, T, -1))
        x = x + block.mlp(norm(x))
    return F.linear(norm(x), model.embed.weight)


def probabilities(q, k, hidden=None):
    """Causal attention at the text's positions: q, k (B, H, T, D) -> (B, H, T, T).

    hidden: bool, broadcast to (B, H, T, T); True where a query must not see a key. Every query
    keeps its own key, whatever `hidden` says.
    """
    T, D = q.shape[2:]
    cos_sin = rope_cos_sin(torch.arange(T), rope_frequencies(D, ROPE_BASE, q.device), q.dtype)
    scores = apply_rope(q, cos_sin) @ apply_rope(k, cos_sin).mT * D**-0.5
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    if hidden is not None:
        visible = visible & ~(hidden & ~torch.eye(T, dtype=torch.bool))
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def attention_maps(model, ids):
    """The attention of every layer of a model with full attention: (n_layer, B, H, T, T)."""
    maps = []

    def attention(layer_idx, q, k, v):
        p = probabilities(q, k)
        maps.append(p)
        return p @ v

    forward_with(model, ids, attention)
    return torch.stack(maps)


def changed_nats(model, ids, hidden_keys=None, silent_heads=()):
    """The loss of each token of ids (B, T + 1) when heads lose keys: (B, T).

    hidden_keys: {(layer, head): bool, broadcast to (B, T, T)}. silent_heads: (layer, head) that
    output zero.
    """
    hidden_keys = hidden_keys or {}
    B, T = ids[:, 1:].shape

    def attention(layer_idx, q, k, v):
        here = {head: pairs for (layer, head), pairs in hidden_keys.items() if layer == layer_idx}
        hidden = None
        if here:
            hidden = torch.zeros(B, model.config.n_head, T, T, dtype=torch.bool)
            for head, pairs in here.items():
                hidden[:, head] = pairs
        y = probabilities(q, k, hidden) @ v
        for layer, head in silent_heads:
            if layer == layer_idx:
                y[:, head] = 0
        return y

    logits = forward_with(model, ids[:, :-1], attention)
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


# ---- attention by kind of key


def lift(p, far, kind):
    """How much more attention keys of one kind receive than their number: (H,).

    p (B, H, T, T) attention; far (T, T) bool: the pairs (query, key) that are looked at; kind (B,
    T) bool: which keys. The share of p on far pairs that goes to keys of the kind, over the share
    of the kind among the keys of far pairs: 1 if attention does not care about the kind.
    """
    far_kind = far & kind[:, None]  # (B, T, T)
    mass = (p * far).sum((0, 2, 3))  # (H,)
    mass_of_kind = (p * far_kind[:, None]).sum((0, 2, 3))
    share_of_keys = far_kind.sum() / (far.sum() * len(kind))
    return mass_of_kind / mass / share_of_keys


def far_pairs(T, distance, sinks=0):
    """The pairs (query, key) at `distance` or more, without keys that are sinks: (T, T) bool."""
    positions = torch.arange(T)
    far = positions[:, None] - positions >= distance
    return far & (positions >= sinks)


# ---- where far keys stand: four rules


FAR_RULES = ("text", "dropped", "clamped", "renumbered")


def rule_nats(model, tokens, rule, chunk_size=256):
    """The loss of each token of one text, (n,) float32, with its far separators elsewhere.

    text: where they are. dropped: where they are, and none at a distance of block_size or more;
    what the model does. clamped: at a distance of at most block_size - 1. renumbered: all visible
    keys are counted through, 0, 1, 2, ..., as the paper's streaming does in its cache. Except when
    renumbered, sinks are scored by a query at min(position, block_size - 1), as in the model.
    """
    config = model.config
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    T = ids.shape[1] - 1
    rows, distance, visible = visible_keys(ids[:, :-1], config, rule)  # (T, M) each
    frequencies = rope_frequencies(config.head_dim, ROPE_BASE, ids.device)

    def attention(layer_idx, q, k, v):
        y = torch.empty_like(v)
        for first in range(0, T, chunk_size):
            part = slice(first, min(first + chunk_size, T))
            keys = k[0][:, rows[part]]  # (H, t, M, D)
            # keys are rotated by -distance, so the query needs no rotation
            cos, sin = rope_cos_sin(-distance[part].flatten(), frequencies, k.dtype)
            shape = (*rows[part].shape, -1)
            keys = apply_rope(keys, (cos.view(shape), sin.view(shape)))
            scores = (keys @ q[0, :, part, :, None])[..., 0] * config.head_dim**-0.5  # (H, t, M)
            p = scores.masked_fill(~visible[part], -torch.inf).softmax(-1)
            y[0, :, part] = (p[:, :, None] @ v[0][:, rows[part]])[:, :, 0]
        return y

    logits = forward_with(model, ids[:, :-1], attention)
    return F.cross_entropy(logits[0], ids[0, 1:], reduction="none").numpy()


def visible_keys(ids, config, rule):
    """What each query of one text sees, oldest first: rows, distance, visible, each (T, M).

    ids (1, T). `distance`: at which the key is scored. Only the entries where `visible` holds
    count.
    """
    T = ids.shape[1]
    position = torch.arange(T)
    kept = is_kept(ids, position, config)[0]
    separators = [j for j in range(config.sinks, T) if kept[j]]
    # how many have left the window of each query
    n_left = torch.searchsorted(torch.tensor(separators), position - config.window, right=True)
    n_seps = config.max_seps if config.max_seps is not None else int(n_left.max())
    M = config.sinks + n_seps + config.window
    rows = torch.zeros(T, M, dtype=torch.int64)
    visible = torch.zeros(T, M, dtype=torch.bool)
    for i in range(T):
        near = list(range(max(i - config.window + 1, 0), i + 1))
        sinks = list(range(min(config.sinks, near[0])))
        far = separators[max(int(n_left[i]) - n_seps, 0):int(n_left[i])]
        if rule == "dropped":
            far = [j for j in far if i - j < config.block_size]
        seen = sinks + far + near
        rows[i, :len(seen)] = torch.tensor(seen)
        visible[i, :len(seen)] = True
    if rule == "renumbered":
        distance = visible.sum(1, keepdim=True) - 1 - torch.arange(M)
    else:
        distance = position[:, None] - rows
        is_sink = (rows < config.sinks) & (distance >= config.window)
        sink_distance = position.clamp(max=config.block_size - 1)[:, None] - rows
        distance = torch.where(is_sink, sink_distance, distance)
        if rule == "clamped":
            distance = distance.clamp(max=config.block_size - 1)
    return rows, distance.clamp(min=0), visible


# ---- mentions


def mention_distances(text, least_length=4, names_only=False):
    """How far back the last mention of a byte's word lies: `text`, n bytes -> (n,) int64.

    Counts the bytes of a word after its first two, which narrow it down. 0: the first mention;
    -1: not counted. names_only: words that begin with a capital and never stand without it.
    """
    words = list(re.finditer(rb"[A-Za-z]+", text))
    written = {word.group() for word in words}
    distances = np.full(len(text), -1, dtype=np.int64)
    last = {}
    for word in words:
        name = word.group()
        if len(name) < least_length:
            continue
        is_name = name[:1].isupper() and name[1:].islower() and name.lower() not in written
        if is_name or not names_only:
            distances[word.start() + 2:word.end()] = word.start() - last.get(name, word.start())
        last[name] = word.start()
    return distances


def fact_distances(ids, answers):
    """From each value to the value of the same key's last mention: ids (N, T) -> (N, T).

    The ledger of `data/prepare.py --source recall`: a value stands after its key. 0: no mention.
    """
    is_value = torch.isin(ids, torch.tensor(answers))
    distance = torch.zeros_like(ids)
    for n, text in enumerate(ids.tolist()):
        last = {}  # where the last value of a key stands
        for t in is_value[n].nonzero()[:, 0].tolist():
            key = text[t - 1]
            distance[n, t] = t - last.get(key, t)
            last[key] = t
    return distance


# ---- small statistics


def mean_and_error(differences, chosen=None, n_stretches=20):
    """Mean of the chosen (n,) of the differences (n,), and its standard error.

    Neighbours in a text are not independent: the error is taken over n_stretches equal parts of it.
    """
    if chosen is None:
        chosen = np.ones(len(differences), dtype=bool)
    mean = differences[chosen].mean(dtype=np.float64)
    residuals = np.where(chosen, differences - mean, 0)
    sums = np.array([stretch.sum() for stretch in np.array_split(residuals, n_stretches)])
    variance = (sums**2).sum() * n_stretches / (n_stretches - 1)
    return float(mean), float(variance**0.5 / chosen.sum())
