"""Pretrained models of the Llama family with this project's cache: SepLLM's training-free setting.

The one idea: a separator cache asks little of a transformer. In each layer, `cache.update` and
`attend` stand in place of plain attention, and that is all; so a checkpoint that was trained with
full attention runs as it is. The file has three parts: the transformer (that of `model.py`, with
gains, SwiGLU and grouped queries), reading a folder, and text. No pickle is opened, and no code of
the checkpoint runs. Read last.
"""
import codecs
import dataclasses
import functools
import importlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import apply_rope, forward_cos_sin, generate, signed_frequencies
from sep_cache import SepConfig, far_layout, require
from sep_kernel import attend

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SEPARATORS = ".,?!;:\n\r\t"  # the characters that make a token a separator
# keys of config.json that change what is computed, with the one value that is supported
REQUIRED_SETTINGS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
                     "quantization_config": None, "partial_rotary_factor": 1.0}


@dataclass(kw_only=True)
class LlamaConfig(SepConfig):
    """The attention's settings and a model's shape; block_size is its max_position_embeddings."""
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int  # heads of keys and values, each shared by n_head / n_kv_head query heads
    head_dim: int
    n_embd: int
    n_inner: int  # channels inside the MLP
    norm_eps: float
    inv_freq: tuple  # (D / 2,) RoPE: angle per position of each channel pair
    tied: bool  # the embedding is also the output layer
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3

    def __post_init__(self):
        super().__post_init__()
        require(self.n_head % self.n_kv_head == 0,
                f"num_attention_heads is {self.n_head}, and must be a multiple of "
                f"num_key_value_heads, which is {self.n_kv_head}")
        require(all(0 <= s < self.vocab_size for s in self.separators),
                f"separators must be ids below vocab_size, which is {self.vocab_size}")


# ---- the transformer; modules have the names that Hugging Face gives them in checkpoints


class Attention(nn.Module):

    def __init__(self, config, layer_idx):
        super().__init__()
        C, D = config.n_embd, config.head_dim
        self.config = config
        self.layer_idx = layer_idx
        self.q_proj = nn.Linear(C, config.n_head * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, config.n_kv_head * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, config.n_kv_head * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_head * D, C, bias=False)
        self.q_norm = nn.RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, layout, cos_sin, sink_cos_sin=None, cache=None):
        """x (B, T, C) -> (B, T, C), as in `model.py`."""
        B, T, _ = x.shape
        D = self.config.head_dim
        q = self.q_norm(self.q_proj(x).view(B, T, -1, D)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, D)).transpose(1, 2)  # (B, H_kv, T, D)
        v = self.v_proj(x).view(B, T, -1, D).transpose(1, 2)
        q_sink = None if sink_cos_sin is None else apply_rope(q, sink_cos_sin)
        q, k = apply_rope(q, cos_sin), apply_rope(k, cos_sin)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # (B, H_kv, M, D)
        y = attend(q, k, v, layout, self.config, q_sink)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # SwiGLU


