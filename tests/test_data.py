"""What the README promises of prepare.py, and of the text and the batches that come from it."""
import io
import json
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TEXT, run, start, succeed

from data.loader import get_batch, load_data
from data.prepare import prepare
from data.tokenizer import ByteTokenizer, Decoder, read_pieces


def parts(folder):
    """The text for training, and that for validation, of a data folder of bytes."""
    return [(folder / name).read_bytes().decode() for name in ("train.bin", "val.bin")]


# ---- preparing


def test_text_is_prepared_from_a_pipe_and_a_reader_of_the_old_data_keeps_it(tmp_path):
    prepare(tmp_path, ["abc" * 30])
    _, old, _ = load_data(tmp_path)
    process = start("data/prepare.py --text /dev/stdin", "--out", tmp_path, stdin=subprocess.PIPE)
    process.communicate("0123456789" * 10)
    assert parts(tmp_path) == ["0123456789" * 9, "0123456789"]
    assert bytes(old) == b"abc" * 3


def test_of_a_folder_all_text_is_read_once_and_its_own_output_never(tmp_path):
    folder = tmp_path / "text"
    (folder / ".git").mkdir(parents=True)
    for name, content in {"a.txt": TEXT.encode(), ".git/objects": b"no",
                          "image.png": b"\x89PNG\0"}.items():
        (folder / name).write_bytes(content)
    (folder / "itself").symlink_to(folder)
    (folder / "link.txt").symlink_to(folder / "a.txt")
    for _ in range(2):
        _, err = succeed("data/prepare.py", "--text", folder, "--out", folder / "out")
        assert "".join(parts(folder / "out")) == TEXT and "skipped 2 files" in err


@pytest.mark.parametrize("text, sentence", [("", "too little text"), (None, "No such file")])
def test_data_is_replaced_as_a_whole_or_not_at_all(data, tmp_path, text, sentence):
    out = shutil.copytree(data, tmp_path / "out")
    if text is not None:
        (tmp_path / "some.txt").write_text(text)
    code, _, err = run("data/prepare.py", "--text", tmp_path / "some.txt", "--out", out)
    assert code == 1 and sentence in err
    assert parts(out) == parts(data) and load_data(out)


@pytest.mark.parametrize("text", ["é" * 9, "two lines\n" * 2, "日本語\n" * 9, TEXT])
def test_a_tenth_of_many_texts_is_for_validation_and_no_character_is_cut_in_two(tmp_path, text):
    prepare(tmp_path, [text] * 100)
    train, val = parts(tmp_path)
    assert sorted(train + val) == sorted(text * 100)
    assert 0.05 < len(val) / len(text * 100) < 0.25


# ---- text


def test_a_file_is_read_in_pieces_of_bounded_size_which_hold_every_byte():
    text = b"x" * 1_000_000 + b"\na line\r\n\xff\xe2\x82" * 100_000
    pieces = list(read_pieces(io.BytesIO(text)))
    assert "".join(pieces).encode(errors="surrogateescape") == text
    assert max(map(len, pieces)) <= 2 ** 19


def test_text_is_decoded_as_its_bytes_arrive():
    decoder = Decoder(ByteTokenizer())
    assert [decoder.step(byte) for byte in "é€".encode()[:-1]] == ["", "é", "", ""]
    assert decoder.flush() == "\ufffd"


@pytest.mark.parametrize("text", ["", "\ufffd", "a"])
def test_a_token_costs_constant_work_whether_it_is_text_or_not(text):
    lengths = []

    def decode(ids):
        lengths.append(len(ids))
        return text * len(ids)

    decoder = Decoder(SimpleNamespace(decode=decode, words={}))
    written = "".join(map(decoder.step, [0] * 2000)) + decoder.flush()
    assert written == text * 2000
    assert max(lengths) <= 200 and len(lengths) <= 10_000


# ---- batches


def test_every_start_of_a_batch_is_drawn_also_the_last_one(seed):
    x, y = get_batch(np.arange(12), 1000, 8, np.random.default_rng(seed))
    assert set(map(tuple, x.tolist())) == {tuple(range(start, start + 8)) for start in range(4)}
    assert (y == x + 1).all()


def test_token_ids_of_ones_own_need_a_meta_json_that_says_what_they_are(tmp_path):
    for part in ("train.bin", "val.bin"):
        np.arange(12, dtype=np.uint16).tofile(tmp_path / part)
    meta = dict(vocab_size=12, dtype="uint16", separators=[1])
    with pytest.raises(ValueError, match="is missing or incomplete; to prepare a text: data/prepa"):
        load_data(tmp_path)
    for change, sentence in ((dict(dtype="int"), "is missing or incomplete"),
                             (dict(vocab_size=11), "token 11, beyond the vocabulary of 11")):
        (tmp_path / "meta.json").write_text(json.dumps(meta | change))
        with pytest.raises(ValueError, match=sentence):
            load_data(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert load_data(tmp_path)[2].items() > meta.items()
