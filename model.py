"""The GPT: a plain modern transformer whose attention looks at sinks, separators and a window (SepLLM, arXiv 2412.12094).

The one idea: training, prefill and decoding are the same `forward`. Without a cache it attends over the text itself, with
one over [cached rows | new rows]; either way "who sees whom" comes as the two small lists that `sep_cache.py` makes.
Start here, then read `sep_cache.py` (the lists and the cache) and `sep_kernel.py` (the attention over them).
"""
import dataclasses
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from sep_cache import SepCache, far_layout, reach
from sep_kernel import sep_attention


def option(default, help):
    """A dataclass field that is also a command line option, with its help text."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class GPTConfig:
    """The shape of the model and of its attention. ValueError names the field that is out of range."""
    block_size: int = option(256, "training length in tokens; also the largest distance at which a sink is seen")
    vocab_size: int = dataclasses.field(default=256)  # this and `separators` belong to the data: its meta.json has them
    n_layer: int = option(4, "number of layers")
    n_head: int = option(4, "attention heads per layer")
    n_embd: int = option(128, "channels")
    attn: str = option("sep", "full: everything; stream: sinks + window; fixed: and every fixed_every-th token; "
                              "sep: and the separators")
    window: int = option(64, "a query sees the last `window` tokens, itself included")
    sinks: int = option(4, "the first tokens of the text that stay visible for ever")
    separators: tuple = dataclasses.field(default=tuple(b".,?!;:\n"))  # token ids
    max_seps: int | None = option(None, "how many separators beyond the window are visible, the latest ones; None: all")
    fixed_every: int = option(16, "with attn=fixed, the positions divisible by this stay visible")

    def __post_init__(self):
        self.separators = tuple(self.separators)
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "window", "fixed_every"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, and must be at least 1")
        require(self.attn in ("full", "stream", "fixed", "sep"),
                f"attn is {self.attn!r}, and must be one of full, stream, fixed, sep")
        require(self.sinks >= 0, f"sinks is {self.sinks}, and must be at least 0")
        require(self.max_seps is None or self.max_seps >= 0,
                f"max_seps is {self.max_seps}, and must be None or at least 0")
        require(self.n_embd % (2 * self.n_head) == 0,
                f"n_embd is {self.n_embd}, and must be an even multiple of n_head, which is {self.n_head}")
        require(all(0 <= s < self.vocab_size for s in self.separators),
                f"separators are {self.separators}, and must be ids below vocab_size, which is {self.vocab_size}")


def require(ok, sentence):
    if not ok:
        raise ValueError(sentence)


def rotation(positions, head_size, dtype):
    """Cosines and signed sines of rotary embeddings (RoFormer, arXiv 2104.09864): positions (..., T) -> two of (..., T, D).

    Angles are products in float64: at position 4,000,000 float32 would be off by a quarter of a radian.
    """
    exponent = torch.arange(0, head_size, 2, dtype=torch.float64, device=positions.device) / head_size
    angle = positions.double()[..., None] * 10000.0 ** -exponent  # (..., T, D/2)
    dtype = torch.promote_types(dtype, torch.float32)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, cos_sin):
    """Turn channel pairs (d, d + D/2) of x (..., T, D) by the angles of `rotation`."""
    cos, sin = cos_sin
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Block(nn.Module):
    """Attention and MLP, each behind an RMSNorm whose scale the linear layer after it absorbs; no biases."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.config = config
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.out = nn.Linear(C, C, bias=False)
        self.up = nn.Linear(C, 4 * C, bias=False)  # GELU, not SwiGLU: one matrix fewer to explain, same loss at this size
        self.down = nn.Linear(4 * C, C, bias=False)

    def attend(self, x, layout, turns, extend):
        """x (B, T, C) -> (B, T, C). `turns`: the rotation of q, of k and, if need be, of q as the sinks see it, each (2 or 3,
        1, 1, T, D). `extend` puts the cache's rows in front of the new keys and values, if there is one."""
        (B, T, C), H = x.shape, self.config.n_head
        qk, v = self.qkv(x).view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4).split([2, 1])  # (2, B, H, T, D), (1, B, H, T, D)
        qk, v = F.rms_norm(qk, (C // H,)), v[0]  # QK-norm: scores stay bounded, so a high learning rate is safe
        if len(turns[0]) == 3:
            qk = torch.cat([qk, qk[:1]])
        q, k, *q_sink = rotate(qk, turns).to(v.dtype)  # each (B, H, T, D)
        if extend is not None:
            k, v = extend(k, v)  # (B, H, cached + T, D)
        if self.config.attn == "full":  # the library's fastest form of the same thing
            causal = causal_lower_right(T, k.shape[2]) if T < k.shape[2] else None
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=causal, is_causal=causal is None)
        else:
            window, sinks, max_seps = reach(self.config)
            y = sep_attention(q, k, v, *layout, window, sinks, max_seps, *q_sink)
        return self.out(y.transpose(1, 2).reshape(B, T, C))

    def forward(self, x, *where):
        C = x.shape[2]
        x = x + self.attend(F.rms_norm(x, (C,)), *where)
        return x + self.down(F.gelu(self.up(F.rms_norm(x, (C,)))))


class GPT(nn.Module):
    """A GPT of `config`: logits, loss = model(ids, targets=None, cache=None)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)  # tied: also the output layer
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        for name, p in self.named_parameters():  # unit variance into attention and MLP, and little out of them at first
            inner = name.endswith(("qkv.weight", "up.weight"))
            branch = name.endswith(("out.weight", "down.weight"))
            std = p.shape[1] ** -0.5 if inner else 0.02 / (2 * config.n_layer) ** 0.5 if branch else 0.02
            nn.init.normal_(p, std=std)

    def configure(self, **changes):
        """Change fields of the configuration that shape no weights, such as `attn` and `window`. ValueError as GPTConfig."""
        self.config = dataclasses.replace(self.config, **changes)
        for block in self.blocks:
            block.config = self.config

    def forward(self, ids, targets=None, cache=None):
        """ids (B, T) int64; targets (B, T) int64 or None, -1 where no loss is taken; cache: a SepCache, read and extended.

        Returns logits (B, T, V) and the mean cross-entropy in nats, or None without targets.
        Tokens stand at their positions in the text, `cache.n_tokens` onwards. Only the sinks would run away from the
        queries for ever; a query meets them as if it stood at `min(position, block_size)`, the furthest it has learned.
        """
        T, D, device = ids.shape[1], self.config.n_embd // self.config.n_head, ids.device
        if cache is None:
            positions, layout = torch.arange(T, device=device), far_layout(ids, self.config)
        else:
            positions, layout = cache.advance(ids)
        x = self.embed(ids)  # (B, T, C)
        at = [positions, positions]  # of q, of k
        if reach(self.config)[1] and (cache is not None or T > self.config.block_size):
            at.append(positions.clamp(max=self.config.block_size))  # and of q as the sinks see it
        turns = rotation(torch.stack(at)[:, None, None], D, x.dtype)
        for layer, block in enumerate(self.blocks):
            extend = None if cache is None else lambda k, v: cache.extend(layer, k, v)
            x = block(x, layout, turns, extend)
        logits = F.linear(F.rms_norm(x, (x.shape[2],)), self.embed.weight)  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.inference_mode()
    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None, cache=None):
        """Yield `max_new_tokens` times the next token of each sequence, (B,) int64, after the prompts ids (B, T).

        temperature 0 is greedy; top_k: sample among the k most likely tokens, None: among all. cache: a fresh SepCache, by
        default one is made. On a GPU, once the cache has reached its final shape, the step is a captured CUDA graph.
        """
        if cache is None:
            cache = SepCache(self.config, len(ids), ids.device, self.embed.weight.dtype)
        for piece in ids.split(self.config.block_size, dim=1):  # long prompts in pieces, to bound memory
            logits = self(piece, cache=cache)[0]
        token, graph, static_steps = pick(logits[:, -1], temperature, top_k), None, 0

        def step():
            token.copy_(pick(self(token[:, None], cache=cache)[0][:, -1], temperature, top_k))

        for i in range(max_new_tokens):
            if graph is not None:
                graph.replay()
                cache.n_tokens += 1  # the graph replays what happens on the GPU, not this count
            elif ids.is_cuda and static_steps > 3:  # not at once: nothing may be compiled while it is captured
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=torch.cuda.Stream(ids.device)):
                    step()
                graph.replay()
            elif i > 0:
                static_steps += cache.is_static
                step()
            yield token.clone()


def pick(logits, temperature, top_k):
    """Sample token ids (B,) from logits (B, V), without waiting for the GPU."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    # the largest p / e, with e exponential, falls on each token with probability p
    return (logits.softmax(-1) / torch.empty_like(logits).exponential_()).argmax(-1)
