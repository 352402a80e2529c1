"""Pretrained models: a Hugging Face folder as a GPT, and its tokenizer.

The one idea: nothing here computes. Llama, Mistral and Qwen are `model.GPT` under other names, so a
folder is read by renaming: config.json becomes a GPTConfig (`read_config`), the tensors of
safetensors become weights (`read_weights`), and tokenizer.json makes text (`Tokenizer`). With
attn="sep" this is SepLLM's training-free setting. No pickle is opened, and no code of the folder
runs. Read last.
"""
import json
from pathlib import Path

import torch

from model import GPT, GPTConfig
from sep_cache import require

try:
    import safetensors.torch
    import tokenizers
except ImportError:  # only pretrained models need them
    safetensors = tokenizers = None

PACKAGES = ("pretrained models need the packages safetensors and tokenizers: "
            "pip install -r requirements-pretrained.txt")
SEPARATORS = ".,?!;:\n\r"  # the characters that make a token a separator


def load_model(folder, attn="sep", window=256, sinks=4, max_seps=256, separators=None,
               dtype=None, device=None, fixed_every=16):
    """The GPT in a folder, as `hf download` leaves it, in evaluation mode with this attention.

    window: 256, as the paper uses for Llama-3-8B. max_seps: 256, where the paper has no cap; so the
    cache holds about 500 tokens, whatever max_position_embeddings (here block_size) is.
    separators: characters that make a token a separator (str), or token ids; default SEPARATORS.
    dtype: default float32, which training needs. device: default the CPU.
    ValueError says in one sentence what is missing or not supported.
    """
    require(safetensors is not None, PACKAGES)
    folder = Path(folder)
    shape = read_config(folder / "config.json")
    if separators is None:
        # other attention than sep can do without a tokenizer
        needs_tokenizer = attn == "sep" or (folder / "tokenizer.json").is_file()
        separators = SEPARATORS if needs_tokenizer else ()
    if isinstance(separators, str):
        ids = Tokenizer(folder).separators(separators)
        # a tokenizer may know more tokens than the model
        separators = [token_id for token_id in ids if token_id < shape["vocab_size"]]
    config = GPTConfig(attn=attn, window=window, sinks=sinks, max_seps=max_seps,
                       separators=separators, fixed_every=fixed_every, **shape)
    with torch.device("meta"):  # parameters without memory, to be replaced by what is read
        model = GPT(config)
    weights = read_weights(folder, model, dtype or torch.float32, device or "cpu")
    model.load_state_dict(weights, assign=True)
    return model.eval()


# ---- config.json

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# fields of GPTConfig, and their keys in config.json
SHAPE = {"block_size": "max_position_embeddings", "vocab_size": "vocab_size",
         "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
         "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "head_dim": "head_dim",
         "n_inner": "intermediate_size", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta"}
OPTIONAL = ("num_key_value_heads", "head_dim")  # may be missing or null
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor",
                  "original_max_position_embeddings")
# keys that change what is computed, with the one value that is supported
REQUIRED_SETTINGS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
                     "quantization_config": None, "partial_rotary_factor": 1.0}


def read_config(path):
    """The shape of the model by config.json: fields of GPTConfig, as a dict."""
    config = read_json(path)
    family = config.get("model_type")
    require(family in FAMILIES,
            f"{path}: model_type is {family!r}, and must be one of {', '.join(FAMILIES)}")
    config |= rope_settings(path, config)
    for key, supported in REQUIRED_SETTINGS.items():
        require(config.get(key) in (None, supported),
                f"{path}: {key} is {config.get(key)!r}, and must be {supported!r}")

    def number(key):
        value = config.get(key)
        if value is None and key in OPTIONAL:
            return None
        require(isinstance(value, (int, float)) and value > 0,
                f"{path}: {key} is {value!r}, and must be a positive number")
        return value

    shape = {field: number(key) for field, key in SHAPE.items()}
    if config["rope_type"] == "llama3":
        shape["rope_scaling"] = {key: number(key) for key in LLAMA3_SCALING}
    require(not has_sliding_layers(config),
            f"{path}: sliding_window is {config.get('sliding_window')}, and must be null")
    return {**shape, "tied": bool(config.get("tie_word_embeddings")),
            "qkv_bias": family == "qwen2", "qk_norm": family == "qwen3"}


def rope_settings(path, config):
    """The RoPE settings as one dict, with rope_theta and rope_type.

    Older files have rope_theta at the top and maybe rope_scaling, newer ones rope_parameters.
    Where a file has both, programs differ in which they follow, so they must agree.
    """
    older = dict(config.get("rope_scaling") or {})
    if "rope_theta" in config:
        older["rope_theta"] = config["rope_theta"]
    newer = config.get("rope_parameters") or older
    require(older.items() <= newer.items(),
            f"{path}: rope_parameters {newer} must agree with the older keys {older}")
    settings = {"rope_theta": 10000.0, "rope_type": newer.get("type", "default"), **newer}
    require(settings["rope_type"] in ("default", "llama3"),
            f"{path}: rope_type is {settings['rope_type']!r}, and must be default or llama3")
    return settings


def has_sliding_layers(config):
    """Whether some layers see only a window, by the rules and defaults of transformers."""
    is_on = config.get("use_sliding_window", config["model_type"] == "mistral")
    has_window = config.get("sliding_window", 4096) is not None
    n_full_layers = config.get("max_window_layers", 0)
    return is_on and has_window and n_full_layers < config["num_hidden_layers"]


def read_json(path):
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a JSON object: {error}") from None


# ---- safetensors

