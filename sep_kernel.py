"""sep attention reference draft"""
import torch
import torch.nn.functional as F


def sep_attention_reference(q, k, v, far, n_far, window, sinks=0, max_seps=None, q_sink=None):
    (B, H, Tq, D), (Tk, S) = q.shape, (k.shape[2], far.shape[1])
    rows = torch.arange(Tk, device=q.device)
    ahead = torch.arange(Tk - Tq, Tk, device=q.device)[:, None] - rows  # (Tq, Tk)
    entries = torch.arange(S, device=q.device).expand(B, S)
    slots = torch.where(entries < n_far[:, -1:], far.long(), Tk)
    rank = entries.new_full((B, Tk + 1), S).scatter_(1, slots, entries)[:, None, :Tk]  # (B, 1, Tk)
    n = n_far[:, :, None]
    sink = (rank < n) & (rank < sinks)  # (B, Tq, Tk)
    sep = (rank < n) & (rank >= sinks) & (rank >= n - (S if max_seps is None else max_seps))
    near = (0 <= ahead) & (ahead < window)
    visible = (near | sink | sep)[:, None]
    if q_sink is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    scores = torch.where(sink[:, None], q_sink @ k.mT, q @ k.mT) * D ** -0.5
    return torch.softmax(scores.masked_fill(~visible, -torch.inf), -1) @ v


def sep_attention(q, k, v, far, n_far, window, sinks=0, max_seps=None, q_sink=None, impl="auto"):
    return sep_attention_reference(q, k, v, far, n_far, window, sinks, max_seps, q_sink)
