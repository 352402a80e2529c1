"""Attention over "far list + window" (temporary: the Triton part joins again in a later commit)."""
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from sep_cache import SepLayout


def sep_attention(q, k, v, layout, window, sinks=0, q_sink=None, impl="auto"):
    return _attention_torch(q, k, v, layout, window, sinks, q_sink)


def attend(q, k, v, layout, config, q_sink=None):
    """The attention of one layer, whatever the configuration and the cache ask for.

    q, q_sink (B, H, Tq, D); k, v (B, H_kv, Tk, D), H a multiple of H_kv (grouped-query attention: H / H_kv heads share
    keys and values); layout: None, a SepLayout or a SlotLayout. Returns (B, H, Tq, D).
    """
    B, H, Tq, D = q.shape
    group = H // k.shape[1]
    if layout is None:  # attn="full"
        Tk = k.shape[2]
        causal = causal_lower_right(Tq, Tk) if 1 < Tq < Tk else None
        return F.scaled_dot_product_attention(q, k, v, causal, is_causal=Tq == Tk, enable_gqa=group > 1)
    if isinstance(layout, SepLayout):
        if group > 1:
            k = k.repeat_interleave(group, dim=1)
            v = v.repeat_interleave(group, dim=1)
        return sep_attention(q, k, v, layout, config.window, config.sinks, q_sink)
    return F.scaled_dot_product_attention(q, k, v, layout.mask, enable_gqa=group > 1)


# ---- plain PyTorch: blocks of queries, each over the few keys that it can see


BLOCK = 64  # queries; larger blocks share more keys, and mask more of them


def _attention_torch(q, k, v, layout, window, sinks, q_sink):
    """`sep_attention` without Triton, for CPUs and Apple GPUs, in any dtype: time and memory are linear in T.

    The queries are cut into blocks. A block's keys are [sinks | its part of the far list | the window's rows], gathered
    for all blocks at once and padded to the longest; then it is one dense attention per block, with a small mask.
    """
    B, H, Tq, D = q.shape
    rows, visible = _keys_of_blocks(layout, window, sinks, Tq, Tk=k.shape[2])  # (B, N, M), (B, N, BLOCK, M)
    _, N, M = rows.shape
    visible = visible.flatten(0, 1)[:, None]  # (B N, 1, BLOCK, M)

    def block_queries(x):
        x = F.pad(x, (0, 0, 0, N * BLOCK - Tq))
        return x.view(B, H, N, BLOCK, D).transpose(1, 2).reshape(B * N, H, BLOCK, D)

    def block_keys(x):
        x = x.transpose(1, 2).flatten(2).flatten(0, 1)  # (B Tk, H D)
        x = x.index_select(0, rows.flatten())  # its gradient adds up whole rows, which is fast
        return x.view(B * N, M, H, -1).transpose(1, 2)  # (B N, H, M, D)

    q, k, v = block_queries(q), block_keys(k), block_keys(v)
    if q_sink is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    else:
        n_sinks = min(sinks, layout.far.shape[1])  # the first keys of each block
        sink_scores = block_queries(q_sink) @ k[:, :, :n_sinks].mT
        scores = torch.cat([sink_scores, q @ k[:, :, n_sinks:].mT], dim=-1) * D ** -0.5
        out = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v
    out = out.view(B, N, H, BLOCK, -1).transpose(1, 2)  # (B, H, N, BLOCK, D)
    return out.flatten(2, 3)[:, :, :Tq]


def _keys_of_blocks(layout, window, sinks, Tq, Tk):
    """The key rows of each block of queries, rows (B, N, M) counted through the whole batch, and which of them each of
    its queries sees, visible (B, N, BLOCK, M)."""
    far, start, stop = layout
    B, S = far.shape
    N = -(-Tq // BLOCK)
    device = far.device
    query = torch.arange(N * BLOCK, device=device).clamp(max=Tq - 1).view(N, BLOCK)  # those past the end repeat the last
    query_row = Tk - Tq + query

    # the far entries: the sinks, and from the first that the block's first query sees to the last of its last query
    first = start[:, query[:, 0]].long()  # (B, N)
    last = stop[:, query[:, -1]].long()
    longest = (last - first).max().clamp(min=0).item()
    sink_entries = torch.arange(min(sinks, S), device=device).expand(B, N, -1)
    range_entries = first[:, :, None] + torch.arange(longest, device=device)
    entries = torch.cat([sink_entries, range_entries], dim=-1)  # (B, N, E)
    far_rows = far.gather(1, entries.clamp(max=S - 1).flatten(1)).view(entries.shape)
    entry = entries[:, :, None]  # (B, N, 1, E)
    start = start[:, query, None]  # (B, N, BLOCK, 1)
    stop = stop[:, query, None]
    far_visible = (entry < stop) & ((entry < sinks) | (entry >= start))

    # the window's rows, of all queries of the block
    width = min(window + BLOCK - 1, Tk)
    near_first = (query_row[:, -1] - width + 1).clamp(min=0)  # (N,)
    near_rows = near_first[:, None] + torch.arange(width, device=device)  # (N, width)
    distance = query_row[:, :, None] - near_rows[:, None]  # (N, BLOCK, width)
    near_visible = (distance >= 0) & (distance < window)

    rows = torch.cat([far_rows, near_rows.expand(B, -1, -1)], dim=-1)
    sequence = torch.arange(B, device=device)[:, None, None]
    visible = torch.cat([far_visible, near_visible.expand(B, -1, -1, -1)], dim=-1)
    return sequence * Tk + rows, visible
