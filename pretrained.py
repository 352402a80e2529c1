"""Models from disk: a checkpoint of train.py, or a pretrained model in a Hugging Face folder.

The one idea: nothing here computes. Llama, Mistral and Qwen are `model.GPT`, whose parameters have
the names that Hugging Face gives them (q, k and v are joined). So config.json becomes a GPTConfig
(`read_config`), and the tensors of safetensors are the weights (`read_weights`). With attn="sep"
this is SepLLM's training-free setting. Of a folder no pickle is opened and no code runs; a
checkpoint is read with `weights_only`.
"""
import json
from pathlib import Path

import torch

from data.tokenizer import PACKAGES, SEPARATORS, ByteTokenizer, Tokenizer
from model import GPT, GPTConfig
from options import explain, read_json, require

try:
    import safetensors.torch
except ImportError:  # only pretrained models need it
    safetensors = None


def load_model(path, dtype=torch.float32, device="cpu", **attention):
    """The GPT at `path`, in evaluation mode: a checkpoint, or the folder of a pretrained model.

    attention: fields of SepConfig to change. separators may be token ids, or a str of characters:
    a token of these characters is a separator. A checkpoint keeps the fields that are not given
    here. The folder of a pretrained model has no such fields; for it they are

        attn         "sep"
        separators   the usual characters
        window       256, as in the paper with Llama-3-8B
        max_seps     256; the paper has no such limit
        block_size   its max_position_embeddings

    With these, a token sees about 500 others.
    dtype: of the weights; training needs float32, whatever the files hold.
    The model's tokenizer_json is the text of its tokenizer.json, or None.
    ValueError says in one sentence what is missing or not supported.
    """
    path = Path(path)
    if (path / "ckpt.pt").exists():
        path /= "ckpt.pt"
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
        attention["separators"] = tokenizer_of(model).separators(separators)
    model.configure(**attention)
    return model.to(device, dtype).eval()


def tokenizer_of(model):
    """The tokenizer of a model from disk. ValueError if there is none."""
    if model.tokenizer_json is not None:
        return Tokenizer(model.tokenizer_json)
    require(model.config.vocab_size == 256, "the model works on token ids; to read and write text "
            "it needs the tokenizer.json that they are of")
    return ByteTokenizer()


def load_checkpoint(path):
    """The GPT in a checkpoint, and the rest of its state. ValueError if it is none, or damaged."""
    require(path.exists(), f"{path}: there is no such file or folder")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["info"] = json.loads(state["info"])
        config = GPTConfig(**state["info"]["model_config"])
        tokenizer_json = state["info"]["data"].get("tokenizer")
        weights = state.pop("model")
    except Exception as error:  # whatever a damaged or foreign file leads to
        raise ValueError(f"{path} is no whole checkpoint, as python train.py makes them "
                         f"({type(error).__name__})") from None
    model = GPT(config)  # what goes wrong here is no fault of the file
    model.load_state_dict(weights)
    model.tokenizer_json = tokenizer_json
    return model, state


def load_folder(folder, dtype):
    """The GPT in a Hugging Face folder, as `hf download` leaves it."""
    require(safetensors, PACKAGES)
    path = folder / "config.json"
    with explain(f"{path}: a setting is missing or no number", KeyError, TypeError):
        config = read_config(path)
    with torch.device("meta"):  # parameters without memory, to be replaced by what is read
        model = GPT(config)
    with explain(f"{folder} holds no such weights as config.json says", KeyError, RuntimeError):
        model.load_state_dict(read_weights(folder, model, dtype), assign=True)
    path = folder / "tokenizer.json"
    model.tokenizer_json = path.read_text("utf-8") if path.is_file() else None
    return model


# ---- config.json

# fields of GPTConfig, and their keys in config.json
SHAPE = {"block_size": "max_position_embeddings", "vocab_size": "vocab_size",
         "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
         "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "head_dim": "head_dim",
         "n_inner": "intermediate_size", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta",
         "tied": "tie_word_embeddings"}
OPTIONAL = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False,
            "rope_theta": 10000.0, "rope_type": "default"}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# keys that change what is computed, with all values that are supported; biases and quantized
# weights show as tensors of other names
SUPPORTED = {"model_type": ("llama", "mistral", "qwen2", "qwen3"), "hidden_act": ("silu", None),
             "rope_type": ("llama3", "default"), "type": ("default", None),
             "partial_rotary_factor": (1.0, None),
             # in rope_parameters: other settings for another type of layers
             "full_attention": (None,)}


