"""Pretrained models: equal to Hugging Face's, refused in one sentence, and bounded as streams.

tests/llama_expected.json has a config.json of each family, and logits that Hugging Face's
implementation computed for weights made from a seed: so these tests need no transformers.
`python tests/test_llama.py` computes the logits anew.
"""
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
INSTALL = "pip install -r requirements-pretrained.txt"
safetensors_torch = pytest.importorskip("safetensors.torch", reason=INSTALL)
from conftest import run  # noqa: E402

import llama  # noqa: E402
import sample  # noqa: E402
from sep_cache import SepCache, is_kept, sees  # noqa: E402

EXPECTED_FILE = Path(__file__).with_name("llama_expected.json")
CASES = json.loads(EXPECTED_FILE.read_text())
SEP = {"attn": "sep", "window": 8, "sinks": 2, "max_seps": 3, "separators": (1, 2, 3, 4, 5, 6)}
TOLERANCE = 1e-4  # relative to the largest logit


# ---- checkpoints


def make_weights(config, seed):
    """Random weights in Hugging Face's names, from NumPy's frozen generator.

    No gain is 1 and no bias 0.
    """
    draw = np.random.RandomState(seed).standard_normal
    V, C, inner = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    H = config["num_attention_heads"]
    H_kv = config.get("num_key_value_heads") or H
    D = config.get("head_dim") or C // H
    family = config["architectures"][0]
    weights = {}

    def add(name, *shape):
        values = draw(shape)
        if len(shape) == 2:
            values = values * 1.5 * shape[1] ** -0.5
        elif name.endswith("norm.weight"):
            values = 1 + 0.5 * values
        weights[name] = torch.tensor(values, dtype=torch.float32)

    add("model.embed_tokens.weight", V, C)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        add(layer + "input_layernorm.weight", C)
        add(layer + "post_attention_layernorm.weight", C)
        for name, n_heads in (("q", H), ("k", H_kv), ("v", H_kv)):
            add(f"{layer}self_attn.{name}_proj.weight", n_heads * D, C)
            if family == "Qwen2ForCausalLM":
                add(f"{layer}self_attn.{name}_proj.bias", n_heads * D)
            if family == "Qwen3ForCausalLM" and name != "v":
                add(f"{layer}self_attn.{name}_norm.weight", D)
        add(layer + "self_attn.o_proj.weight", C, H * D)
        add(layer + "mlp.gate_proj.weight", inner, C)
        add(layer + "mlp.up_proj.weight", inner, C)
        add(layer + "mlp.down_proj.weight", C, inner)
    add("model.norm.weight", C)
    if not config["tie_word_embeddings"]:
        add("lm_head.weight", V, C)
    return weights


def save(folder, config, weights):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors_torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_case(name, folder):
    config, seed = CASES[name]["config"], CASES[name]["seed"]
    return save(folder, config, make_weights(config, seed))


def save_with_tokenizer(folder, tokenizer_file):
    config = {**CASES["tinyllama"]["config"], "vocab_size": 400}
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    return save(folder, config, make_weights(config, seed=5))


def make_ids(name, T=48):
    numbers = np.random.RandomState(100 + CASES[name]["seed"])
    return torch.tensor(numbers.randint(CASES[name]["config"]["vocab_size"], size=(2, T)))


def dense_mask(ids, config):
    """Who sees whom, by the definition: (B, 1, T, T) bool."""
    T = ids.shape[1]
    masks = []
    for kept in is_kept(ids, torch.arange(T), config).tolist():
        masks.append([[j <= i and sees(i, j, kept, config) for j in range(T)] for i in range(T)])
    return torch.tensor(masks)[:, None]


