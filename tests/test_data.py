"""What the README promises of prepare.py, and of the text and the batches that come from it."""
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, TEXT, start, succeed

from data.loader import get_batch, load_data
from data.prepare import prepare, read_files
from data.tokenizer import ByteTokenizer, Decoder, read_pieces


def parts(folder):
    """The text for training, and that for validation, of a data folder of bytes."""
    return [(folder / name).read_bytes().decode() for name in ("train.bin", "val.bin")]


# ---- preparing


def test_text_is_prepared_from_a_pipe_and_the_hint_is_quoted_for_the_shell(tmp_path):
    out = tmp_path / "$out"
    process = start("data/prepare.py --text -", "--out", out, stdin=subprocess.PIPE)
    _, err = process.communicate("0123456789" * 10)
    assert parts(out) == ["0123456789" * 9, "0123456789"] and f"train.py --data='{out}'" in err


def test_data_that_is_there_is_not_replaced_even_if_two_runs_begin_at_once(tmp_path):
    def with_another_run():
        yield "abc" * 30
        prepare(tmp_path / "out", ["0123456789" * 10])

    for texts in (with_another_run(), None):  # None: once it is there, no text is read
        with pytest.raises(FileExistsError, match="out is there already; give another --out"):
            prepare(tmp_path / "out", texts)
        assert parts(tmp_path / "out") == ["0123456789" * 9, "0123456789"]
        assert os.listdir(tmp_path) == ["out"]


def test_of_a_folder_all_text_is_read_once(tmp_path):
    folder = tmp_path / "text"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "objects").write_text("no")
    (folder / "a.txt").write_text(TEXT)
    (folder / "image.png").write_bytes(b"\x89PNG\0")
    (folder / "itself").symlink_to(folder)
    (folder / "link.txt").symlink_to(folder / "a.txt")
    _, err = succeed("data/prepare.py", "--text", folder, "--out", folder / "out")
    assert "".join(parts(folder / "out")) == TEXT and "skipped 2 files" in err


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    tmp_path.chmod(0o755)
    (tmp_path / "closed").mkdir(mode=0)
    monkeypatch.chdir(tmp_path)
    os.seteuid(os.geteuid() or 65534)  # root could read it
    try:
        with pytest.raises(PermissionError, match="closed"):
            list(read_files("."))
    finally:
        os.seteuid(os.getuid())


@pytest.mark.parametrize("limit", [0, 10])
def test_on_a_full_disk_nothing_is_written(tmp_path, limit):
    """A limit to the size of a file, here in units of 512 bytes, is an error of the same kind."""
    command = f"{sys.executable} data/prepare.py --text README.md --out {tmp_path}/out"
    assert subprocess.run(f"ulimit -f {limit}; {command}", shell=True, cwd=ROOT).returncode == 1
    assert not os.listdir(tmp_path)


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


# changes to a right one
WRONG = ['{"dtype": "int"}', '{"vocab_size": "12"}', '{"vocab_size": null}', '{"vocab_size": 12.0}',
         '{"vocab_size": 11}', '{"separators": [".", ","]}', '{"separators": ".,?"}',
         '{"separators": null}', '{"separators": [-1, 10]}', '{"separators": [12]}',
         '{"separators": [1.0]}', '{"tokenizer": "a/tokenizer.json"}',
         '{"tokenizer": "{}"}', '{"tokenizer": 1}']


@pytest.mark.parametrize("change", WRONG)
def test_token_ids_of_ones_own_need_a_right_meta_json(tmp_path, change):
    for part in ("train.bin", "val.bin"):
        np.arange(12, dtype=np.uint16).tofile(tmp_path / part)
    meta = {"vocab_size": 12, "dtype": "uint16", "separators": [1]}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert load_data(tmp_path)[2].items() > meta.items()
    (tmp_path / "meta.json").write_text(json.dumps(meta | json.loads(change)))
    with pytest.raises(ValueError, match="needs a meta.json .* data/prepare.py|token 11, beyond"):
        load_data(tmp_path)
