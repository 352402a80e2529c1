"""Mistakes and hostile files: each gets one sentence, no traceback, and harms nothing.

The exit code is 2 for a mistake in the options, and 1 for a file that cannot be used.
"""
import json
import os
import pickle
import shutil

import numpy as np
import torch
from conftest import SHAPE, TEXT, run

import sample
import sep_cache
import train
from data import prepare
from train import load_checkpoint

TRAIN_SHORTLY = ("--max_steps", 1, *SHAPE)


def one_sentence(result, code, *words):
    """The script ended with this code, and its last line is a sentence that holds these words."""
    got, _, err = result
    last = err.strip().splitlines()[-1]
    assert got == code and "Traceback" not in err and len(last) < 500, (got, err)
    assert all(word in last for word in words), (words, last)


def test_wrong_options_are_a_sentence(full_checkpoint, data, tmp_path):
    common = {train: ("--data", data, "--out_dir", tmp_path / "out"),
              sample: ("--ckpt", full_checkpoint), sep_cache: (), prepare: ()}
    for module, options, words in (
            (train, ("--windw", 3), "did you mean --window?"),
            (train, ("--xyzzy", 3), "--help lists them"),
            (train, ("--max_steps", "many"), "invalid int value: 'many'"),
            (train, ("--max_seps", "few"), "neither a whole number nor None"),
            (train, ("--compile", "maybe"), "neither true nor false"),
            (train, ("--window", 0), "window is 0"),
            (train, ("--n_embd", 30, "--n_head", 4), "n_embd is 30"),
            (train, ("--attn", "sparse"), "full, streamingllm, fixed, sep"),
            (train, ("--max_seps", -1), "max_seps is -1"),
            (train, ("--sinks", -1), "sinks is -1"),
            (train, ("--n_layer", 0), "n_layer is 0"),
            (train, ("--device", "cuda:99"), "is not on this machine; it has: cpu"),
            (train, ("--device", "toaster"), "is not on this machine; it has: cpu"),
            (train, ("--batch_size", 0), "batch_size is 0"),
            (train, ("--max_steps", -1), "max_steps is -1"),
            (train, ("--eval_every", 0), "eval_every is 0"),
            (train, ("--learning_rate", "nan"), "learning_rate is nan"),
            (train, ("--seed", 2 ** 64), "seed is 18446744073709551616"),
            (train, ("--resume", "--init_from", "x"), "give one of them"),
            (sample, ("--temperature", -1), "temperature is -1"),
            (sample, ("--top_k", 0), "top_k is 0"),
            (sample, ("--max_new_tokens", 0), "max_new_tokens is 0"),
            (sample, ("--window", 0), "window is 0"),
            (sample, ("--stream", "--num_samples", 2), "one text"),
            (sample, ("--score", "x", "--num_samples", 2), "reads one text"),
            (sample, ("--prompt", "x", "--prompt_file", "y"), "not allowed with"),
            (sample, ("--seed", 2 ** 64), "64 bits"),
            (sample, ("--separators", r".\n"), "$'\\n'"),
            (sample, ("--separators", "。"), "ASCII"),
            (sample, ("--promt", "x"), "did you mean --prompt?"),
            (sep_cache, ("",), "1 to 200"),
            (sep_cache, ("x" * 201,), "1 to 200"),
            (sep_cache, ("text", "--window", 0), "window is 0"),
            (prepare, ("--text", "/nowhere"), "does not exist"),
            (prepare, ("--source", "web"), "invalid choice"),
            (prepare, ("--separators", r".\n"), "$'\\n'"),
            (prepare, ("--txt", "x"), "unrecognized arguments: --txt x")):
        one_sentence(run(module, *common[module], *options), 2, words)
    if not torch.backends.mps.is_available():
        for module in (train, sample):
            one_sentence(run(module, *common[module], "--device", "mps"), 2, "no Apple GPU")
    assert not (tmp_path / "out").exists()


def test_what_a_checkpoint_has_settled_cannot_be_changed(full_checkpoint, data, tmp_path):
    base = ("--data", data, "--out_dir", tmp_path / "out", "--init_from", full_checkpoint)
    one_sentence(run(train, *base, "--n_layer", 3), 2, "--n_layer is 1")
    resumed = ("--out_dir", full_checkpoint.parent, "--resume")
    one_sentence(run(train, *resumed, "--window", 9), 2, "--window is 8")
    one_sentence(run(train, *resumed, "--n_embd", 32), 2, "--n_embd is 16")
    other = tmp_path / "other"
    shutil.copytree(data, other)
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps({**meta, "vocab_size": 200}))
    one_sentence(run(train, *base, "--data", other), 2, "vocabulary of 256", "one of 200")
    one_sentence(run(train, *resumed, "--data", other), 2, "has changed since", "--init_from")
    assert not (tmp_path / "out").exists()


