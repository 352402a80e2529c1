"""Pretrained models: equal to Hugging Face's, and refused in one sentence; their text."""
import json

import pytest
import torch
from conftest import TRAINING, run, succeed
from test_mask import definition_mask
from test_stream import stream

INSTALL = "pip install -r requirements-pretrained.txt"
safetensors_torch = pytest.importorskip("safetensors.torch", reason=INSTALL)
tokenizers = pytest.importorskip("tokenizers", reason=INSTALL)
from data.tokenizer import Decoder, Tokenizer  # noqa: E402
from pretrained import load_model  # noqa: E402

BASE = {
    "model_type": "llama",
    "vocab_size": 302,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# of BASE
LAYER = {
    "input_layernorm": (32,),
    "post_attention_layernorm": (32,),
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (56, 32),
    "mlp.up_proj": (56, 32),
    "mlp.down_proj": (32, 56),
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# changes to BASE
MODELS = {
    "llama 2": {"num_key_value_heads": None, "rope_scaling": None},
    "llama 3": {"rope_theta": 5e5, "tie_word_embeddings": True},
    "llama 3.2": {"rope_theta": 1e4, "rope_scaling": LLAMA3, "head_dim": 16},
    "llama 3.2, new keys": {"rope_parameters": {**LLAMA3, "rope_theta": 5e3}},
    "llama 3.2, both": {"rope_theta": 5e3, "rope_scaling": LLAMA3,
                        "rope_parameters": {**LLAMA3, "rope_theta": 5e3}},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen2, all layers are full": {"model_type": "qwen2", "use_sliding_window": True,
                                   "sliding_window": 8, "max_window_layers": 0,
                                   "layer_types": ["full_attention"] * 2},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}
SEP = {"window": 8, "sinks": 2, "max_seps": 3, "separators": range(1, 7)}
TEXT = ("The first line, a short one; the second? No!\r\n\r\nÄpfel, Öl ... 12:30. ñandú "
        "日本語のテキスト 🙂🙃, and — “quoted”:\n\n\tx.y!\n")


def save_config(folder, changes):
    (folder / "config.json").write_text(json.dumps(BASE | changes))


def save(folder, changes=(), dtype=torch.float32):
    """Write random weights of BASE, and its config.json with changes; returns the weights."""
    shapes = {"lm_head": (302, 32), "model.norm": (32,)}
    shapes["model.embed_tokens"] = shapes["lm_head"]
    for i in range(2):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in LAYER.items()}
    weights = {f"{name}.weight": torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    save_config(folder, dict(changes))
    safetensors_torch.save_file(weights, folder / "model.safetensors")
    return weights


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_logits_equal_hugging_face(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    save_config(tmp_path, changes)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in theirs.parameters():  # no gain is 1 and no bias 0
        weight.normal_(std=0.2).add_(weight.dim() == 1)
    theirs.save_pretrained(tmp_path)
    save_config(tmp_path, changes)  # in its own spelling again
    ids = torch.randint(30, (2, 64))
    for attn in ("full", "sep"):
        model = load_model(tmp_path, attn=attn, **SEP)
        visible = definition_mask(ids, model.config)[:, None]
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        expected = theirs(ids, attention_mask=mask).logits
        for logits in (model(ids)[0], stream(model, ids)):
            assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_file_comes_before_an_index_and_old_buffers_do_not_matter(tmp_path, dtype):
    weights = save(tmp_path, dtype=dtype)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weight_map = {name: f"{len(name) % 2}.safetensors" for name in weights}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for part in set(weight_map.values()):  # each holds all tensors, 1 larger if it is their file
        tensors = {name: weights[name] + (weight_map[name] == part) for name in weights}
        safetensors_torch.save_file(tensors, tmp_path / part)
    for offset in (0, 1):  # of the single file, then of the index
        model = load_model(tmp_path, dtype, attn="full")
        # the index names different files for these two
        assert torch.equal(model.lm_head.weight, weights["lm_head.weight"] + offset)
        assert torch.equal(model.norm.weight, weights["model.norm.weight"] + offset)
        (tmp_path / "model.safetensors").unlink(missing_ok=True)


NUMBER = "config.json: a setting is missing or no number"
# changes to BASE, as they stand in config.json
UNSUPPORTED = [
    ('{"model_type": "gemma"}', "model_type is 'gemma', and must be one of .*'llama', 'mistral'"),
    ('{"hidden_act": "gelu"}', "hidden_act is 'gelu', and must be one of"),
    ('{"rope_scaling": {"type": "yarn", "factor": 2}}', ": type is 'yarn', and must be one of"),
    ('{"partial_rotary_factor": 0.5}', "partial_rotary_factor is 0.5"),
    ('{"model_type": "mistral", "sliding_window": 32}', "sliding_window is 32, and must be null"),
    ('{"model_type": "mistral"}', "sliding_window is 4096"),  # the default
    ('{"model_type": "qwen2", "use_sliding_window": true, "sliding_window": 8}',
     "sliding_window is 8"),
    ('{"model_type": "qwen2", "sliding_window": 8, '
     '"layer_types": ["full_attention", "sliding_attention"]}', "sliding_window is 8"),
    ('{"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e3}}', "must agree with rope_theta"),
    ('{"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": {"rope_type": "default"}}',
     "must agree with rope_theta and rope_scaling"),
    ('{"rope_theta": "1e6"}', NUMBER),
    ('{"rope_scaling": {"rope_type": "llama3", "factor": null, "low_freq_factor": 1, '
     '"high_freq_factor": 4, "original_max_position_embeddings": 32}}', NUMBER),
    ('{"rope_parameters": "llama3"}', NUMBER),
    ('{"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}',
     "full_attention is {'rope_theta.* must be one of"),
    ('{"max_position_embeddings": null}', NUMBER),
    ('{"num_key_value_heads": 3}', "n_head is 4, and must be a multiple of n_kv_head, 3"),
    ('{"num_hidden_layers": 3}', "no such weights .* 'model.layers.2.input_layernorm"),
    ('{"num_hidden_layers": 1}', "holds the tensor model.layers.1.input_layernorm.weight"),
    ('{"intermediate_size": 57}', r"(?s)no such weights .*mlp.gate_proj.weight.*\[57, 32\]"),
    ('{"tie_word_embeddings": true}', "holds the tensor lm_head.weight"),  # and it is another one
]


@pytest.mark.parametrize("change, sentence", UNSUPPORTED)
def test_what_is_not_supported_is_named_in_one_sentence(tmp_path, change, sentence):
    save(tmp_path, json.loads(change))
    with pytest.raises(ValueError, match=sentence):
        load_model(tmp_path, attn="full")


@pytest.mark.parametrize("content", [None, b"[1]"])
@pytest.mark.parametrize("name, sentence", [
    ("config.json", "config.json"), ("tokenizer.json", "tokenizer.json"),
    ("model.safetensors", "safetensors cannot be read, .* which are pickles, are not opened")])
def test_a_missing_or_damaged_file_is_named_in_one_sentence(folder, name, sentence, content):
    (folder / name).rename(folder / "pytorch_model.bin")
    if content:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_a_bug_in_the_model_is_not_called_a_damaged_file(checkpoint, folder, monkeypatch):
    monkeypatch.setattr("pretrained.GPT", None)
    for path in (checkpoint, folder):
        with pytest.raises(TypeError):
            load_model(path)


def test_missing_packages_are_named_with_the_command_that_installs_them(folder, monkeypatch):
    monkeypatch.setattr("data.tokenizer.tokenizers", None)
    with pytest.raises(ValueError, match=INSTALL):
        load_model(folder)


# ---- text


def save_bytes_tokenizer(folder):
    """As Llama 3 and Qwen: GPT-2's spelling of bytes. Padding is a setting left from training."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator([TEXT] * 3, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<begin>", "<end>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_tokens(["ñandú", "None"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", 0)])
    tokenizer.enable_padding(length=500)
    tokenizer.enable_truncation(8)
    tokenizer.save(str(folder / "tokenizer.json"))


BYTE_FALLBACK = """{
    "added_tokens": [
        {"id": 0, "content": "<s>", "special": true, "single_word": false, "lstrip": false,
         "rstrip": false, "normalized": false},
        {"id": 1, "content": "<unk>", "special": true, "single_word": false, "lstrip": false,
         "rstrip": false, "normalized": false},
        {"id": 2, "content": "cab", "special": false, "single_word": false, "lstrip": false,
         "rstrip": false, "normalized": true}],
    "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
    "decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "merges": ["▁ a"]}}"""


def save_byte_fallback_tokenizer(folder):
    """As Llama 2: a space belongs to the word after it; unknown characters are single bytes."""
    words = ["<s>", "<unk>", "cab", *(f"<0x{byte:02X}>" for byte in range(256)),
             *"▁.,?!;:abcdefgh", "▁a"]
    words += map(str, range(302 - len(words)))
    content = json.loads(BYTE_FALLBACK)
    content["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def tokenizer_in(folder):
    return Tokenizer((folder / "tokenizer.json").read_text())


TOKENIZERS = pytest.mark.parametrize("save_tokenizer",
                                     [save_bytes_tokenizer, save_byte_fallback_tokenizer])


@pytest.fixture
def folder(tmp_path):
    save(tmp_path)
    save_bytes_tokenizer(tmp_path)
    return tmp_path


@TOKENIZERS
@pytest.mark.parametrize("text", [TEXT, " a  b a. a.b  ", "🙂" * 50, "e\ufffdf\ufffd\ufffd", "",
                                  "bad cab"])
def test_streamed_text_is_the_whole_text_in_whole_characters(tmp_path, save_tokenizer, text):
    save_tokenizer(tmp_path)
    tokenizer = tokenizer_in(tmp_path)
    decoder = Decoder(tokenizer)
    steps = list(map(decoder.step, [0, 1, *tokenizer.encode(text)]))  # two special tokens
    assert "".join(steps) + decoder.flush() == text
    assert "\ufffd" in text or "\ufffd" not in "".join(steps)


def test_only_the_first_piece_of_a_text_has_a_begin_token_and_nothing_is_cut_or_padded(folder):
    tokenizer = tokenizer_in(folder)
    next_piece = tokenizer.encode(TEXT, is_first=False)
    assert tokenizer.encode(TEXT) == [0, *next_piece]
    assert len(next_piece) > 50
    assert tokenizer.encode("a\udcff", False) == tokenizer.encode("a\ufffd", False)
    assert tokenizer.special_ids == {0, 1}


def test_separators_are_tokens_of_separator_characters_that_the_model_has(folder):
    """By the vocabulary itself, where Ġ is a space, and Ċ and č are line breaks."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["!"] = 350  # beyond a hole, and the model's vocabulary
    path.write_text(json.dumps(content))
    expected = {token_id for token, token_id in vocabulary.items()
                if set(token) <= set(".,?!;:ĊčĠ") and token.strip("Ġ")}
    assert set(load_model(folder).config.separators) == expected
    separators = load_model(folder, separators="!.").config.separators
    assert vocabulary["."] in separators and vocabulary[","] not in separators


def test_a_folder_samples_scores_and_goes_on_training_on_its_tokens(folder, tmp_path):
    text, tokens, out_dir = (tmp_path / name for name in ("text.txt", "tokens", "out"))
    text.write_text(TEXT * 20)
    succeed("data/prepare.py", "--text", text, "--tokenizer", folder, "--out", tokens)
    succeed("train.py --attn sep --window 8 --max_steps 2", "--init_from", folder,
            "--data", tokens, "--out_dir", out_dir, *TRAINING)
    out, _ = succeed("sample.py --max_new_tokens 5", "--ckpt", out_dir, "--prompt", TEXT)
    assert out.startswith(TEXT.replace("\r\n", "\n"))  # as Python reads it here
    out, _ = succeed("sample.py --separators .", "--ckpt", folder, "--score", text)
    ids = tokenizer_in(folder).encode(text.read_bytes().decode())
    assert out.startswith(f"{len(ids) - 1:,} tokens: perplexity")


def test_tokens_of_another_tokenizer_are_refused_with_advice(folder, data, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    save_byte_fallback_tokenizer(other)  # as many tokens
    succeed("data/prepare.py", "--text", data / "meta.json", "--tokenizer", other,
            "--out", f"{other}/tokens")
    for tokens in (other / "tokens", data):
        code, _, err = run("train.py", "--init_from", folder, "--data", tokens, "--out_dir", other)
        assert code == 1 and f"the tokens of {tokens} are not those of" in err