class Block(nn.Module):

    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, layout, cos_sin, sink_cos_sin=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), layout, cos_sin, sink_cos_sin, cache)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Llama(nn.Module):
    """A model of the Llama family, as GPT: logits, loss = model(ids, targets=None, cache=None)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def configure(self, **changes):
        """Change settings of the attention, such as `window`. ValueError as in SepConfig."""
        self.config = dataclasses.replace(self.config, **changes)
        for block in self.layers:
            block.self_attn.config = self.config

    def forward(self, ids, targets=None, cache=None):
        """As GPT.forward: ids (B, T) int64 -> logits (B, T, V), and the mean cross-entropy or None.

        targets (B, T) int64 or None, -1 where no loss is taken; cache: a SepCache or None.
        """
        config = self.config
        if cache is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
            layout = far_layout(ids, config)
        else:
            positions, layout = cache.advance(ids)

        x = self.embed(ids)  # (B, T, C)
        frequencies = rope_frequencies(config.inv_freq, ids.device)
        cos_sin, sink_cos_sin = forward_cos_sin(positions, frequencies, x.dtype, config, cache)
        for block in self.layers:
            x = block(x, layout, cos_sin, sink_cos_sin, cache)
        head = self.embed if config.tied else self.lm_head
        logits = F.linear(self.norm(x), head.weight)  # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    generate = generate  # that of `model.py`, as a method


@torch.compiler.assume_constant_result
@functools.cache
def rope_frequencies(inv_freq, device):
    """Angle per position of each channel, (D,) float64, in the form of `model.rope_frequencies`."""
    with torch.inference_mode(False):  # what generating made, training can use
        return signed_frequencies(torch.tensor(inv_freq, dtype=torch.float64), device)


# ---- reading a folder


def load_model(folder, attn="sep", window=256, sinks=4, max_seps=256, separators=None,
               dtype=None, device=None, fixed_every=16):
    """The model in a folder, as `hf download` leaves it, in evaluation mode with this attention.

    window: 256, as the paper uses for Llama-3-8B. max_seps: 256, where the paper has no cap; so the
    cache holds at most 516 tokens, whatever max_position_embeddings is.
    separators: characters that make a token a separator (str), or token ids; default SEPARATORS.
    dtype: default bfloat16 on a GPU, float32 on a CPU. device: default a GPU if there is one.
    ValueError says in one sentence what is missing or not supported.
    """
    folder = Path(folder)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = read_shape(folder)
    if separators is None:
        # other attention than sep can do without a tokenizer
        has_separators = attn == "sep" or (folder / "tokenizer.json").is_file()
        separators = SEPARATORS if has_separators else ()
    if isinstance(separators, str):
        separators = load_tokenizer(folder).separators(separators)
    config = LlamaConfig(attn=attn, window=window, sinks=sinks, max_seps=max_seps,
                         separators=separators, fixed_every=fixed_every, **shape)
    with torch.device("meta"):  # parameters without memory, to be replaced by what is read
        model = Llama(config)
    model.load_state_dict(read_weights(folder, model, dtype, device), assign=True)
    return model.eval()


def read_shape(folder):
    """The shape of the model by config.json: fields of LlamaConfig, as a dict."""
    path = folder / "config.json"
    config = read_json(path)
    architectures = config.get("architectures")
    require(isinstance(architectures, list) and architectures, f"{path} names no architecture")
    family = architectures[0]
    require(family in FAMILIES,
            f"{path} names {family}, and must name one of {', '.join(FAMILIES)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    require(isinstance(rope, dict), f"{path}: the RoPE settings are {rope!r}, and not an object")
    settings = {"rope_theta": 10000.0, **config, **rope}  # newer files have rope_theta in `rope`

    def need(key, kind=int, default=None):
        value = settings.get(key)
        if value is None:
            value = default
        require(type(value) in (int, kind) and 0 < value < 1e12,
                f"{path}: {key} is {value!r}, and must be a positive {kind.__name__} below 1e12")
        return value

    for key, supported in REQUIRED_SETTINGS.items():
        value = settings.get(key)
        require(value is None or value == supported,
                f"{path}: {key} is {value!r}, and only {supported!r} is supported")
    if family == "MistralForCausalLM" or config.get("use_sliding_window"):
        window = config.get("sliding_window", 4096)  # Hugging Face's default
        require(window is None, f"{path}: sliding_window is {window}, and only null is supported")
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    require(rope_type in ("default", "llama3"),
            f"{path}: the RoPE type is {rope_type!r}, and must be default or llama3")
    n_head = need("num_attention_heads")
    n_embd = need("hidden_size")
    head_dim = need("head_dim", default=n_embd // n_head)
    require(head_dim % 2 == 0, f"{path}: head_dim is {head_dim}, and must be even")
    return {
        "block_size": need("max_position_embeddings"),
        "vocab_size": need("vocab_size"),
        "n_layer": need("num_hidden_layers"),
        "n_head": n_head,
        "n_kv_head": need("num_key_value_heads", default=n_head),
        "head_dim": head_dim,
        "n_embd": n_embd,
        "n_inner": need("intermediate_size"),
        "norm_eps": need("rms_norm_eps", float),
        "inv_freq": rope_inv_freq(need, head_dim, rope_type),
        "tied": config.get("tie_word_embeddings", False),
        "qkv_bias": family == "Qwen2ForCausalLM",
        "qk_norm": family == "Qwen3ForCausalLM",
    }


def rope_inv_freq(need, head_dim, rope_type):
    """RoPE's angle per position of each channel pair, a tuple: plain, or as Llama 3.1 and later."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    inv_freq = need("rope_theta", float) ** -exponent  # (D / 2,)
    if rope_type == "llama3":
        # pairs that turn often within the original length stay, those that turn little slow down
        low, high = need("low_freq_factor", float), need("high_freq_factor", float)
        require(low < high, f"low_freq_factor is {low}, and must be below high_freq_factor, {high}")
        n_turns = need("original_max_position_embeddings") * inv_freq / (2 * math.pi)
        keep = ((n_turns - low) / (high - low)).clamp(0, 1)
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / need("factor", float)
    return tuple(inv_freq.tolist())


def read_weights(folder, model, dtype, device):
    """The parameters of `model`, read from the folder's safetensors: {name: tensor}.

    Files are mapped, not copied, and tensors converted one by one: all are in memory once.
    """
    safetensors = optional_package("safetensors")
    weights = {}
    for path in weight_files(folder):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (it is no dict)
                    weights[name] = file.get_tensor(name).to(device, dtype)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} cannot be read, maybe half a download: {error}") from None

    parameters = {name_in_file(name): weight for name, weight in model.named_parameters()}
    for name, parameter in parameters.items():
        require(name in weights, f"{folder} lacks the tensor {name}")
        shape, must = tuple(weights[name].shape), tuple(parameter.shape)
        require(shape == must, f"{folder}: {name} has shape {shape}, and must have {must}")
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    if model.config.tied and head in weights:  # the file may repeat the embedding
        require(torch.equal(weights.pop(head), weights[embed]),
                f"{folder}: tie_word_embeddings is true, but {head} is not {embed}")
    for name in weights:  # old files repeat RoPE's inv_freq, which config.json says
        require(name in parameters or name.endswith("rotary_emb.inv_freq"),
                f"{folder} holds {name}, which such a model does not have")
    return {name: weights[name_in_file(name)] for name, _ in model.named_parameters()}


