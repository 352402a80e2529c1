"""The GPT: nanoGPT's transformer with rotary positions, over sinks, separators and a window.

The one idea: training, prefill and decoding are the same `forward`. Without a cache the queries
attend to the keys of their own text, with one to those that the cache returns. Who sees whom is
worked out once, before the first layer. Read after `sep_cache.py` (its mask and its far list) and
the first half of `sep_kernel.py`.
"""
import dataclasses
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from sep_cache import SepCache, SepConfig, far_layout, option, require
from sep_kernel import attend


@dataclass
class GPTConfig(SepConfig):
    """The attention's settings and the model's shape. ValueError names what is out of range."""
    vocab_size: int = 256  # belongs to the data
    n_layer: int = option(4, "number of layers")
    n_head: int = option(4, "attention heads per layer")
    n_embd: int = option(128, "channels")

    def __post_init__(self):
        super().__post_init__()
        for name in ("vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}, and must be at least 1")
        require(self.n_embd % (2 * self.n_head) == 0,
                f"n_embd is {self.n_embd}, and must be an even multiple of n_head, {self.n_head}")
        require(all(0 <= s < self.vocab_size for s in self.separators),
                f"separators are {self.separators}, and must be ids below {self.vocab_size}")

    @property
    def n_kv_head(self):
        return self.n_head

    @property
    def head_dim(self):
        return self.n_embd // self.n_head


# ---- rotary position embeddings (RoFormer, arXiv 2104.09864)


ROPE_BASE = 10000.0
_rope_frequencies = {}


@torch.compiler.assume_constant_result
def rope_frequencies(head_dim, base, device):
    """Angle per position of each channel, (D,) float64; the first half is negative (see below)."""
    key = head_dim, base, device
    if key not in _rope_frequencies:
        with torch.inference_mode(False):  # training could not use a tensor of inference mode
            exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
            frequencies = base ** -exponent  # (D / 2,) of the channel pairs
            _rope_frequencies[key] = signed_frequencies(frequencies, device)
    return _rope_frequencies[key]


def signed_frequencies(frequencies, device):
    """(D / 2,) of the channel pairs -> (D,) of the channels, on the device that computes angles."""
    frequencies = torch.cat([-frequencies, frequencies])
    if device.type == "mps":  # Apple GPUs have no float64
        return frequencies
    return frequencies.to(device)


def rope_cos_sin(positions, frequencies, dtype):
    """Cosines and signed sines for `apply_rope`: positions (T,), frequencies (D,) -> two of (T, D).

    The first channel of a pair needs -sin(a), the second sin(a): with a negative frequency the
    first gets sin(-a) = -sin(a), and cos(-a) = cos(a). Angles are products in float64: at position
    4,000,000 float32 would be off by a quarter of a radian. `dtype` is the model's; the results
    have at least float32.
    """
    angle = positions.to(frequencies.device).double()[:, None] * frequencies  # (T, D)
    dtype = torch.promote_types(dtype, torch.float32)
    return angle.cos().to(positions.device, dtype), angle.sin().to(positions.device, dtype)


def apply_rope(x, cos_sin):
    """Rotate the channel pairs (d, d + D / 2) of x (..., T, D) by the angles of their positions."""
    cos, sin = cos_sin
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def forward_cos_sin(positions, frequencies, dtype, config, cache=None):
    """What rotates the heads of one forward: cos_sin of q and k, sink_cos_sin of q_sink or None.

    Tokens stand at their positions in the text. Separators are dropped at distance `block_size`,
    the sinks never. To score them, too, only at distances that training has shown, `q_sink` is the
    query as it would be at position `min(position, block_size - 1)`. For a single
    token it is cheaper to turn the sinks' keys in the cache forward by the difference, once for all
    layers, than to score the sinks of each layer with a query of their own.
    """
    cos_sin = rope_cos_sin(positions, frequencies, dtype)
    last_trained = config.block_size - 1
    # the position that a cache has reached is on its device, and not known here
    may_pass_horizon = cache is not None or len(positions) > config.block_size
    if config.attn == "full" or config.sinks == 0 or not may_pass_horizon:
        return cos_sin, None
    if cache is not None and len(positions) == 1:
        excess = (positions - last_trained).clamp(min=0)
        cache.show_sinks(apply_rope(cache.sink_keys, rope_cos_sin(excess, frequencies, dtype)))
        return cos_sin, None
    return cos_sin, rope_cos_sin(positions.clamp(max=last_trained), frequencies, dtype)


# ---- the transformer


def norm(x):
    """RMSNorm without a gain: the weights of the linear layer that follows can hold one."""
    return F.rms_norm(x, (x.shape[-1],))


