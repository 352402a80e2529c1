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

PACKAGES = "safetensors or tokenizers is missing: pip install -r requirements-pretrained.txt"
SEPARATORS = ".,?!;:\n\r"  # the characters that make a token a separator


def load_model(folder, attn="sep", window=256, sinks=4, max_seps=256, separators=None,
               dtype=torch.float32, device="cpu", fixed_every=16):
    """The GPT in a folder, as `hf download` leaves it, in evaluation mode with this attention.

    window: 256, as the paper uses for Llama-3-8B. max_seps: 256, where the paper has no cap; so the
    cache holds about 500 tokens, whatever max_position_embeddings (here block_size) is.
    separators: characters that make a token a separator (str), or token ids; default SEPARATORS.
    dtype: of the weights; training needs float32, whatever the files hold.
    ValueError says in one sentence what is missing or not supported.
    """
    require(safetensors, PACKAGES)
    folder = Path(folder)
    config = read_config(folder / "config.json")
    if separators is None:
        # other attention than sep can do without a tokenizer
        needs_tokenizer = attn == "sep" or (folder / "tokenizer.json").is_file()
        separators = SEPARATORS if needs_tokenizer else ()
    if isinstance(separators, str):
        # a tokenizer may know more tokens than the model
        separators = [token_id for token_id in Tokenizer(folder).separators(separators)
                      if token_id < config.vocab_size]
    with torch.device("meta"):  # parameters without memory, to be replaced by what is read
        model = GPT(config)
    model.configure(attn=attn, window=window, sinks=sinks, max_seps=max_seps,
                    separators=separators, fixed_every=fixed_every)
    model.load_state_dict(read_weights(folder, model, dtype, device), assign=True)
    return model.eval()


# ---- config.json

# fields of GPTConfig, and their keys in config.json
SHAPE = {"block_size": "max_position_embeddings", "vocab_size": "vocab_size",
         "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
         "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "head_dim": "head_dim",
         "n_inner": "intermediate_size", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta",
         "tied": "tie_word_embeddings"}
OPTIONAL = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False,
            "rope_theta": 10000.0}
# keys that change what is computed, with all values that are supported; biases and quantized
# weights show as tensors of other names
SUPPORTED = {"model_type": ("llama", "mistral", "qwen2", "qwen3"), "hidden_act": ("silu", None),
             "rope_type": ("llama3", "default"), "partial_rotary_factor": (1.0, None)}


def read_config(path):
    """The GPTConfig of a model by its config.json, without settings of the attention."""
    config = read_json(path)
    rope = rope_settings(path, config)
    config = OPTIONAL | config | rope
    for key, values in SUPPORTED.items():
        require(config.get(key) in values,
                f"{path}: {key} is {config.get(key)!r}, and must be one of {values}")
    family = config["model_type"]
    try:
        shape = {field: config[key] for field, key in SHAPE.items()}
        # the first max_window_layers layers have full attention; if all do, nothing slides
        slides = config.get("use_sliding_window", family == "mistral")
        if slides and config.get("max_window_layers", 0) < shape["n_layer"]:
            window = config.get("sliding_window", 4096)
            require(window is None, f"{path}: sliding_window is {window}, and must be null")
        return GPTConfig(qkv_bias=family == "qwen2", qk_norm=family == "qwen3",
                         rope_scaling=rope if rope["rope_type"] == "llama3" else None,
                         separators=(), **shape)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: a setting is missing or no number: {error}") from None


def rope_settings(path, config):
    """The RoPE settings as one dict.

    Older files have rope_theta at the top and maybe rope_scaling, newer ones rope_parameters.
    Where a file has both, programs differ in which they follow, so they must agree.
    """
    older = config.get("rope_scaling") or {}
    if "rope_theta" in config:
        older = older | {"rope_theta": config["rope_theta"]}
    newer = config.get("rope_parameters") or older
    require(older.items() <= newer.items(),
            f"{path}: rope_parameters {newer} must agree with the older keys {older}")
    return {"rope_type": newer.get("type", "default")} | newer


def read_json(path):
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
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

    def take(name):
        require(name in stored, f"{folder} lacks the tensor {name}")
        return stored.pop(name)

    weights = {}
    for name, parameter in model.named_parameters():
        weight = read_parameter(name, model.config, take)
        require(weight.shape == parameter.shape,
                f"{folder}: {name} is {tuple(weight.shape)}, and must be {tuple(parameter.shape)}")
        weights[name] = weight.to(device, dtype)
    for name, tensor in stored.items():
        # some files repeat the embedding of a tied model, old ones RoPE's frequencies
        is_copy = name == "lm_head.weight" and torch.equal(tensor, embedding)
        require(is_copy or name.endswith("inv_freq"),
                f"{folder} holds the tensor {name}, which by config.json it should not")
    return weights


def read_parameter(name, config, take):
    """One parameter of GPT, by take(name of a tensor in the file) -> tensor."""
    name = "." + name
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    if "qkv_proj" in name:
        return torch.cat([take(name.replace("qkv", part)) for part in "qkv"])
    if "qk_norm" in name:
        # the file has one gain (D,) for all heads
        q_gains = [take(name.replace("qk", "q"))] * config.n_head
        k_gains = [take(name.replace("qk", "k"))] * config.n_kv_head
        return torch.stack(q_gains + k_gains)[:, None]  # (H + H_kv, 1, D)
    return take(name)


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
            raise ValueError(f"{folder / name} is no whole safetensors file: {error}") from None
    return tensors


# ---- text


class Tokenizer:
    """Text to token ids and back, by the folder's tokenizer.json, as `data.prepare.ByteTokenizer`.

    eos_ids: the tokens that end a text, by config.json and generation_config.json if they exist;
    vocab_size: all ids are below it.
    """

    def __init__(self, folder):
        require(tokenizers, PACKAGES)
        path = Path(folder) / "tokenizer.json"
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more specific
            raise ValueError(f"{path} cannot be read: {error}") from None
        self.tokenizer.no_truncation()  # settings of somebody's training
        self.tokenizer.no_padding()
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1  # there may be holes
        self.eos_ids = set()
        for path in Path(folder).glob("*config.json"):
            eos = read_json(path).get("eos_token_id")
            if isinstance(eos, int):
                eos = [eos]
            self.eos_ids.update(eos or [])

    def encode(self, text, is_first=True):
        """The ids of a text (bytes), a list.

        is_first: of its first piece, which gets a begin token where tokenizer.json asks for one.
        """
        text = text.decode(errors="replace")
        return self.tokenizer.encode(text, add_special_tokens=is_first).ids

    def separators(self, characters=SEPARATORS):
        """The ids of the tokens whose text, spaces aside, consists of these characters only.

        The paper lists a few by hand for Llama 3, single and double spaces among them. This rule
        leaves the spaces out, and adds such as "..." and, often the end of a paragraph, ".\n\n".
        """
        found = []
        for token_id in range(self.vocab_size):
            text = self.tokenizer.decode([token_id])
            if text.strip(" ") and not text.strip(" " + characters):
                found.append(token_id)
        return tuple(found)

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
        self.decode = tokenizer.decode
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
                text += self.flush() + self.added[token_id]
                continue
            self.waiting.append(token_id)
            if self.decode(self.waiting)[-1:] not in ("", "\ufffd"):
                text += self.flush()
        return text

    def flush(self):
        """The text of what still waits, with U+FFFD for incomplete characters."""
        n_before = len(self.decode(self.before))
        text = self.decode(self.before + self.waiting)[n_before:]
        self.before = self.waiting or self.before
        self.waiting = []
        return text
