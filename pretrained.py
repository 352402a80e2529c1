"""Models from disk: a checkpoint of train.py, or a pretrained model in a Hugging Face folder.

The one idea: nothing here computes. Llama, Mistral and Qwen are `model.GPT` under other names, so a
folder is read by renaming: config.json becomes a GPTConfig (`read_config`), and the tensors of
safetensors become weights (`read_weights`). With attn="sep" this is SepLLM's training-free setting.
No pickle is opened, and no code of the folder runs.
"""
import json
from pathlib import Path

import torch

from data.tokenizer import PACKAGES, SEPARATORS, load_tokenizer, read_json
from model import GPT, GPTConfig
from options import require

try:
    import safetensors.torch
except ImportError:  # only pretrained models need it
    safetensors = None


def load_model(path, dtype=torch.float32, device="cpu", **attention):
    """The GPT at `path`, in evaluation mode: a checkpoint, or the folder of a pretrained model.

    attention: fields of SepConfig to change. separators are token ids, or characters (str) that
    make a token a separator. A checkpoint has what it was trained with. A folder gets attn="sep",
    the usual separators, window 256, as the paper uses for Llama-3-8B, and max_seps 256, where the
    paper has no cap; so its cache holds about 500 tokens, whatever max_position_embeddings (here
    block_size) is.
    dtype: of the weights; training needs float32, whatever the files hold.
    ValueError says in one sentence what is missing or not supported.
    """
    path = Path(path)
    if path.is_dir() and (path / "ckpt.pt").exists():
        path = path / "ckpt.pt"
    if path.is_dir():
        model = load_folder(path, dtype)
        # other attention than sep can do without a tokenizer
        if attention.get("attn", "sep") == "sep":
            attention = dict(separators=SEPARATORS) | attention
        attention = dict(window=256, max_seps=256) | attention
    else:
        model, _ = load_checkpoint(path)
    separators = attention.get("separators")
    if isinstance(separators, str):
        # a tokenizer may know more tokens than the model
        attention["separators"] = [i for i in tokenizer_of(path, model).separators(separators)
                                   if i < model.config.vocab_size]
    model.configure(**attention)
    return model.to(device, dtype).eval()


