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
    return _slot_attention(q, k, v, layout, q_sink)


def _slot_attention(q, k, v, layout, q_sink):
    """A decoding step: q, q_sink (B, H, 1, D) over all slots of a cache, k, v (B, H_kv, n_slots, D)."""
    B, H, _, D = q.shape
    q = q.view(B, k.shape[1], -1, D)  # the heads that share keys are queries of one head
    if q_sink is None:
        scores = q @ k.mT  # (B, H_kv, group, n_slots)
    else:
        n = layout.n_sinks
        q_sink = q_sink.view(q.shape)
        scores = torch.cat([q_sink @ k[:, :, :n].mT, q @ k[:, :, n:].mT], dim=-1)
    scores = (scores * D ** -0.5).masked_fill(~layout.visible, -torch.inf)
    return (scores.softmax(-1) @ v).view(B, H, 1, D)


def _attention_torch(q, k, v, layout, window, sinks, q_sink):
    far, start, stop = layout
    (Tq, D), Tk, (B, S) = q.shape[2:], k.shape[2], far.shape
    start, stop = start[:, :, None], stop[:, :, None]  # (B, Tq, 1)
    ahead = torch.arange(Tk - Tq, Tk, device=q.device)[:, None] - torch.arange(Tk, device=q.device)  # (Tq, Tk)
    entry = torch.arange(S, device=q.device).expand(B, S)
    rows = torch.where(entry < stop[:, -1], far, Tk).long()
    entry = entry.new_full((B, Tk + 1), S).scatter_(1, rows, entry)[:, None, :Tk]  # (B, 1, Tk), S where nothing becomes far
    sink = (entry < stop) & (entry < sinks)  # (B, Tq, Tk)
    sep = (entry < stop) & (entry >= start)
    visible = ((0 <= ahead) & (ahead < window) | sink | sep)[:, None]  # (B, 1, Tq, Tk)
    if q_sink is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    scores = torch.where(sink[:, None], q_sink @ k.mT, q @ k.mT) * D ** -0.5  # (B, H, Tq, Tk)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v