def test_a_batch_that_cannot_be_divided_is_a_sentence(data, tmp_path):
    options = ("--data", data, "--out_dir", tmp_path, *TRAIN_SHORTLY, "--grad_accum_steps", 3)
    one_sentence(run(train, *options), 1, "batch_size 4 does not divide by 1 processes x", "of 3")


def test_too_little_memory_is_a_sentence(full_checkpoint, data, tmp_path):
    options = ("--data", data, "--out_dir", tmp_path / "out", *TRAIN_SHORTLY)
    code, _, err = run(train, *options, "--batch_size", 10 ** 15)
    assert code == 1 and "train.py: the memory is full" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()
    result = run(sample, "--ckpt", full_checkpoint, "--attn", "sep", "--window", 10 ** 15)
    one_sentence(result, 1, "the memory is full")


def test_preparing_harms_neither_its_text_nor_other_data(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("one.txt", "train.bin"):
        (texts / name).write_text(TEXT)
    for text, out in ((texts, texts / "out"), (texts, texts), (texts / "train.bin", texts)):
        result = run(prepare, "--text", text, "--out", out)
        one_sentence(result, 1, "would be read and written at once")
    assert len(list(texts.iterdir())) == 2 and (texts / "train.bin").read_text() == TEXT

    out = tmp_path / "out"
    for _ in range(2):  # the same text may be prepared again
        assert run(prepare, "--text", texts / "one.txt", "--out", out)[0] == 0
    result = run(prepare, "--text", texts / "train.bin", "--out", out)
    one_sentence(result, 1, "holds the data of", "one.txt")


def test_hostile_meta_is_a_sentence(tmp_path):
    good = dict(vocab_size=256, dtype="uint8", separators=[46])
    for part in ("train.bin", "val.bin"):
        (tmp_path / part).write_text(TEXT)
    texts = ["{", "", "[]", "[" * 100_000,
             '{"vocab_size": NaN, "dtype": "uint8", "separators": []}']
    texts += [json.dumps({name: value for name, value in good.items() if name != missing})
              for missing in good]
    for name, values in dict(
            vocab_size=("256", 10 ** 30, 0, True, 2.5, 47), dtype=("object", [], "float32"),
            separators=([256], ".,", [True], 3), answers=([-1], [1.5], None),
            record=(0, 10 ** 20, "1")).items():
        texts += [json.dumps({**good, name: value}) for value in values]
    for text in texts:
        (tmp_path / "meta.json").write_text(text)
        result = run(train, "--data", tmp_path, "--out_dir", tmp_path / "out", *TRAIN_SHORTLY)
        one_sentence(result, 1, str(tmp_path))
    (tmp_path / "meta.json").write_text(json.dumps(good))  # the rest of the folder is in order
    assert run(train, "--data", tmp_path, "--out_dir", tmp_path / "out", *TRAIN_SHORTLY)[0] == 0


def test_hostile_bin_is_a_sentence(tmp_path):
    text = TEXT.encode()[:7000]  # whole uint16 tokens
    for name, train_bin, val_bin, words in (
            ("empty", b"", text, "empty"),
            ("no validation", text, None, "missing or empty"),
            ("no training", None, text, "train.bin is missing or empty"),
            ("too short", b"ab" * 5, text, "too short"),
            ("odd", text[:-1], text, "cut"),
            ("beyond", b"\xff\xff" * 900, text, "beyond the vocabulary")):
        folder = tmp_path / name
        folder.mkdir()
        for part, content in (("train.bin", train_bin), ("val.bin", val_bin)):
            if content is not None:
                (folder / part).write_bytes(content)
        result = run(train, "--data", folder, "--out_dir", tmp_path / "out", *TRAIN_SHORTLY)
        one_sentence(result, 1, words)


def test_missing_data_and_pickled_meta_are_sentences(tmp_path, monkeypatch):
    out_dir = ("--out_dir", tmp_path / "out")
    result = run(train, "--data", "nowhere", *out_dir)
    one_sentence(result, 1, "there is no data folder nowhere")
    for part in ("train.bin", "val.bin"):
        np.zeros(99, np.uint16).tofile(tmp_path / part)
    (tmp_path / "meta.pkl").write_bytes(b"")
    one_sentence(run(train, "--data", tmp_path, *out_dir), 1, "pickles are not read")

    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    folder = ("--out", tmp_path / "prepared")
    monkeypatch.setattr(prepare.urllib.request, "urlopen", refuse)
    result = run(prepare, "--source", "shakespeare", *folder)
    one_sentence(result, 1, "Network is unreachable")
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    result = run(prepare, *folder)
    one_sentence(result, 1, "inside numpy, which is not installed")
    (tmp_path / "empty").write_bytes(b"")
    result = run(prepare, "--text", tmp_path / "empty", *folder)
    one_sentence(result, 1, "too little text")
    assert not list((tmp_path / "prepared").iterdir())


class Bomb:
    """When it is unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("bomb-has-exploded",)


def test_damaged_checkpoint_is_a_sentence(full_checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ckpt.pt"
    good = full_checkpoint.read_bytes()
    damaged = [good[:len(good) * percent // 100] for percent in range(0, 100, 10)]
    damaged += [b"This is no checkpoint.\n", pickle.dumps(Bomb())]
    for content in damaged:
        path.write_bytes(content)
        one_sentence(run(sample, "--ckpt", path), 1, "damaged or not a checkpoint")
        result = run(train, "--data", data, "--init_from", path)
        one_sentence(result, 1, "damaged or not a checkpoint")
    assert not (tmp_path / "bomb-has-exploded").exists()
    one_sentence(run(sample, "--ckpt", tmp_path / "none.pt"), 1, "there is no checkpoint")
    result = run(train, "--data", data, "--init_from", tmp_path)
    one_sentence(result, 1, "is a folder, not a checkpoint; it holds: ckpt.pt")
    one_sentence(run(sample, "--ckpt", tmp_path), 1, "it holds: ckpt.pt")
    path.unlink()
    one_sentence(run(sample, "--ckpt", tmp_path), 1, "there is no", "config.json")


def test_foreign_checkpoints_and_bombs_inside_one_are_sentences(
        full_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ckpt.pt"
    good = torch.load(full_checkpoint, weights_only=True)
    info = json.loads(good["info"])
    states = [dict(weights=1), [], {**good, "info": "{"}, {**good, "info": Bomb()},
              {**good, "model": {}}, {**good, "optimizer": {}}]
    for change in (dict(step=None), dict(val_loss=None), dict(data_meta={}), dict(data_meta=None),
                   dict(train_config=dict(batch_size="4"))):
        states.append({**good, "info": json.dumps({**info, **change})})
    for change in (dict(n_layer=10 ** 9), dict(n_embd="64"), dict(n_embd=64), dict(depth=1)):
        changed = {**info, "model_config": {**info["model_config"], **change}}
        states.append({**good, "info": json.dumps(changed)})
    for state in states:
        torch.save(state, path)
        one_sentence(run(sample, "--ckpt", path), 1, "damaged or not a checkpoint")
    assert not (tmp_path / "bomb-has-exploded").exists()
    torch.save(good, path)
    assert run(sample, "--ckpt", path, "--max_new_tokens", 1)[0] == 0


def test_a_flipped_bit_is_seen_or_changes_nothing(full_checkpoint, tmp_path):
    good = full_checkpoint.read_bytes()
    expected = load_checkpoint(full_checkpoint)
    path = tmp_path / "ckpt.pt"
    n_seen = 0
    for percent in range(1, 100, 3):
        content = bytearray(good)
        content[len(good) * percent // 100] ^= 0x10
        path.write_bytes(content)
        try:
            model, _, info = load_checkpoint(path)
        except ValueError as error:
            n_seen += "damaged" in str(error)
        else:  # it was in the padding between the parts of the file
            assert info == expected.info
            weights = zip(model.parameters(), expected.model.parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in weights)
    assert n_seen > 15


def test_hostile_prompts_and_texts_are_sentences(full_checkpoint, data, tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "one").write_bytes(b"x")
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    for part in ("train.bin", "val.bin"):
        (np.arange(500) % 9).astype(np.uint16).tofile(tokens / part)
    meta = dict(vocab_size=9, dtype="uint16", separators=[1])
    (tokens / "meta.json").write_text(json.dumps(meta))
    options = ("--data", tokens, "--out_dir", tmp_path / "out", *TRAIN_SHORTLY)
    assert run(train, *options)[0] == 0

    reads_bytes = ("--ckpt", full_checkpoint)
    reads_ids = ("--ckpt", tmp_path / "out" / "ckpt.pt")
    for options, words in (
            ((*reads_bytes, "--prompt_file", tmp_path / "none"), "No such file"),
            ((*reads_bytes, "--prompt", ""), "the prompt is empty"),
            ((*reads_bytes, "--score", tmp_path / "none"), "there is no file"),
            ((*reads_bytes, "--score", tmp_path / "empty"), "too short to score"),
            ((*reads_bytes, "--score", tmp_path / "one"), "too short to score"),
            ((*reads_ids, "--prompt", "1 9"), "token 9, beyond the vocabulary of 9"),
            ((*reads_ids, "--prompt", "1 -1"), "token -1, beyond the vocabulary of 9"),
            ((*reads_ids, "--prompt", "one"), "the prompt must be numbers"),
            ((*reads_ids, "--score", data / "val.bin"), "beyond the vocabulary of 9")):
        one_sentence(run(sample, *options), 1, words)
    one_sentence(run(sample, *reads_ids, "--separators", ".,"), 2, "--separators must be numbers")
