"""The GPT: the transformer of Llama and Qwen3, over sinks, separators and a window.

The one idea: training, prefill and decoding are the same `compute`. Without a cache, queries attend
to the keys of their own text. With a cache, they attend to the keys that the cache returns. Who
sees whom is worked out once, before the first layer.

What is trained from scratch here has the shape of Qwen3; `pretrained.load_model` reads Llama,
Mistral and Qwen into the same class. Next: `train.py`, or `pretrained.py`.
"""
import dataclasses
import functools
import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from options import option, require
from sep_cache import SepCache
from sep_kernel import in_blocks, is_modern, sep_attention
from sep_mask import SepConfig, far_layout


@dataclass(kw_only=True)
class GPTConfig(SepConfig):
    """The attention's settings and the model's shape. ValueError names what is out of range."""
    vocab_size: int = option(256, minimum=1)  # belongs to the data
    n_layer: int = option(4, "number of layers", 1)
    n_head: int = option(4, "attention heads per layer", 1)
    n_kv_head: int | None = option(None, "heads of keys and values, each shared by n_head / "
                                         "n_kv_head heads; None: as many as n_head", 1)
    n_embd: int = option(128, "channels", 1)
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
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_inner = self.n_inner or max(32, self.n_embd * 8 // 3 // 32 * 32)
        require(self.head_dim >= 2 and self.head_dim % 2 == 0,
                f"n_embd / n_head is {self.head_dim}, and must be even and not 0")
        require(self.n_head % self.n_kv_head == 0,
                f"n_head is {self.n_head}, and must be a multiple of n_kv_head, {self.n_kv_head}")


# ---- rotary position embeddings (RoFormer, arXiv 2104.09864)


def rope_frequencies(config, device):
    """Angle per position of each channel pair, (D / 2,) float64."""
    D = config.head_dim
    # theta^0, theta^(-2/D), theta^(-4/D), ...
    frequencies = torch.logspace(0, 2 / D - 1, D // 2, base=config.rope_theta,
                                 dtype=torch.float64, device=device)
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
    cos = angle.cos()
    sin = angle.sin()
    # One tensor of four parts, which torch.compile stores. Two tensors of two equal parts it would
    # not store: it would compute float64 cosines for every element of q and k in every layer.
    parts = torch.cat([cos, cos, -sin, sin], dim=1)
    return parts.to(torch.promote_types(dtype, torch.float32)).chunk(2, dim=1)


def apply_rope(x, cos_sin):
    """Rotate the channel pairs (d, d + D / 2) of x (..., T, D) by the angles of their positions."""
    cos, sin = cos_sin
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


# ---- the transformer


class Attention(nn.Module):

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        D = config.head_dim
        n_qk = config.n_head + config.n_kv_head
        n_qkv = n_qk + config.n_kv_head
        self.qkv_proj = nn.Linear(config.n_embd, n_qkv * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_head * D, config.n_embd, bias=False)
        if config.qk_norm:
            # Qwen3 has one gain for all heads of q and one for those of k; here each has its own
            self.qk_gain = nn.Parameter(torch.ones(n_qk, 1, D))

    def forward(self, x, config, cos_sin, layout, cache, mask, sink_cos_sin):
        """x (B, T, C) -> (B, T, C). All else is the same for all layers:

        cos_sin rotates q and k to their positions. Without a cache, layout says who sees whom: it
        is of `far_layout`. With a cache, mask does: it is of the cache's `advance`. sink_cos_sin is
        None, or a second rotation of q, for the sinks: see `GPT.compute`.
        """
        D = config.head_dim
        H = config.n_head
        H_kv = config.n_kv_head
        qkv = self.qkv_proj(x).unflatten(-1, (-1, D)).transpose(1, 2)  # (B, H + 2 H_kv, T, D)
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
            y = cached_attention(q, k, v, mask, q_sink, config.sinks)
        else:
            # a copy of shared keys for each head: one program of the kernel serves one head
            k, v = (x.repeat_interleave(H // H_kv, dim=1) for x in (k, v))  # (B, H, T, D)
            y = sep_attention(q, k, v, layout)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def cached_attention(q, k, v, mask, q_sink=None, sinks=0):
    """Softmax attention of new queries over the rows of a cache.

    q, q_sink (B, H, T, D); k, v (B, H_kv, M, D), shared by G = H / H_kv neighbouring heads; mask of
    the cache's `advance`, (B, 1, G T, M). q_sink, if given, scores the first `sinks` rows.
    Returns (B, H, T, D).
    """
    B, H, T, D = q.shape
    _, H_kv, M, _ = k.shape
    # The queries of the heads that share keys become further queries of one head. PyTorch's own
    # way, enable_gqa, would leave the fast kernels of most GPUs when there is a mask.
    q = q.reshape(B, H_kv, -1, D)  # (B, H_kv, G T, D)
    if q_sink is not None:
        # q_sink k = q k + (q_sink - q) k: the second part is added to the mask of the sinks
        missing = (q_sink.reshape(q.shape) - q) @ k[:, :, :sinks].mT * D ** -0.5
        mask = mask + F.pad(missing, (0, M - missing.shape[-1]))
    y = F.scaled_dot_product_attention(q, k, v, mask)
    return y.reshape(B, H, T, D)  # not view: on some GPUs the memory of y is (B, G T, H_kv, D)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):

    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, **shared):
        """x (B, T, C) -> (B, T, C). shared: what `Attention.forward` takes besides x."""
        x = x + self.self_attn(self.input_layernorm(x), **shared)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


CHUNK_SIZE = 512  # tokens of a long text that are read at once


class GPT(nn.Module):
    """A GPT of `config`: logits, loss = model(ids, targets=None, cache=None)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokenizer_json = None  # the text of the tokenizer.json that its tokens are of
        self.register_buffer("separators", torch.tensor(config.separators), persistent=False)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Unit variance goes into attention, MLP and logits, and little comes out of a block at
        # first. So the rows of the embedding have length 1. With the customary std of 0.02 Adam's
        # steps soon drown what tells tokens apart: see the recall in experiments/RESULTS.md.
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(weight, std=0.02 / (2 * config.n_layer) ** 0.5)
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def configure(self, **changes):
        """Change settings that shape no weights, like `attn`. ValueError as in GPTConfig."""
        self.config = dataclasses.replace(self.config, **changes)
        self.separators = torch.tensor(self.config.separators,
                                       device=self.embed_tokens.weight.device)

    def new_cache(self, batch_size=1):
        """An empty cache for so many texts, on the model's device and of its dtype."""
        weight = self.embed_tokens.weight
        return SepCache(self.config, batch_size, weight.device, weight.dtype)

    def forward(self, ids, targets=None, cache=None):
        """Logits (B, T, V) and None or, with targets, None and the mean cross-entropy in nats.

        ids, targets (B, T) int64; cache: of `new_cache`, takes the tokens in. ValueError for a text
        beyond block_size without a cache, and for a cache of other settings than the model's.
        """
        _, T = ids.shape
        if cache is not None:
            require(cache.config == self.config, "the model has been configured since this cache "
                    "was made; make a new one")
            cache.make_room(T)
        else:
            require(T <= self.config.block_size, f"the text has {T} tokens, and block_size is "
                    f"{self.config.block_size}; a longer one needs a cache")
        return self.compute(ids, targets, cache)

    def compute(self, ids, targets=None, cache=None):
        """`forward` once there is room in the cache. With a cache this is work of the device alone,
        with no number read back. So it can be compiled, or recorded as a CUDA graph."""
        config = self.config
        _, T = ids.shape
        layout = mask = sink_cos_sin = None
        x = self.embed_tokens(ids)  # (B, T, C)
        if cache is not None:
            positions, mask = cache.advance(ids)
        else:
            positions = torch.arange(T, device=ids.device)
            layout = far_layout(ids, config, self.separators)
            if not is_modern(ids.device):
                layout = in_blocks(layout)  # here, so that not every layer does it

        frequencies = rope_frequencies(config, ids.device)
        cos_sin = rope_cos_sin(positions, frequencies, x.dtype)
        if cache is not None and cache.past_horizon:
            # From distance block_size on, a query sees only sinks. To keep their distances trained
            # ones, q_sink is the query rotated to min(position, block_size - 1).
            trained_positions = positions.clamp(max=config.block_size - 1)
            sink_cos_sin = rope_cos_sin(trained_positions, frequencies, x.dtype)
        for block in self.layers:
            x = block(x, config=config, cos_sin=cos_sin, layout=layout, cache=cache, mask=mask,
                      sink_cos_sin=sink_cos_sin)
        head = self.embed_tokens if config.tied else self.lm_head
        logits = F.linear(self.norm(x), head.weight)  # (B, T, V)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            logits = None  # who has the loss does not need them, and they are large
        if cache is not None:
            cache.take_in(T)
        return logits, loss

    @torch.inference_mode()
    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None, cache=None, compile=False):
        """Yield, `max_new_tokens` times, the next token (B,) int64 of each of the prompts (B, T).

        temperature 0 is greedy; top_k: sample among the k most likely tokens, None: among all;
        cache: a fresh one, by default one is made; compile: the work of a token by torch.compile.
        Meanwhile the model must stay as it is. A token of -1 says that the model's logits are not
        finite: it is broken. ValueError for a temperature or top_k out of range, IndexError for
        prompts without tokens.
        """
        require(0 <= temperature < math.inf and (top_k is None or top_k >= 1),
                f"temperature is {temperature} and top_k {top_k}; they must be finite, at least 0 "
                "and at least 1")
        if cache is None:
            cache = self.new_cache(len(ids))
        for chunk in ids.long().split(CHUNK_SIZE, dim=1):
            logits, _ = self(chunk, cache=cache)
        token = sample_token(logits[:, -1], temperature, top_k)  # (B,)
        compute = torch.compile(self.compute) if compile else self.compute

        def next_token():
            logits, _ = compute(token[:, None], cache=cache)
            token.copy_(sample_token(logits[:, -1], temperature, top_k))

        step = RecordedStep(next_token, cache)
        for i in range(max_new_tokens):
            if i > 0:
                cache.make_room(1)
                step()
            yield token.clone()


def sample_token(logits, temperature, top_k):
    """Sample token ids (B,) from logits (B, V), without a word from the device to the host.

    An id is -1 where a logit is NaN or infinite.
    """
    if temperature > 0:
        if top_k is not None:
            kept = logits.topk(min(top_k, logits.shape[-1]))
            nothing = torch.full_like(logits, -torch.inf)
            logits = nothing.scatter(-1, kept.indices, kept.values)
        # Gumbel's trick: with this noise each token is the largest with its softmax probability.
        # torch.multinomial does the same, but asks the device whether probabilities are valid.
        logits = logits.double() / temperature  # none overflows
        logits = logits - torch.empty_like(logits).exponential_().log()
    largest, token = logits.max(-1)
    return token.where(largest < torch.inf, -1)  # NaN is not less


class RecordedStep:
    """A step of decoding, which a GPU records once as a CUDA graph, and then replays.

    A step is some 200 launches of kernels, and for each the GPU waits for Python; a replay is one.

        | step             | what happens                                                   |
        | the first        | runs: loads kernels, makes the handles of libraries, compiles  |
        | the second       | is recorded, which runs nothing, and replayed                  |
        | all later ones   | are replayed                                                   |
        | with new buffers | runs as the first did, and everything begins again             |

    So it does when the text passes block_size, since from then on sinks are scored apart.
    Elsewhere than on a GPU every step runs.
    """
    def __init__(self, step, cache):
        self.step = step
        self.cache = cache
        self.key = None, None  # what a recording is good for
        self.replay = None

    def __call__(self):
        cache = self.cache
        buffer, past_horizon = self.key
        if buffer is not cache.row_position or past_horizon != cache.past_horizon:
            self.key = cache.row_position, cache.past_horizon
            self.replay = None
            self.step()
            return
        if self.replay is None:
            self.replay = record(self.step, cache.row_position.device)
        self.replay()


def record(step, device):
    """What runs the step again: a CUDA graph or, where there can be none, the step itself."""
    if device.type != "cuda":
        return step
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=capture_stream(device),
                                  capture_error_mode="thread_local"):
                step()
            return graph.replay
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # PyTorch leaves that of the recording
            warnings.warn(f"decoding without a CUDA graph: {error}")
            return step


# the stream of a device on which steps are recorded: one, since cuBLAS keeps a workspace for each
capture_stream = functools.cache(torch.cuda.Stream)