class CausalSelfAttention(nn.Module):

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, layout, cos_sin, sink_cos_sin=None, cache=None):
        """x (B, T, C) -> (B, T, C). cos_sin rotates q and k, sink_cos_sin makes q_sink."""
        B, T, C = x.shape
        config = self.config
        qkv = self.qkv(x).view(B, T, 3, config.n_head, config.head_dim)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        v = qkv[2]
        # QK-norm: scores stay bounded, so a high learning rate is safe. Autocast norms in float32.
        qk = norm(qkv[:2]).to(v.dtype)
        q_sink = None if sink_cos_sin is None else apply_rope(qk[0], sink_cos_sin)
        q, k = apply_rope(qk, cos_sin)  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # (B, H, M, D)
        y = attend(q, k, v, layout, config, q_sink)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):

    def __init__(self, config, layer_idx):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer_idx)
        self.mlp = MLP(config)

    def forward(self, x, layout, cos_sin, sink_cos_sin=None, cache=None):
        x = x + self.attn(norm(x), layout, cos_sin, sink_cos_sin, cache)
        x = x + self.mlp(norm(x))
        return x


class GPT(nn.Module):
    """A GPT of `config`: logits, loss = model(ids, targets=None, cache=None)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)  # tied: also the output layer
        self.blocks = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.n_layer))
        for name, weight in self.named_parameters():
            nn.init.normal_(weight, std=self._initial_std(name, weight))

    def _initial_std(self, name, weight):
        """Unit variance into attention and MLP, and little out of them at first."""
        if name.endswith(("qkv.weight", "up.weight")):
            return weight.shape[1] ** -0.5
        if name.endswith(("out.weight", "down.weight")):
            return 0.02 / (2 * self.config.n_layer) ** 0.5
        return 0.02

    def configure(self, **changes):
        """Change settings that shape no weights, like `attn`. ValueError as in GPTConfig."""
        self.config = dataclasses.replace(self.config, **changes)
        for block in self.blocks:
            block.attn.config = self.config

    def forward(self, ids, targets=None, cache=None):
        """Logits (B, T, V), and the mean cross-entropy in nats or, without targets, None.

        ids (B, T) int64; targets (B, T) int64, -1 where no loss is taken; cache: a SepCache, which
        takes the tokens in.
        """
        config = self.config
        T = ids.shape[1]
        if cache is None:
            positions = torch.arange(T, device=ids.device)
            layout = far_layout(ids, config)
        else:
            positions, layout = cache.advance(ids)

        x = self.embed(ids)  # (B, T, C)
        frequencies = rope_frequencies(config.head_dim, ROPE_BASE, ids.device)
        cos_sin, sink_cos_sin = forward_cos_sin(positions, frequencies, x.dtype, config, cache)
        for block in self.blocks:
            x = block(x, layout, cos_sin, sink_cos_sin, cache)
        logits = F.linear(norm(x), self.embed.weight)  # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None, cache=None):
        """The function `generate`, with this model."""
        return generate(self, ids, max_new_tokens, temperature, top_k, cache)


# ---- generation


MAX_LOGITS = 2 ** 27  # numbers in the logits of one forward; longer texts are read in chunks


@torch.inference_mode()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, cache=None):
    """Yield, `max_new_tokens` times, the next token (B,) int64 of each of the prompts ids (B, T).

    temperature 0 is greedy; top_k: sample among the k most likely tokens, None: among all. cache: a
    fresh SepCache, by default one is made. On a GPU, unless attn is "full", the steps after the
    third replay a captured CUDA graph.
    """
    if cache is None:
        cache = SepCache(model.config, len(ids), ids.device, model.embed.weight.dtype)
    chunk_size = max(1, min(1024, MAX_LOGITS // (len(ids) * model.config.vocab_size)))
    for chunk in ids.split(chunk_size, dim=1):
        logits, _ = model(chunk, cache=cache)
    token = sample_token(logits[:, -1], temperature, top_k)  # (B,)

    def step():
        logits, _ = model(token[:, None], cache=cache)
        token.copy_(sample_token(logits[:, -1], temperature, top_k))

    if ids.is_cuda and not cache.is_full:
        step = GraphedStep(step, cache)
    for i in range(max_new_tokens):
        if i > 0:
            step()
        yield token.clone()


class GraphedStep:
    """Replays a decoding step as a CUDA graph: one launch for all of its kernels."""

    def __init__(self, step, cache, n_eager=3):
        self.step = step
        self.cache = cache
        self.n_eager = n_eager  # what is made on first use must exist before the capture
        self.graph = None

    def __call__(self):
        if self.n_eager > 0:
            self.n_eager -= 1
            self.step()
        elif self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()  # records what it launches, and runs nothing
            self.graph.replay()
        else:
            self.graph.replay()
            self.cache.n_tokens += 1  # a replay runs no Python


def sample_token(logits, temperature, top_k):
    """Sample token ids (B,) from logits (B, V), without waiting for the GPU."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        k = min(top_k, logits.shape[-1])
        kth_logit = logits.topk(k).values[:, -1:]
        logits = logits.masked_fill(logits < kth_logit, -torch.inf)
    # the largest p / e, with e exponential, falls on each token with probability p
    return (logits.softmax(-1) / torch.empty_like(logits).exponential_()).argmax(-1)