# parts of a parameter's name in GPT, and what Hugging Face calls them
RENAMED = {".blocks.": "model.layers.", ".embed.": "model.embed_tokens.", ".norm.": "model.norm.",
           ".head.": "lm_head.", "attn_norm": "input_layernorm",
           "mlp_norm": "post_attention_layernorm", "attn.qkv": "self_attn.qkv_proj",
           "attn.qk_gain": "self_attn.qk_norm.weight", "attn.out": "self_attn.o_proj",
           "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}


def read_weights(folder, model, dtype, device):
    """The parameters of `model` from the folder's safetensors: {name: tensor}.

    Files are mapped into memory, and tensors converted one by one: none is in memory twice.
    """
    stored = map_tensors(folder)
    embedding = stored.get("model.embed_tokens.weight")

    def take(name, *shape):
        found = tuple(stored[name].shape) if name in stored else "missing"
        require(found == shape, f"{folder}: the tensor {name} is {found}, and must be {shape}")
        return stored.pop(name)

    weights = {}
    for name, parameter in model.named_parameters():
        weight = read_parameter(name, parameter.shape, model.config, take)
        weights[name] = weight.to(device, dtype)
    # the file of a tied model may repeat the embedding
    require(torch.equal(stored.pop("lm_head.weight", embedding), embedding),
            f"{folder}: tie_word_embeddings is true, but lm_head.weight is not the embedding")
    for name in stored:  # old files repeat RoPE's frequencies, which config.json says
        require(name.endswith("rotary_emb.inv_freq"),
                f"{folder} holds the tensor {name}, which such a model does not have")
    return weights


def read_parameter(name, shape, config, take):
    """One parameter of GPT, from the tensors of the file: qkv and qk_gain are joined from several.

    take(name, *shape) returns a tensor of the file.
    """
    H, H_kv, D = config.n_head, config.n_kv_head, config.head_dim
    name = "." + name
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    if "qkv_proj" in name:
        return torch.cat([take(name.replace("qkv", part), heads * D, *shape[1:])
                          for part, heads in (("q", H), ("k", H_kv), ("v", H_kv))])
    if "qk_norm" in name:
        # the file has one gain for all heads
        return torch.cat([take(name.replace("qk", part), D).expand(heads, 1, D)
                          for part, heads in (("q", H), ("k", H_kv))])
    return take(name, *shape)


def map_tensors(folder):
    """All tensors of the folder's safetensors, mapped: {name: tensor}."""
    # as in transformers, a single file comes before an index, which may be of an older save
    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / names[0]).is_file():
        names = set(read_json(index).get("weight_map", {}).values())
    tensors = {}
    for name in names:
        try:
            tensors |= safetensors.torch.load_file(folder / name)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder / name} cannot be read (weights are read from whole "
                             f"safetensors files only): {error}") from None
    return tensors


# ---- text


class Tokenizer:
    """Text to token ids and back, by the folder's tokenizer.json, as `data.prepare.ByteTokenizer`.

    eos_ids: the tokens that end a text, by config.json and generation_config.json if they exist;
    vocab_size: all ids are below it.
    """

    def __init__(self, folder):
        require(tokenizers is not None, PACKAGES)
        path = Path(folder) / "tokenizer.json"
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more specific
            raise ValueError(f"{path} cannot be read: {error}") from None
        self.tokenizer.no_truncation()  # settings of somebody's training
        self.tokenizer.no_padding()
        self.ids = sorted(self.tokenizer.get_vocab().values())  # there may be holes
        self.vocab_size = self.ids[-1] + 1
        self.eos_ids = set()
        for path in Path(folder).glob("*config.json"):
            eos = read_json(path).get("eos_token_id")
            self.eos_ids.update(eos if isinstance(eos, list) else [eos])
        self.eos_ids.discard(None)

    def encode(self, text, is_first=True):
        """The ids of a text (str, or bytes of UTF-8), a list.

        is_first: of its first piece, which gets a begin token where tokenizer.json asks for one.
        """
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        return self.tokenizer.encode(text, add_special_tokens=is_first).ids

    def separators(self, characters=SEPARATORS):
        """The ids of the tokens whose text, spaces aside, consists of these characters only.

        The paper lists a few by hand for Llama 3, single and double spaces among them. This rule
        leaves the spaces out, and adds such as "..." and, often the end of a paragraph, ".\n\n".
        """
        texts = self.tokenizer.decode_batch([[token_id] for token_id in self.ids])
        return tuple(token_id for token_id, text in zip(self.ids, texts, strict=True)
                     if text.strip(" ") and set(text) <= {" ", *characters})

    def decoder(self):
        """A new Decoder, for one text."""
        return Decoder(self.tokenizer)


class Decoder:
    """The text of one sequence of tokens as it comes, in whole characters.

    A token is decoded together with those before it, since some decoders drop the first space of
    what they get. Special tokens have no text. (The package's DecodeStream does nearly the same,
    but raises an exception where a byte that is no character changes the text before it.)
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.added = {i: token.content for i, token in added.items() if not token.special}
        self.before = []  # ids whose text has been returned, as many as the next ones need
        self.waiting = []  # ids whose text is not complete

    def step(self, ids):
        """The text of the next ids; a character whose bytes are not all there yet waits."""
        text = ""
        for token_id in ids:
            if token_id in self.added:
                # the tokenizer would read letters as GPT-2's spelling of bytes
                text += self.end() + self.added[token_id]
                continue
            self.waiting.append(token_id)
            waiting_text = self._waiting_text()
            if waiting_text and not waiting_text.endswith("\ufffd"):
                text += self.end()
        return text

    def end(self):
        """The text of what still waits, with U+FFFD for incomplete characters."""
        text = self._waiting_text()
        self.before = self.waiting or self.before
        self.waiting = []
        return text

    def _waiting_text(self):
        # special tokens are skipped
        n_before = len(self.tokenizer.decode(self.before))
        return self.tokenizer.decode(self.before + self.waiting)[n_before:]