def folder_of(path):
    """Where the tokenizer of the model at `path` lies: the path itself, or beside a checkpoint."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def tokenizer_of(path, model):
    """The tokenizer of the model at `path`. ValueError if there is none."""
    tokenizer = load_tokenizer(folder_of(path))
    require(tokenizer.vocabulary or model.config.vocab_size == 256, f"the model {path} works on "
            f"token ids; put their tokenizer.json into {folder_of(path)} to read and write text")
    return tokenizer


def load_checkpoint(path):
    """The GPT in a checkpoint, and the rest of its state. ValueError if it is none, or damaged."""
    require(Path(path).is_file(), f"there is no checkpoint {path}; train one with: python train.py")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["info"] = json.loads(state["info"])
        model = GPT(GPTConfig(**state["info"]["model_config"]))
        model.load_state_dict(state.pop("model"))
    except Exception as error:  # whatever a damaged or foreign file makes the readers say
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged or no checkpoint of this program ({reason})") from None
    return model, state


def load_folder(folder, dtype):
    """The GPT in a Hugging Face folder, as `hf download` leaves it."""
    require(safetensors, PACKAGES)
    with torch.device("meta"):  # parameters without memory, to be replaced by what is read
        model = GPT(read_config(folder / "config.json"))
    model.load_state_dict(read_weights(folder, model, dtype), assign=True)
    return model


# ---- config.json

# fields of GPTConfig, and their keys in config.json
SHAPE = {"block_size": "max_position_embeddings", "vocab_size": "vocab_size",
         "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
         "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "head_dim": "head_dim",
         "n_inner": "intermediate_size", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta",
         "tied": "tie_word_embeddings"}
OPTIONAL = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False,
            "rope_theta": 10000.0}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# keys that change what is computed, with all values that are supported; biases and quantized
# weights show as tensors of other names
SUPPORTED = {"model_type": ("llama", "mistral", "qwen2", "qwen3"), "hidden_act": ("silu", None),
             "rope_type": ("llama3", "default"), "partial_rotary_factor": (1.0, None)}


def read_config(path):
    """The GPTConfig of a model by its config.json, without settings of the attention."""
    config = read_json(path)
    try:
        rope = rope_settings(path, config)
        config = OPTIONAL | config | rope
        for key, values in SUPPORTED.items():
            require(config.get(key) in values,
                    f"{path}: {key} is {config.get(key)!r}, and must be one of {values}")
        is_scaled = config["rope_type"] == "llama3"
        keys = ["rms_norm_eps", "rope_theta", *(LLAMA3 if is_scaled else ())]
        numbers = [config[key] for key in keys]
        require(min(numbers) > 0, f"{path}: {', '.join(keys)} are {numbers}, and must be above 0")
        require(not slides(config), f"{path}: sliding_window is "
                f"{config.get('sliding_window', 4096)}, and must be null: no layer may slide")
        shape = {field: config[key] for field, key in SHAPE.items()}
        return GPTConfig(qkv_bias=config["model_type"] == "qwen2",
                         qk_norm=config["model_type"] == "qwen3",
                         rope_scaling=rope if is_scaled else None, separators=(), **shape)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: a setting is missing or no number: {error}") from None


def slides(config):
    """Whether any layer has a sliding window, by the rules of transformers."""
    window = config.get("sliding_window", 4096)
    if config["model_type"] == "mistral":
        return window is not None
    if config.get("layer_types"):
        return set(config["layer_types"]) != {"full_attention"}
    # the first max_window_layers layers have full attention
    has_sliding_layers = config.get("max_window_layers", 28) < config["num_hidden_layers"]
    return config.get("use_sliding_window", False) and window is not None and has_sliding_layers


def rope_settings(path, config):
    """The RoPE settings as one dict.

    Older files have rope_theta at the top and maybe rope_scaling, newer ones rope_parameters.
    Where a file has both, programs differ in which they follow, so they must agree.
    """
    older = {**(config.get("rope_scaling") or {})}
    if older or "rope_theta" in config:
        older["rope_theta"] = config.get("rope_theta", OPTIONAL["rope_theta"])
    newer = {**(config.get("rope_parameters") or older)}
    require(all(newer.get(key) == value for key, value in older.items()),
            f"{path}: rope_parameters {newer} must agree with the older keys {older}")
    return {"rope_type": newer.get("type", "default")} | newer


# ---- safetensors

# names of parameters in GPT, or parts of them, and what Hugging Face calls them; `read_parameter`
# takes qkv and qk apart
RENAMED = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
           "head.weight": "lm_head.weight"}
RENAMED_PARTS = {
    "blocks.": "model.layers.", "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm", "attn.qkv": "self_attn.qkv_proj",
    "attn.qk_gain": "self_attn.qk_norm.weight", "attn.out": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}


def read_weights(folder, model, dtype):
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
        weights[name] = weight.to(dtype)
    for name, tensor in stored.items():
        # some files repeat the embedding of a tied model, old ones RoPE's frequencies
        is_copy = name == "lm_head.weight" and torch.equal(tensor, embedding)
        require(is_copy or name.endswith("inv_freq"),
                f"{folder} holds the tensor {name}, which by config.json it should not")
    return weights


def read_parameter(name, config, take):
    """One parameter of GPT, by take(name of a tensor in the file) -> tensor."""
    name = RENAMED.get(name, name)
    for ours, theirs in RENAMED_PARTS.items():
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
            raise ValueError(f"{folder / name} is no whole safetensors file, and other files of "
                             f"weights, which are pickles, are not opened: {error}") from None
    return tensors