def name_in_file(name):
    """The name that a parameter of Llama has in a checkpoint."""
    return name if name == "lm_head.weight" else "model." + name.replace("embed.", "embed_tokens.")


def weight_files(folder):
    """The safetensors of a folder: those that the index names, or a single one."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        require(isinstance(weight_map, dict), f"{index}: weight_map is not a JSON object")
        for name, file in weight_map.items():
            require(isinstance(file, str), f"{index}: {name} is in {file!r}, which is no file name")
        names = set(weight_map.values())
    for name in sorted(names):
        require((folder / name).is_file(),
                f"there is no {folder / name}; weights are read from safetensors only")
        yield folder / name


def read_json(path):
    require(path.is_file(), f"there is no {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    require(isinstance(content, dict), f"{path} is not a JSON object")
    return content


def optional_package(name):
    """Import safetensors or tokenizers, which only pretrained models need."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"pretrained models need the package {name}: "
                         "pip install -r requirements-pretrained.txt") from None


# ---- text


def load_tokenizer(folder):
    """The Tokenizer of a local folder."""
    return Tokenizer(Path(folder))


class Tokenizer:
    """Text to token ids and back, by the folder's tokenizer.json.

    eos_ids: the tokens that end a text; special_ids: those that are never printed (sets of int).
    """

    def __init__(self, folder):
        path = folder / "tokenizer.json"
        tokenizers = optional_package("tokenizers")
        require(path.is_file(), f"there is no {path}")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more specific
            raise ValueError(f"{path} cannot be read: {error}") from None
        self.tokenizer.no_truncation()  # settings of somebody's training
        self.tokenizer.no_padding()
        added = self.tokenizer.get_added_tokens_decoder()
        self.special_ids = {token_id for token_id, token in added.items() if token.special}
        self.eos_ids = set()
        for name in ("config.json", "generation_config.json"):
            if (folder / name).is_file():
                eos = read_json(folder / name).get("eos_token_id")
                eos_list = eos if isinstance(eos, list) else [eos]
                self.eos_ids.update(token_id for token_id in eos_list if type(token_id) is int)
        self.is_byte_level = self.tokenizer.token_to_id("<0x0A>") is None  # see `token_bytes`
        self._in_stream = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def encode(self, text):
        """The ids of a text, after a begin token where tokenizer.json asks for one."""
        # surrogates: bytes of the command line or of a file that are not UTF-8
        text = text.encode(errors="surrogateescape").decode(errors="replace")
        return self.tokenizer.encode(text).ids

    def encode_file(self, path):
        """The token ids of a text file, as an array."""
        require(path.is_file(), f"there is no file {path} to score")
        ids = self.encode(path.read_bytes().decode(errors="replace"))
        require(len(ids) > 1, f"{path} is too short to score: the first token is only read")
        return np.array(ids)

    def decode(self, ids, is_end=False):
        """The text of the next ids; a character whose bytes are not all there yet waits for them.

        is_end: nothing will follow; what is still waiting is shown as U+FFFD. A single call with
        is_end decodes a text from its beginning; ids that come in several calls follow a prompt.
        """
        text = self._decoder.decode(b"".join(map(self.token_bytes, ids)), is_end)
        is_whole_text = is_end and not self._in_stream
        self._in_stream = not is_end
        if is_whole_text and not self.is_byte_level:
            # A vocabulary with byte tokens such as <0x0A> also puts a space before a text;
            # dropped here.
            text = text.removeprefix(" ")
        return text

    def token_bytes(self, token_id):
        """A token's text in UTF-8, maybe only part of a character; nothing for a special token.

        Llama 3, SmolLM2 and Qwen spell each byte as a character of GPT-2's alphabet ("Ġthe");
        Llama 2, TinyLlama and Mistral write "▁" for a space, and single bytes as "<0x0A>".
        """
        token = self.tokenizer.id_to_token(token_id)
        if token is None or token_id in self.special_ids:
            return b""
        if self.is_byte_level and BYTES.keys() >= set(token):
            return bytes(BYTES[char] for char in token)
        if not self.is_byte_level and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[1:-1], 16)])
        return token.replace("▁", " ").encode()

    def separators(self, characters=SEPARATORS):
        """The ids of the tokens whose text, spaces aside, consists of these characters only.

        The paper lists a few by hand for Llama 3, single and double spaces among them. This rule
        leaves the spaces out, and adds such as "..." and, often the end of a paragraph, ".\\n\\n".
        """
        separators = []
        for token_id in range(self.tokenizer.get_vocab_size(with_added_tokens=True)):
            text = self.token_bytes(token_id).decode(errors="replace").replace(" ", "")
            if text and set(text) <= set(characters):
                separators.append(token_id)
        return tuple(separators)


def gpt2_alphabet():
    """GPT-2's spelling of bytes, {character: byte}: printable ones, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTES = gpt2_alphabet()
