"""The GPT: the transformer of Llama and Qwen3, over sinks, separators and a window.

The one idea: training, prefill and decoding are the same `forward`. Without a cache the queries
attend to the keys of their own text, with one to those that the cache returns. Who sees whom is
worked out once, before the first layer.

What is trained from scratch here has the shape of Qwen3; `GPT.from_pretrained` reads Llama, Mistral
and Qwen into the same class. Read after `sep_cache.py` (who sees whom) and the first half of
`sep_kernel.py`.
"""
import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from sep_cache import SepConfig, far_layout, make_cache, option, require
from sep_kernel import sep_attention


@dataclass(kw_only=True)
class GPTConfig(SepConfig):
    """The attention's settings and the model's shape. ValueError names what is out of range."""
    vocab_size: int = 256  # belongs to the data
    n_layer: int = option(4, "number of layers")
    n_head: int = option(4, "attention heads per layer")
    n_kv_head: int | None = option(None, "heads of keys and values, each shared by n_head / "
                                         "n_kv_head heads; None: as many as n_head")
    n_embd: int = option(128, "channels")
    n_inner: int | None = None  # channels inside the MLP; None: 8/3 n_embd, in multiples of 32
    head_dim: int | None = None  # None: n_embd / n_head
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3.1's, with the names of its config.json
    qk_norm: bool = True
    qkv_bias: bool = False
    tied: bool = True  # the embedding is also the output layer

    def __post_init__(self):
        super().__post_init__()
        self.n_kv_head = self.n_kv_head or self.n_head
        self.require_range("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", minimum=1)
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_inner = self.n_inner or max(32, self.n_embd * 8 // 3 // 32 * 32)
        require(self.head_dim >= 2 and self.head_dim % 2 == 0,
                f"n_embd / n_head is {self.head_dim}, and must be even")
        require(self.n_head % self.n_kv_head == 0,
                f"n_head is {self.n_head}, and must be a multiple of n_kv_head, {self.n_kv_head}")
        require(all(0 <= s < self.vocab_size for s in self.separators),
                f"separators are {self.separators}, and must be ids below {self.vocab_size}")


# ---- rotary position embeddings (RoFormer, arXiv 2104.09864)


def rope_frequencies(config, device):
    """Angle per position of each channel pair, (D / 2,) float64."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device)
    frequencies = config.rope_theta ** (-exponent / config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None:
        # Llama 3.1: pairs that turn often within the original length stay, slow ones slow down
        low = scaling["low_freq_factor"]
        high = scaling["high_freq_factor"]
        n_turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = ((n_turns - low) / (high - low)).clamp(0, 1)
        slow = frequencies / scaling["factor"]
        frequencies = keep * frequencies + (1 - keep) * slow
    return frequencies


def rope_cos_sin(positions, frequencies, dtype):
    """Cosines and signed sines for `apply_rope`: positions (T,) -> two of (T, D).

    Angles are products in float64: at position 4,000,000 float32 would be off by a quarter of a
    radian. `dtype` is the model's; the results have at least float32.
    """
    angle = positions.double()[:, None] * frequencies  # (T, D / 2)
    dtype = torch.promote_types(dtype, torch.float32)
    cos = angle.cos().to(dtype)
    sin = angle.sin().to(dtype)
    return torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)


def apply_rope(x, cos_sin):
    """Rotate the channel pairs (d, d + D / 2) of x (..., T, D) by the angles of their positions."""
    cos, sin = cos_sin
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


# ---- the transformer


class Attention(nn.Module):

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        D = config.head_dim
        n_qk = config.n_head + config.n_kv_head
        n_qkv = n_qk + config.n_kv_head
        self.qkv = nn.Linear(config.n_embd, n_qkv * D, bias=config.qkv_bias)
        self.out = nn.Linear(config.n_head * D, config.n_embd, bias=False)
        if config.qk_norm:
            self.qk_gain = nn.Parameter(torch.ones(n_qk, 1, D))

    def forward(self, x, layout, cos_sin, sink_cos_sin=None, cache=None):
        """x (B, T, C) -> (B, T, C). cos_sin rotates q and k, sink_cos_sin makes q_sink.

        layout: of `far_layout` or, with a cache, the mask of its `advance`.
        """
        B, T, _ = x.shape
        config = self.config
        D = config.head_dim
        H = config.n_head
        H_kv = config.n_kv_head
        qkv = self.qkv(x).view(B, T, -1, D).transpose(1, 2)
        qk, v = qkv.split([H + H_kv, H_kv], dim=1)
        if config.qk_norm:
            # scores stay bounded, so a high learning rate is safe; autocast norms in float32
            qk = F.rms_norm(qk, (D,), eps=config.norm_eps) * self.qk_gain
            qk = qk.to(v.dtype)
        q, k = apply_rope(qk, cos_sin).split([H, H_kv], dim=1)  # (B, H, T, D), (B, H_kv, T, D)

        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # (B, H_kv, M, D)
            q_sink = None
            if sink_cos_sin is not None:
                q_sink = apply_rope(qk[:, :H], sink_cos_sin)
            y = cached_attention(q, k, v, layout, q_sink, config.sinks)
        else:
            k = k.repeat_interleave(H // H_kv, dim=1)  # (B, H, T, D)
            v = v.repeat_interleave(H // H_kv, dim=1)
            if layout is None:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                y = sep_attention(q, k, v, layout, config.window, config.sinks)
        return self.out(y.transpose(1, 2).reshape(B, T, H * D))


def cached_attention(q, k, v, mask, q_sink, sinks):
    """Softmax attention of new queries over the rows of a cache, with shared keys and values.

    q, q_sink (B, H, T, D); k, v (B, H_kv, M, D); mask (B, 1, T, M) or None. With q_sink, the first
    `sinks` rows are scored by it. Returns (B, H, T, D).
    """
    if q_sink is None:
        is_grouped = q.shape[1] > k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=is_grouped)
    B, H, T, D = q.shape
    H_kv = k.shape[1]
    # the queries of the heads that share keys, one head after another
    q = q.reshape(B, H_kv, H // H_kv * T, D)
    q_sink = q_sink.reshape(q.shape)
    sink_scores = q_sink @ k[:, :, :sinks].mT
    other_scores = q @ k[:, :, sinks:].mT
    scores = torch.cat([sink_scores, other_scores], dim=-1)
    scores = scores.view(B, H, T, -1) * D ** -0.5 + mask
    weights = scores.softmax(-1).view(*q.shape[:3], -1)
    return (weights @ v).view(B, H, T, D)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):

    def __init__(self, config, layer_idx):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config, layer_idx)
        self.mlp_norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, layout, cos_sin, sink_cos_sin=None, cache=None):
        x = x + self.attn(self.attn_norm(x), layout, cos_sin, sink_cos_sin, cache)
        x = x + self.mlp(self.mlp_norm(x))
        return x


class GPT(nn.Module):
    """A GPT of `config`: logits, loss = model(ids, targets=None, cache=None)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        if not config.tied:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=self._initial_std(name, weight))

    def _initial_std(self, name, weight):
        """Unit variance into attention, MLP and logits, and little out of a block at first.

        So the rows of the embedding have length 1. With the customary std of 0.02 Adam's steps soon
        drown what tells tokens apart: see the recall in experiments/RESULTS.md.
        """
        if name.endswith(("out.weight", "down.weight")):
            return 0.02 / (2 * self.config.n_layer) ** 0.5
        return weight.shape[1] ** -0.5

    @classmethod
    def from_pretrained(cls, folder, **settings):
        """The model in a Hugging Face folder: see `pretrained.load_model`."""
        from pretrained import load_model  # here, since that file imports this one
        return load_model(folder, **settings)

    def configure(self, **changes):
        """Change settings that shape no weights, like `attn`. ValueError as in GPTConfig."""
        self.config = dataclasses.replace(self.config, **changes)
        for block in self.blocks:
            block.attn.config = self.config

    def forward(self, ids, targets=None, cache=None):
        """Logits (B, T, V), and the mean cross-entropy in nats or, without targets, None.

        ids (B, T) int64; targets (B, T) int64, -1 where no loss is taken; cache: of `make_cache`,
        takes the tokens in. ValueError for a text beyond block_size without a cache.
        """
        config = self.config
        T = ids.shape[1]
        if cache is None:
            require(T <= config.block_size, f"the text has {T} tokens, and block_size is "
                    f"{config.block_size}; a longer one needs a cache")
            positions = torch.arange(T, device=ids.device)
            layout = far_layout(ids, config)
        else:
            positions, layout = cache.advance(ids)

        x = self.embed(ids)  # (B, T, C)
        frequencies = rope_frequencies(config, ids.device)
        cos_sin = rope_cos_sin(positions, frequencies, x.dtype)
        sink_cos_sin = None
        if cache is not None and cache.past_horizon:
            # Separators are dropped at distance block_size, sinks never. To score them, too, only
            # at distances that training has shown, q_sink is the query as it would be at position
            # min(position, block_size - 1).
            trained_positions = positions.clamp(max=config.block_size - 1)
            sink_cos_sin = rope_cos_sin(trained_positions, frequencies, x.dtype)
        for block in self.blocks:
            x = block(x, layout, cos_sin, sink_cos_sin, cache)
        head = self.embed if config.tied else self.head
        x = self.norm(x)
        logits = F.linear(x, head.weight)  # (B, T, V)
        if targets is None:
            return logits, None
        all_logits = logits.float().flatten(0, 1)  # (B T, V)
        loss = F.cross_entropy(all_logits, targets.flatten(), ignore_index=-1)
        return logits, loss

    @torch.inference_mode()
    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None, cache=None):
        """Yield, `max_new_tokens` times, the next token (B,) int64 of each of the prompts (B, T).

        temperature 0 is greedy; top_k: sample among the k most likely tokens, None: among all;
        cache: a fresh one, by default one is made.
        """
        if cache is None:
            cache = make_cache(self.config, len(ids), ids.device, self.embed.weight.dtype)
        for chunk in ids.split(CHUNK_SIZE, dim=1):
            logits, _ = self(chunk, cache=cache)
        for i in range(max_new_tokens):
            if i > 0:
                logits, _ = self(token[:, None], cache=cache)
            token = sample_token(logits[:, -1], temperature, top_k)  # (B,)
            yield token


CHUNK_SIZE = 512  # tokens of a long text that are read at once


def sample_token(logits, temperature, top_k):
    """Sample token ids (B,) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # none overflows
    if top_k is not None:
        kth_logit = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth_logit, -torch.inf)
    return torch.multinomial(logits.softmax(-1), num_samples=1)[:, 0]