def hugging_face_logits(folder, ids, mask=None):
    transformers = pytest.importorskip("transformers")
    family = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, family).from_pretrained(folder, dtype=torch.float32)
    if mask is not None:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    return model(ids, attention_mask=mask).logits


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def in_chunks(model, ids):
    """The logits of a text that is read through a cache: long chunks, short ones, single tokens."""
    cache = SepCache(model.config, len(ids))
    logits = []
    while cache.n_tokens < ids.shape[1]:
        size = random.choice([1, 1, 2, 3, random.randint(4, 30)])
        chunk = ids[:, cache.n_tokens:cache.n_tokens + size]
        logits.append(model(chunk, cache=cache)[0])
    return torch.cat(logits, dim=1)


# ---- equality


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_are_the_stored_ones_of_hugging_face(seed, tmp_path, name):
    folder, ids = save_case(name, tmp_path), make_ids(name)
    for attn in ("full", "sep"):
        model = llama.load_model(folder, **{**SEP, "attn": attn}, device="cpu")
        expected = torch.tensor(CASES[name]["logits"][attn])
        assert relative_error(sample_of(model(ids)[0]), expected) < TOLERANCE
        assert relative_error(sample_of(in_chunks(model, ids)), expected) < TOLERANCE


def sample_of(logits):
    """The part of the logits that is stored: two positions, 6 tokens of the vocabulary."""
    return logits[:, [20, -1], :6]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_equal_hugging_face(seed, tmp_path, name):
    folder, ids = save_case(name, tmp_path), make_ids(name)
    full = llama.load_model(folder, attn="full", device="cpu")
    sep = llama.load_model(folder, **SEP, device="cpu")
    for model, mask in ((full, None), (sep, dense_mask(ids, sep.config))):
        expected = hugging_face_logits(folder, ids, mask)
        assert relative_error(model(ids)[0], expected) < TOLERANCE
        assert relative_error(in_chunks(model, ids), expected) < TOLERANCE


@torch.no_grad()
def test_beyond_max_position_embeddings_separators_leave_at_the_horizon(seed, tmp_path):
    """Without sinks the mask says everything, so Hugging Face's implementation is the oracle."""
    folder, ids = save_case("llama-3.2", tmp_path), make_ids("llama-3.2", T=200)
    model = llama.load_model(folder, window=8, sinks=0, max_seps=None, separators=(1, 2, 3),
                             device="cpu")
    expected = hugging_face_logits(folder, ids, dense_mask(ids, model.config))
    assert relative_error(model(ids)[0], expected) < TOLERANCE
    assert relative_error(in_chunks(model, ids), expected) < TOLERANCE


@torch.no_grad()
def test_beyond_max_position_embeddings_sinks_stay_within_it(seed, tmp_path, monkeypatch):
    """Sinks are scored as if the query stood at most at `block_size - 1`.

    The oracle is dense attention by this definition.
    """
    folder, ids = save_case("tinyllama", tmp_path), make_ids("tinyllama", T=200)
    model = llama.load_model(folder, **SEP, device="cpu")
    streamed = in_chunks(model, ids)
    T, sinks, horizon = ids.shape[1], model.config.sinks, model.config.block_size
    mask = dense_mask(ids, model.config)
    position = torch.arange(T)
    excess = position.clamp(max=horizon - 1) - position
    rotate = excess[:, None] * torch.tensor(model.config.inv_freq)  # (T, D / 2)

    def dense_attend(q, k, v, layout, config, q_sink=None):
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        pairs = torch.complex(*q.double().chunk(2, dim=-1))
        pairs = pairs * torch.polar(torch.ones_like(rotate), rotate)
        rotated = torch.cat([pairs.real, pairs.imag], dim=-1).float()
        left_window = position[:, None] - position >= config.window
        is_sink = left_window & (position < sinks)  # (T, T)
        scores = torch.where(is_sink, rotated @ k.mT, q @ k.mT) * q.shape[-1] ** -0.5
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v

    monkeypatch.setattr(llama, "attend", dense_attend)
    assert relative_error(streamed, model(ids)[0]) < TOLERANCE


@torch.no_grad()
def test_loss_is_the_mean_cross_entropy(tmp_path):
    model = llama.load_model(save_case("qwen3", tmp_path), attn="full", device="cpu")
    ids = make_ids("qwen3")
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = -1
    logits, loss = model(ids, targets)
    log_p = logits[:, :-1].log_softmax(-1).gather(2, targets[:, :-1, None])
    assert abs(loss + log_p.mean()) < 1e-5