def read_config(path):
    """The GPTConfig of a model by its config.json, without settings of the attention."""
    config = read_json(path)
    # Older files have rope_theta and maybe rope_scaling, newer ones rope_parameters. Some files
    # have both. Programs differ in which of them they follow, so both must say the same.
    older = config | (config.get("rope_scaling") or {})
    config = older | (config.get("rope_parameters") or {})
    require(older.items() <= config.items(),
            f"{path}: rope_parameters must agree with rope_theta and rope_scaling")
    config = OPTIONAL | config
    for key, values in SUPPORTED.items():
        require(config.get(key) in values,
                f"{path}: {key} is {config.get(key)!r}, and must be one of {values}")
    require(not slides(config), f"{path}: sliding_window is "
            f"{config.get('sliding_window', 4096)}, and must be null: no layer may slide")
    llama3 = {key: config[key] for key in LLAMA3} if config["rope_type"] == "llama3" else {}
    numbers = llama3 | {key: config[key] for key in ("rms_norm_eps", "rope_theta")}
    require(min(numbers.values()) > 0, f"{path}: {numbers} must be above 0")
    shape = {field: config[key] for field, key in SHAPE.items()}
    return GPTConfig(qkv_bias=config["model_type"] == "qwen2",
                     qk_norm=config["model_type"] == "qwen3",
                     rope_scaling=llama3 or None, separators=(), **shape)


def slides(config):
    """Whether any layer may have a sliding window."""
    if config.get("layer_types"):
        return set(config["layer_types"]) != {"full_attention"}
    # Mistral's layers all have it unless it is null, those of the others where they say so
    uses_it = config.get("use_sliding_window", config["model_type"] == "mistral")
    return uses_it and config.get("sliding_window", 4096) is not None


# ---- safetensors


def read_weights(folder, model, dtype):
    """The parameters of `model` from the folder's safetensors: {name: tensor}.

    Files are mapped into memory, and tensors converted one by one: none is in memory twice.
    """
    stored = map_tensors(folder)
    embedding = stored.get("model.embed_tokens.weight")
    weights = {}
    for name, _ in model.named_parameters():  # each is taken out of `stored`
        weights[name] = read_parameter(name, model.config, stored.pop).to(dtype)
    # What is left is no parameter of ours. Two kinds of tensors change nothing: the repeated
    # embedding of a tied model, and RoPE's frequencies in old files.
    for name, tensor in stored.items():
        is_copy = name == "lm_head.weight" and torch.equal(tensor, embedding)
        require(is_copy or name.endswith("inv_freq"),
                f"{folder} holds the tensor {name}, which by config.json it should not")
    return weights


def read_parameter(name, config, take):
    """The parameter `name` of GPT. take(name) is the file's tensor of that name."""
    if name != "lm_head.weight":
        name = f"model.{name}"
    if "qkv_proj" in name:
        return torch.cat([take(name.replace("qkv", part)) for part in "qkv"])
    if "qk_gain" in name:
        # the file has one gain (D,) for all heads
        q_gains = [take(name.replace("qk_gain", "q_norm.weight"))] * config.n_head
        k_gains = [take(name.replace("qk_gain", "k_norm.weight"))] * config.n_kv_head
        return torch.stack(q_gains + k_gains)[:, None]  # (H + H_kv, 1, D)
    return take(name)


def map_tensors(folder):
    """All tensors of the folder's safetensors, mapped: {name: tensor}.

    A single file comes before an index, which may be of an older save: so does transformers. An
    index says for each tensor which file it is read from. Other files may hold one of that name.
    """
    files = ["model.safetensors"]
    weight_map = {}  # {name of a tensor: file}
    index = folder / "model.safetensors.index.json"
    tensors = {}
    with explain(f"{folder}/*.safetensors cannot be read, and other files of weights, which are "
                 "pickles, are not opened", OSError, TypeError, safetensors.SafetensorError):
        if index.is_file() and not (folder / files[0]).is_file():
            weight_map = dict(read_json(index)["weight_map"])
            files = dict.fromkeys(weight_map.values())
        for file in files:
            for name, tensor in safetensors.torch.load_file(folder / file).items():
                if weight_map.get(name, file) == file:
                    tensors[name] = tensor
    return tensors
