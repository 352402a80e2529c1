"""Mistakes and hostile files: each gets one sentence and exit code 2 (usage) or 1, never a traceback, and harms nothing."""
import json
import os
import pickle

import numpy as np
import pytest
import torch

import sample
import sep_cache
import train
from conftest import SHAPE, run
from data import prepare
from train import load_checkpoint

TEXT = b"A man. A plan, a canal: Panama!\n" * 60


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A good data folder and a good checkpoint."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "t.txt").write_bytes(TEXT)
    prepare.prepare(folder / "data", path=folder / "t.txt")
    assert run(train, "--data", folder / "data", "--out_dir", folder / "out", "--max_steps", 1, *SHAPE)[0] == 0
    return folder


def one_sentence(result, code, *words):
    got, out, err = result
    last = err.strip().splitlines()[-1]
    assert got == code and "Traceback" not in err and len(last) < 500, (got, err)
    assert all(word in last for word in words), (words, last)


USAGE = [
    (train, ("--windw", 3), "did you mean --window?"), (train, ("--xyzzy", 3), "--help lists them"),
    (train, ("--max_steps", "many"), "invalid int value: 'many'"), (train, ("--max_seps", "few"), "neither a whole number nor None"),
    (train, ("--compile", "maybe"), "neither true nor false"), (train, ("--window", 0), "window is 0"),
    (train, ("--n_embd", 30, "--n_head", 4), "n_embd is 30"), (train, ("--attn", "sparse"), "full, stream, fixed, sep"),
    (train, ("--max_seps", -1), "max_seps is -1"), (train, ("--sinks", -1), "sinks is -1"), (train, ("--n_layer", 0), "n_layer is 0"),
    (train, ("--device", "cuda:99"), "is not on this machine"), (train, ("--device", "toaster"), "is not on this machine"),
    (train, ("--batch_size", 0), "batch_size is 0"), (train, ("--max_steps", -1), "max_steps is -1"),
    (train, ("--eval_every", 0), "eval_every is 0"), (train, ("--learning_rate", "nan"), "learning_rate is nan"),
    (train, ("--resume", "--init_from", "x"), "give one of them"), (sample, ("--temperature", -1), "temperature is -1"),
    (sample, ("--top_k", 0), "top_k is 0"), (sample, ("--max_new_tokens", 0), "max_new_tokens is 0"),
    (sample, ("--stream", "--num_samples", 2), "one text"), (sample, ("--promt", "x"), "did you mean --prompt?"),
    (sep_cache, ("",), "1 to 200"), (sep_cache, ("x" * 201,), "1 to 200"), (sep_cache, ("text", "--window", 0), "window is 0"),
    (prepare, ("--text", "/nowhere"), "does not exist"), (prepare, ("--source", "web"), "invalid choice"),
]


@pytest.mark.parametrize("module, options, words", USAGE, ids=[" ".join(map(str, case[1])) for case in USAGE])
def test_wrong_usage_is_a_sentence(files, module, options, words):
    extra = ("--data", files / "data", "--out_dir", files / "o") if module is train else ()
    extra = ("--ckpt", files / "out" / "ckpt.pt") if module is sample else extra
    one_sentence(run(module, *extra, *options), 2, words)


def test_shape_options_of_a_checkpoint_cannot_change(files):
    base = ("--data", files / "data", "--out_dir", files / "o")
    one_sentence(run(train, *base, "--init_from", files / "out" / "ckpt.pt", "--n_layer", 3), 2, "--n_layer is 1")
    one_sentence(run(train, "--out_dir", files / "out", "--resume", "--window", 9), 2, "--window is 8")
    one_sentence(run(sample, "--ckpt", files / "out" / "ckpt.pt", "--window", 0), 2, "window is 0")


GOOD = dict(vocab_size=256, dtype="uint8", separators=[46])
META = {
    "not JSON": "{", "empty": "", "a list": "[]", "deep": "[" * 100_000, "no vocab_size": dict(dtype="uint8", separators=[1]),
    "no dtype": dict(vocab_size=256, separators=[1]), "no separators": dict(vocab_size=256, dtype="uint8"),
    "text vocab_size": {**GOOD, "vocab_size": "256"}, "huge vocab_size": {**GOOD, "vocab_size": 10 ** 30},
    "zero vocab_size": {**GOOD, "vocab_size": 0}, "true vocab_size": {**GOOD, "vocab_size": True},
    "float vocab_size": {**GOOD, "vocab_size": 2.5}, "object dtype": {**GOOD, "dtype": "object"}, "list dtype": {**GOOD, "dtype": []},
    "separator beyond": {**GOOD, "separators": [256]}, "separators text": {**GOOD, "separators": ".,"},
    "answers beyond": {**GOOD, "answers": [-1]}, "record 0": {**GOOD, "record": 0}, "record huge": {**GOOD, "record": 10 ** 20},
    "vocabulary too small": {**GOOD, "vocab_size": 47}, "NaN": '{"vocab_size": NaN, "dtype": "uint8", "separators": []}',
}