# ---- reading a folder


def test_several_files_and_old_buffers_are_read_and_bfloat16_stays_as_it_is(tmp_path):
    folder = save_case("tinyllama", tmp_path)
    weights = make_weights(CASES["tinyllama"]["config"], seed=5)
    weights = {name: weight.bfloat16() for name, weight in weights.items()}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((names[:7], names[7:])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        safetensors_torch.save_file({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    # another file in the folder, as Mistral's repository has it, is not read
    (folder / "consolidated.safetensors").write_bytes(b"not this one")

    model = llama.load_model(folder, attn="full", dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    up_proj = model.layers[1].mlp.up_proj.weight
    assert torch.equal(up_proj, weights["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    default = llama.load_model(folder, attn="full", device="cpu")
    assert {p.dtype for p in default.parameters()} == {torch.float32}


def memory_of_this_process():
    """Bytes of memory that is not a mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_weights_that_need_no_conversion_are_not_copied(tmp_path):
    config = {**CASES["tinyllama"]["config"], "hidden_size": 1024, "intermediate_size": 4096}
    weights = {name: weight.bfloat16() for name, weight in make_weights(config, seed=0).items()}
    nbytes = sum(weight.nbytes for weight in weights.values())
    save(tmp_path, config, weights)
    before = memory_of_this_process()
    model = llama.load_model(tmp_path, attn="full", dtype=torch.bfloat16, device="cpu")
    assert sum(p.sum() for p in model.parameters()).isfinite()  # all of it has been looked at
    assert memory_of_this_process() - before < nbytes / 4


def test_a_tied_models_file_may_repeat_the_embedding_but_not_contradict_it(tmp_path):
    config = CASES["smollm2"]["config"]
    weights = make_weights(config, seed=4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    llama.load_model(save(tmp_path, config, weights), attn="full", device="cpu")
    weights["lm_head.weight"][0, 0] += 1
    with pytest.raises(ValueError, match="tie_word_embeddings is true, but lm_head.weight"):
        llama.load_model(save(tmp_path, config, weights), attn="full", device="cpu")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
UNSUPPORTED_KEYS = [
    ({"architectures": ["GemmaForCausalLM"]},
     "names GemmaForCausalLM, and must name one of LlamaForCausalLM, Mistral"),
    ({"architectures": None}, "names no architecture"),
    ({"architectures": 3}, "names no architecture"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'silu' is supported"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}},
     "RoPE type is 'yarn', and must be default or llama3"),
    ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}},
     "low_freq_factor is None, and must be a positive float"),
    ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "factor is '8', and must be a positive float"),
    ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "must be below high_freq_factor"),
    ({"rope_scaling": [1]}, r"the RoPE settings are \[1\], and not an object"),
    ({"rope_theta": None}, "rope_theta is None, and must be a positive float"),
    ({"rope_theta": float("nan")}, "rope_theta is nan"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, and only 1.0 is supported"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "RoPE type is 'dynamic'"),
    ({"vocab_size": None}, "vocab_size is None, and must be a positive int"),
    ({"vocab_size": 1e30}, "vocab_size is 1e[+]30, and must be a positive int"),
    ({"vocab_size": 10 ** 30}, "vocab_size is 10+, and must be a positive int below 1e12"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True, and must be a positive int"),
    ({"num_key_value_heads": -1}, "num_key_value_heads is -1, and must be a positive int"),
    ({"num_key_value_heads": "2"}, "num_key_value_heads is '2', and must be a positive int"),
    ({"head_dim": "8"}, "head_dim is '8', and must be a positive int"),
    ({"head_dim": 7}, "head_dim is 7, and must be even"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny', and must be a positive float"),
    ({"num_key_value_heads": 3},
     "num_attention_heads is 8, and must be a multiple of num_key_value_heads, which is 3"),
    ({"architectures": ["MistralForCausalLM"], "sliding_window": 32}, "sliding_window is 32"),
    ({"architectures": ["MistralForCausalLM"]}, "sliding_window is 4096"),  # the default
    ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32, "use_sliding_window": True},
     "sliding_window is 32"),
    ({"architectures": ["Qwen3ForCausalLM"]},
     "lacks the tensor model.layers.0.self_attn.q_norm.weight"),
    ({"num_hidden_layers": 3}, "lacks the tensor model.layers.2.input_layernorm.weight"),
    ({"num_hidden_layers": 1},
     "holds model.layers.1.input_layernorm.weight, which such a model does not have"),
    ({"intermediate_size": 81}, r"gate_proj.weight has shape \(80, 64\), and must have \(81, 64\)"),
]


@pytest.mark.parametrize("change, sentence", UNSUPPORTED_KEYS)
def test_what_is_not_supported_is_named_in_one_sentence(tmp_path, change, sentence):
    config = CASES["tinyllama"]["config"]
    save(tmp_path, {**config, **change}, make_weights(config, seed=5))
    with pytest.raises(ValueError, match=sentence) as error:
        llama.load_model(tmp_path, attn="full", device="cpu")
    assert "\n" not in str(error.value)


HALF = object()
BROKEN_FILES = [  # name, its content, or None: no such file
    ("config.json", None, "there is no .*config.json"),
    ("config.json", b"{", "config.json is not JSON"),
    ("config.json", b"[]", "config.json is not a JSON object"),
    ("config.json", b"[" * 100_000, "config.json is not JSON"),
    ("model.safetensors", None,
     "there is no .*model.safetensors; weights are read from safetensors only"),
    ("model.safetensors", HALF, "model.safetensors cannot be read, maybe half a download"),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1",
     "model.safetensors cannot be read"),
    ("model.safetensors.index.json", b'{"weight_map": {"model.norm.weight": "part-1.safetensors"}}',
     "there is no .*part-1.safetensors"),
    ("model.safetensors.index.json", b'{"weight_map": []}', "weight_map is not a JSON object"),
    ("model.safetensors.index.json", b'{"weight_map": {"a": 3}}',
     "a is in 3, which is no file name"),
    ("tokenizer.json", None, "there is no .*tokenizer.json"),
    ("tokenizer.json", b"{}", "tokenizer.json cannot be read"),
]


@pytest.mark.parametrize("name, content, sentence", BROKEN_FILES)
def test_a_broken_folder_is_described_in_one_sentence(tmp_path, tokenizer_file, name, content,
                                                      sentence):
    folder = save_with_tokenizer(tmp_path, tokenizer_file)
    path = folder / name
    if content is None:
        path.unlink()
    elif content is HALF:
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        llama.load_model(folder, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["safetensors", "tokenizers"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, tokenizer_file,
                                                                      monkeypatch, package):
    folder = save_with_tokenizer(tmp_path, tokenizer_file)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"need the package {package}: {INSTALL}"):
        llama.load_model(folder, device="cpu")


# ---- text


TEXT = """The first line, a short one; the second? No! Tabs:\tand breaks.\r\n\r\n\
Äpfel, Öl & Überfluss ... 12:30, 3.14!
日本語のテキスト。 Emoji 🙂🙃, and more — “quoted” text; \
code: x = {'a': [1, 2]};\n\n\tif x: return!\n"""


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A byte-level BPE tokenizer trained on TEXT, with a begin and an end token.

    Its settings for padding and truncation are left from training.
    """
    tokenizers = pytest.importorskip("tokenizers", reason=INSTALL)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    # as in Llama 3: punctuation takes the line breaks after it into its token
    words = tokenizers.Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                             r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(words, "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|begin|>", "<|end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def tokenizer(tokenizer_file, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    return llama.load_tokenizer(tmp_path)


def byte_fallback_tokenizer(folder):
    """As Llama 2 and Mistral have it.

    A space belongs to the word after it, and unknown characters are single bytes.
    """
    tokenizers = pytest.importorskip("tokenizers", reason=INSTALL)
    words = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    words += list("▁.,?!;:abcdefgh") + ["▁a", "▁."]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocabulary, [("▁", "a"), ("▁", ".")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return llama.load_tokenizer(folder)


def test_separators_are_the_tokens_of_separator_characters(tokenizer):
    """The rule, on the vocabulary itself: bytes in GPT-2's alphabet (Ġ: space, Ċ: line break)."""
    vocabulary = tokenizer.tokenizer.get_vocab()
    alphabet = set(".,?!;:ĊčĉĠ")
    expected = {token_id for token, token_id in vocabulary.items()
                if set(token) <= alphabet and set(token) != {"Ġ"}}
    separators = tokenizer.separators()
    assert set(separators) == expected and list(separators) == sorted(separators)
    texts = {tokenizer.decode([token_id], is_end=True) for token_id in separators}
    # with several characters, too
    assert {".", ",", "?", "!", ";", ":", "\n", "\t", "!\n", " ..."} <= texts
    assert not texts & {" ", "a", "", "“", "};", "。"}

    only_stops = {tokenizer.decode([token_id], is_end=True)
                  for token_id in tokenizer.separators(".?!")}
    assert {".", "?", "!", " ..."} <= only_stops and not only_stops & {",", "\n", "!\n"}
    assert tokenizer.separators("") == ()


def test_separators_of_a_vocabulary_with_byte_tokens(tmp_path):
    tokenizer = byte_fallback_tokenizer(tmp_path)
    texts = [tokenizer.decode([token_id], is_end=True) for token_id in tokenizer.separators()]
    # the bytes 0x09 ... of the ASCII characters, the characters themselves, and "▁."
    assert sorted(text.strip(" ") for text in texts) == sorted("\t\n\r" + ".,?!;:" * 2 + ".")


@torch.no_grad()
def test_separators_of_the_model_are_those_of_the_tokenizer_or_the_given_ones(tmp_path,
                                                                              tokenizer_file):
    folder = save_with_tokenizer(tmp_path, tokenizer_file)
    tokenizer = llama.load_tokenizer(folder)
    assert llama.load_model(folder, device="cpu").config.separators == tokenizer.separators()
    stops = llama.load_model(folder, separators=".?!", device="cpu")
    assert stops.config.separators == tokenizer.separators(".?!")
    assert llama.load_model(folder, separators=(5, 7), device="cpu").config.separators == (5, 7)
    with pytest.raises(ValueError, match="separators must be ids below vocab_size, which is 400"):
        llama.load_model(folder, separators=(400,), device="cpu")


def test_the_begin_token_is_added_and_nothing_is_cut_or_padded(tokenizer):
    for text in ("", "a", TEXT):
        ids = tokenizer.encode(text)
        assert ids[0] == 0 and ids.count(0) == 1
        assert tokenizer.decode(ids, is_end=True) == text


def test_a_file_is_read_as_one_text(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode() + b"\xff")
    assert tokenizer.encode_file(path).tolist() == tokenizer.encode(TEXT + "\ufffd")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="text.txt is too short to score"):
        tokenizer.encode_file(path)


def test_end_of_text_tokens_come_from_both_files(tokenizer):
    assert tokenizer.eos_ids == {1, 7}
    assert tokenizer.special_ids == {0, 1}


def chunks_of(tokenizer, ids):
    return [tokenizer.decode([token_id]) for token_id in ids] + [tokenizer.decode([], is_end=True)]


TEXTS = (TEXT, " a  b a. a.b  ", "🙂" * 50, "e\ufffdf\ufffd\ufffdg", "")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "byte fallback"])
def test_streamed_text_is_the_whole_text_in_whole_characters(tokenizer, tmp_path, kind, text):
    if kind == "byte fallback":
        tokenizer = byte_fallback_tokenizer(tmp_path)
    ids = tokenizer.encode(text)
    chunks = chunks_of(tokenizer, ids)
    # a stream follows a prompt, so the space that such a tokenizer puts before a text stays
    streamed = " " + text if kind == "byte fallback" and text else text
    assert "".join(chunks) == streamed
    assert tokenizer.decode(ids, is_end=True) == text
    assert text == tokenizer.tokenizer.decode(ids, skip_special_tokens=True)  # the package's own
    # it comes as it is written: after each token, all whole characters so far
    n_bytes = 0
    for n, token_id in enumerate(ids):
        n_bytes += len(tokenizer.token_bytes(token_id))
        so_far = streamed.encode()[:n_bytes].decode(errors="ignore")
        assert "".join(chunks[:n + 1]) == so_far


def test_a_stream_keeps_the_space_after_its_prompt_and_a_sample_drops_the_first(tmp_path):
    tokenizer = byte_fallback_tokenizer(tmp_path)
    prompt = tokenizer.encode("b")
    new_ids = tokenizer.encode("a c")  # "▁a", "▁", "c"
    for _ in range(2):  # one text after the other
        assert "".join(chunks_of(tokenizer, new_ids)) == " a c"
        assert tokenizer.decode(prompt + new_ids, is_end=True) == "b a c"
        assert tokenizer.decode(new_ids[:1]) + tokenizer.decode(new_ids, is_end=True) == " a a c"


@torch.no_grad()
def test_attention_bias_null_counts_as_false(tmp_path):
    config = {**CASES["tinyllama"]["config"], "attention_bias": None}
    save(tmp_path, config, make_weights(config, seed=5))
    assert llama.load_model(tmp_path, attn="full", device="cpu").config.qkv_bias is False


def test_random_tokens_stream_as_valid_utf8_and_without_special_tokens(seed, tokenizer):
    for _ in range(20):
        ids = [random.randrange(400) for _ in range(200)]
        text = "".join(chunks_of(tokenizer, ids))
        assert text == tokenizer.tokenizer.decode(ids, skip_special_tokens=True)
        text.encode("utf-8")


# ---- streams


@torch.inference_mode()
def test_200_000_tokens_take_constant_memory(seed, tmp_path):
    config = {**CASES["llama-3.2"]["config"], "num_hidden_layers": 1,
              "max_position_embeddings": 512}
    save(tmp_path, config, make_weights(config, seed=2))
    model = llama.load_model(tmp_path, window=64, max_seps=32, separators=(1, 2, 3, 4, 5, 6),
                             device="cpu")
    cache = SepCache(model.config)
    nbytes, address = cache.nbytes, cache.kv.data_ptr()
    while cache.n_tokens < 200_000:
        logits, _ = model(torch.randint(61, (1, 1000)), cache=cache)
    logits, _ = model(torch.randint(61, (1, 1)), cache=cache)
    assert logits.isfinite().all() and cache.n_tokens == 200_001
    assert cache.nbytes == nbytes and cache.kv.data_ptr() == address
    assert cache.nbytes_of(cache.n_tokens) > 1000 * nbytes  # an ordinary cache
    assert cache.n_visible_keys == 4 + 32 + 64


def test_greedy_generation_equals_greedy_full_forwards(seed, tmp_path):
    model = llama.load_model(save_case("smollm2", tmp_path), **SEP, device="cpu")
    ids = make_ids("smollm2", T=12)
    generated = torch.stack(list(model.generate(ids, 20, temperature=0)), dim=1)
    for _ in range(20):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids)[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids[:, 12:], generated)


def test_a_folder_samples_streams_and_scores(tmp_path, tokenizer_file, monkeypatch):
    """What `hf download` leaves is what `sample.py --ckpt` takes."""
    save_with_tokenizer(tmp_path, tokenizer_file)
    options = ("--ckpt", tmp_path, "--window", 8, "--max_seps", 4, "--device", "cpu")
    code, out, err = run(sample, *options, "--prompt", "It is", "--max_new_tokens", 30,
                         "--num_samples", 2)
    assert code == 0 and out.startswith("It is") and out.count("---") == 2, err
    code, out, err = run(sample, *options, "--stream", "--max_new_tokens", 100)
    assert code == 0 and "100 tokens in" in err and "<|" not in out, err
    (tmp_path / "text.txt").write_text(TEXT)
    for attn in ("full", "streamingllm", "fixed", "sep"):
        code, out, err = run(sample, *options, "--attn", attn, "--score", tmp_path / "text.txt")
        assert code == 0 and "| all" in out and "keys used" in err, err
    code, _, err = run(sample, *options, "--window", 0)
    assert code == 2 and "window is 0" in err
    code, _, err = run(sample, "--ckpt", tmp_path / "text.txt")
    assert code == 1 and "damaged or not a checkpoint" in err


def test_the_table_of_a_pretrained_model_is_printed(tmp_path, tokenizer_file):
    pytest.importorskip("matplotlib", reason="experiments/results.py needs it")
    from experiments import results
    save_with_tokenizer(tmp_path, tokenizer_file)
    (tmp_path / "text.txt").write_text(TEXT * 3)
    code, out, err = run(results, "--model", tmp_path, "--text", tmp_path / "text.txt")
    assert code == 0 and len(out.splitlines()) == 2 + 1 + 3 * 4, err
    code, _, err = run(results, "--model", tmp_path)
    assert code == 2 and "--model and --text go together" in err
    code, _, err = run(results, "--model", tmp_path, "--text", tmp_path / "none.txt")
    assert code == 1 and "there is no file" in err


def test_separators_can_be_other_characters(tmp_path, tokenizer_file, monkeypatch):
    save_with_tokenizer(tmp_path, tokenizer_file)
    configs = []
    score = sample.score
    monkeypatch.setattr(sample, "score",
                        lambda model, *args: configs.append(model.config) or score(model, *args))
    (tmp_path / "text.txt").write_text(TEXT)
    for characters in (".", ".,"):
        code, _, err = run(sample, "--ckpt", tmp_path, "--score", tmp_path / "text.txt",
                           "--separators", characters, "--device", "cpu")
        assert code == 0, err
    tokenizer = llama.load_tokenizer(tmp_path)
    expected = [tokenizer.separators("."), tokenizer.separators(".,")]
    assert [config.separators for config in configs] == expected


def test_an_end_of_text_token_ends_a_sample_and_not_a_stream(tmp_path, tokenizer_file, monkeypatch):
    save_with_tokenizer(tmp_path, tokenizer_file)
    end = 1
    letter = llama.load_tokenizer(tmp_path).encode("a")[-1]

    def generate(self, ids, max_new_tokens, *rest):
        for i in range(min(max_new_tokens, 50)):
            yield torch.tensor([end if i in (3, 7) else letter] * len(ids))

    monkeypatch.setattr(llama.Llama, "generate", generate)
    settings = tmp_path / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": end}))
    options = ("--ckpt", tmp_path, "--device", "cpu", "--max_new_tokens", 20, "--prompt", "b")
    assert run(sample, *options)[1] == "baaa\n---\n"
    assert run(sample, *options, "--stream")[1].strip() == "a" * 18


def write_expected():
    """Compute the stored logits anew with Hugging Face's implementation."""
    import tempfile
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            folder, ids = save_case(name, Path(folder)), make_ids(name)
            config = llama.load_model(folder, **SEP, device="cpu").config
            full = hugging_face_logits(folder, ids)
            sep = hugging_face_logits(folder, ids, dense_mask(ids, config))
        CASES[name]["logits"] = {"full": rounded(sample_of(full)), "sep": rounded(sample_of(sep))}
    lines = []
    for name, case in CASES.items():
        fields = [f'    "{key}": {json.dumps(value)}' for key, value in case.items()]
        lines.append(f'  "{name}": {{\n' + ",\n".join(fields) + "\n  }")
    EXPECTED_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def rounded(logits):
    return [[[round(value, 5) for value in position] for position in sequence]
            for sequence in logits.tolist()]


if __name__ == "__main__":
    write_expected()