@pytest.mark.parametrize("name", META)
def test_hostile_meta_is_a_sentence(files, tmp_path, name):
    for part in ("train.bin", "val.bin"):
        (tmp_path / part).write_bytes(TEXT)
    meta = META[name]
    (tmp_path / "meta.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
    one_sentence(run(train, "--data", tmp_path, "--out_dir", tmp_path / "o", "--max_steps", 1, *SHAPE), 1, str(tmp_path))


BINS = {"empty": (b"", TEXT, "empty"), "no validation": (TEXT, None, "missing or empty"), "too short": (b"ab" * 5, TEXT, "too short"),
        "odd length": (TEXT + b"x", TEXT, "cut"), "beyond the vocabulary": (b"\xff\xff" * 900, TEXT, "beyond the vocabulary")}


@pytest.mark.parametrize("name", BINS)
def test_hostile_bin_is_a_sentence(tmp_path, name):
    head, tail, words = BINS[name]
    for part, content in (("train.bin", head), ("val.bin", tail)):
        if content is not None:
            (tmp_path / part).write_bytes(content)
    one_sentence(run(train, "--data", tmp_path, "--out_dir", tmp_path / "o", "--max_steps", 1, *SHAPE), 1, words)


def test_missing_data_and_pickled_meta_are_sentences(files, tmp_path):
    one_sentence(run(train, "--data", "nowhere", "--out_dir", tmp_path), 1, "there is no data folder nowhere")
    for part in ("train.bin", "val.bin"):
        np.zeros(99, np.uint16).tofile(tmp_path / part)
    (tmp_path / "meta.pkl").write_bytes(b"")
    one_sentence(run(train, "--data", tmp_path, "--out_dir", tmp_path), 1, "pickles are not read")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb-has-exploded",)


def damaged(good, kind):
    """The bytes of a checkpoint, spoilt."""
    if kind.startswith("cut"):
        return good[:len(good) * int(kind[4:]) // 100]
    if kind.startswith("flipped"):
        at = len(good) * int(kind[8:]) // 100
        return good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1:]
    return {"text": b"This is no checkpoint.\n", "pickle": pickle.dumps(Bomb())}[kind]


@pytest.mark.parametrize("kind", [f"cut {n}" for n in range(0, 100, 10)] + ["text", "pickle"])
def test_damaged_checkpoint_is_a_sentence(files, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ckpt.pt"
    path.write_bytes(damaged((files / "out" / "ckpt.pt").read_bytes(), kind))
    one_sentence(run(sample, "--ckpt", path), 1, "damaged or not a checkpoint")
    one_sentence(run(train, "--data", files / "data", "--init_from", path), 1, "damaged or not a checkpoint")
    assert not (tmp_path / "bomb-has-exploded").exists()


def test_a_flipped_bit_is_seen_or_changes_nothing(files, tmp_path):
    good = (files / "out" / "ckpt.pt").read_bytes()
    expected, path, seen = load_checkpoint(files / "out" / "ckpt.pt"), tmp_path / "ckpt.pt", 0
    for n in range(1, 100, 3):
        path.write_bytes(damaged(good, f"flipped {n}"))
        try:
            model, _, about = load_checkpoint(path)
        except ValueError as error:
            seen += "damaged" in str(error)
        else:  # it was in the padding between the parts
            assert about == expected[2]
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected[0].parameters()))
    assert seen > 15


def test_other_checkpoints_and_bombs_inside_one_are_sentences(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, good = tmp_path / "x.pt", torch.load(files / "out" / "ckpt.pt", weights_only=True)
    about = json.loads(good["about"])
    for state in (dict(weights=1), [], {**good, "about": "{"}, {**good, "about": Bomb()}, {**good, "model": {}},
                  {**good, "about": json.dumps({**about, "model": {**about["model"], "n_layer": 10 ** 9}})},
                  {**good, "about": json.dumps({**about, "model": {**about["model"], "n_embd": "64"}})},
                  {**good, "about": json.dumps({**about, "model": {**about["model"], "n_embd": 64}})},
                  {**good, "about": json.dumps({**about, "model": {**about["model"], "depth": 1}})}):
        torch.save(state, path)
        one_sentence(run(sample, "--ckpt", path), 1, "damaged or not a checkpoint")
    assert not (tmp_path / "bomb-has-exploded").exists()
    one_sentence(run(sample, "--ckpt", tmp_path / "none.pt"), 1, "there is no checkpoint")
    one_sentence(run(sample, "--ckpt", tmp_path), 1, "there is no checkpoint")


def test_hostile_prompts_and_texts_are_sentences(files, tmp_path):
    base = ("--ckpt", files / "out" / "ckpt.pt")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "one").write_bytes(b"x")
    one_sentence(run(sample, *base, "--prompt_file", tmp_path / "none"), 1, "No such file")
    one_sentence(run(sample, *base, "--prompt", ""), 1, "the prompt is empty")
    one_sentence(run(sample, *base, "--score", tmp_path / "none"), 1, "there is no file")
    one_sentence(run(sample, *base, "--score", tmp_path / "empty"), 1, "too short to score")
    one_sentence(run(sample, *base, "--score", tmp_path / "one"), 1, "too short to score")
    one_sentence(run(prepare, "--text", tmp_path / "empty", "--out", tmp_path / "o"), 1, "too little text")
    assert not list((tmp_path / "o").iterdir())


def test_no_network_is_a_sentence(tmp_path, monkeypatch):
    def refuse(*args, **kw):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(prepare.urllib.request, "urlopen", refuse)
    one_sentence(run(prepare, "--source", "shakespeare", "--out", tmp_path / "o"), 1, "Network is unreachable")
