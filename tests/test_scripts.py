"""What the README promises of prepare.py, train.py and sample.py."""
import json
import math
import pickle
import random
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SHAPE, TEXT, run, start

import sample
import train
from data.loader import get_batch, load_data
from data.prepare import ByteTokenizer, read_pieces
from train import TrainConfig, get_lr, load_checkpoint


def log_of(out_dir):
    """{step: its numbers} of log.jsonl."""
    log = {}
    for line in (out_dir / "log.jsonl").read_text().splitlines():
        log.setdefault(json.loads(line)["step"], {}).update(json.loads(line))
    return log


def sentence_of(module, options, code, monkeypatch, capsys):
    """What main() says to wrong options, in this process: that is faster."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, options)])
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # which train.py replaces
    with pytest.raises(SystemExit) as end:
        module.main()
    if code == 2:  # of argparse
        assert end.value.code == 2
        return capsys.readouterr().err
    return end.value.code


def wait_for(path):
    deadline = time.time() + 60
    while not path.exists() and time.time() < deadline:
        time.sleep(0.02)


# ---- data


def test_text_is_prepared_without_hidden_files_and_from_pipes(tmp_path):
    (tmp_path / "text" / ".git").mkdir(parents=True)
    (tmp_path / "text" / ".git" / "objects").write_text("no" * 1000)
    (tmp_path / "text" / "a.txt").write_text("0123456789" * 10)
    code, _, err = run("data/prepare.py", "--text", tmp_path / "text", "--out", tmp_path / "out")
    assert code == 0, err
    assert (tmp_path / "out" / "train.bin").read_bytes() == b"0123456789" * 9
    assert (tmp_path / "out" / "val.bin").read_bytes() == b"0123456789"
    code, _, err = run("data/prepare.py", "--text", "/dev/stdin", "--out", tmp_path / "piped",
                       stdin=open(tmp_path / "text" / "a.txt"))
    assert code == 0, err
    assert (tmp_path / "piped" / "train.bin").read_bytes() == b"0123456789" * 9


def test_data_is_replaced_as_a_whole_or_not_at_all(data, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    run("data/prepare.py", "--text", data.parent / "some.txt", "--out", tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    for text, sentence in ((tmp_path / "empty.txt", "too little text"),
                           (tmp_path / "none.txt", "No such file")):
        code, _, err = run("data/prepare.py", "--text", text, "--out", tmp_path / "out")
        assert code == 1 and sentence in err
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_a_file_is_read_in_pieces_of_bounded_size(tmp_path):
    text = b"x" * 3_000_000 + b"\na line\n" * 200_000
    (tmp_path / "long.txt").write_bytes(text)
    with open(tmp_path / "long.txt", "rb") as file:
        pieces = list(read_pieces(file))
    assert b"".join(pieces) == text
    assert max(map(len, pieces)) <= 2 ** 19


def test_targets_that_do_not_count_leave_the_inputs_alone():
    tokens = np.arange(100, dtype=np.uint8)
    meta = dict(record=1, answers=[7, 8])
    x, y = get_batch(tokens, meta, 1, 98, np.random.default_rng(0))
    assert x[0].tolist() in (list(range(98)), list(range(1, 99)))
    assert set(y[0].tolist()) == {-1, 7, 8}


def test_text_is_decoded_as_its_bytes_arrive():
    decoder = ByteTokenizer().decoder()
    assert [decoder.step([byte]) for byte in "é".encode()] == ["", "é"]
    assert decoder.step("€".encode()[:2]) == "" and decoder.flush() == "\ufffd"


# ---- training


def test_training_learns_writes_and_logs(checkpoint):
    log = log_of(checkpoint.parent)
    assert list(log) == list(range(41))
    assert log[0]["val_loss"] > 5.4 and log[40]["val_loss"] < 4.9
    assert log[40]["loss"] < log[1]["loss"] - 0.5 and log[40]["tokens_per_s"] > 0
    model, state = load_checkpoint(checkpoint)
    assert state["step"] == 40 and model.config.attn == "full"
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["ckpt.pt", "log.jsonl"]


def test_learning_rate_rises_to_its_peak_and_falls_to_a_tenth_of_it():
    cfg = TrainConfig(max_steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [get_lr(step, cfg) for step in range(101)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == 1.0 and math.isclose(rates[100], 0.1)


def test_resume_after_a_signal_is_the_uninterrupted_run_to_the_last_digit(data, tmp_path):
    options = ["--data", data, "--max_steps", 120, *SHAPE]
    run("train.py", "--out_dir", tmp_path / "whole", *options)
    whole = log_of(tmp_path / "whole")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        out_dir = tmp_path / f"it's {number.name}"
        process = start("train.py", "--out_dir", out_dir, *options)
        wait_for(out_dir / "ckpt.pt")
        process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode == 1 and "Traceback" not in err
        advice = err.splitlines()[-1].partition("go on with: python ")[2]
        assert 0 < load_checkpoint(out_dir / "ckpt.pt")[1]["step"] < 120
        assert run(*shlex.split(advice))[0] == 0
        log = log_of(out_dir)
        assert all(log[step]["loss"] == whole[step]["loss"] for step in range(1, 121))


def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(data, tmp_path, seed):
    options = ["--data", data, "--max_steps", 10_000, *SHAPE, "--eval_every", 1]
    for i in range(3):
        process = start("train.py", "--out_dir", tmp_path / str(i), *options)
        wait_for(tmp_path / str(i) / "ckpt.pt")
        time.sleep(random.random())
        process.kill()
        process.communicate()
        load_checkpoint(tmp_path / str(i) / "ckpt.pt")


@pytest.mark.parametrize("shell", ["2>&-", "2>&1 | true", "2>/dev/full"])
def test_a_closed_output_stops_no_training(data, tmp_path, shell):
    options = " ".join(map(str, ["--data", data, "--max_steps", 20, *SHAPE]))
    subprocess.run(f"{sys.executable} train.py --out_dir {tmp_path} {options} {shell}",
                   shell=True, cwd=ROOT)
    assert load_checkpoint(tmp_path / "ckpt.pt")[1]["step"] == 20


def test_a_full_disk_costs_nothing_that_was_trained(data, tmp_path):
    """While no file may grow beyond 1 KB, the training goes on, and its end waits for room."""
    run("train.py", "--data", data, "--out_dir", tmp_path, "--max_steps", 20, *SHAPE)
    before = (tmp_path / "ckpt.pt").read_bytes()
    command = f"ulimit -f 1; exec {sys.executable} train.py --resume --out_dir {tmp_path} " \
              f"--max_steps 10000 --eval_every 2"
    process = subprocess.Popen(command, shell=True, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    line = next(line for line in process.stderr if "could not be written" in line)
    process.send_signal(signal.SIGINT)  # stops the training
    time.sleep(2)
    process.send_signal(signal.SIGINT)  # gives up
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert "and is as it was" in line
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_two_processes_train_like_one(data, tmp_path):
    options = ["--data", data, "--max_steps", 20, *SHAPE]
    run("train.py", "--out_dir", tmp_path / "one", *options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "train.py", "--out_dir", tmp_path / "two", *options]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert all(abs(two[step]["loss"] - one[step]["loss"]) < 1e-5 for step in range(1, 21))
    assert abs(two[20]["val_loss"] - one[20]["val_loss"]) < 1e-5


def test_post_training_starts_from_the_model_and_changes_its_attention(checkpoint, data, tmp_path):
    code, _, err = run("train.py", "--init_from", checkpoint, "--attn", "sep", "--data", data,
                       "--out_dir", tmp_path, "--max_steps", 20, "--eval_every", 20,
                       "--batch_size", 4)
    assert code == 0, err
    before, log = log_of(checkpoint.parent), log_of(tmp_path)
    assert log[0]["val_loss"] < before[40]["val_loss"] + 0.1
    assert log[20]["val_loss"] < log[0]["val_loss"]
    assert load_checkpoint(tmp_path / "ckpt.pt")[0].config.attn == "sep"


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint_from_before(data, tmp_path):
    code, _, err = run("train.py", "--data", data, "--out_dir", tmp_path, *SHAPE,
                       "--learning_rate", 1e30, "--warmup_steps", 0)
    assert code == 1 and "not finite" in err and "lower --learning_rate" in err
    model, _ = load_checkpoint(tmp_path / "ckpt.pt")
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_nanogpt_folders_train_as_they_are(tmp_path):
    for part in ("train", "val"):
        np.random.default_rng(0).integers(50257, size=500).astype(np.uint16).tofile(
            tmp_path / f"{part}.bin")
    code, _, err = run("train.py", "--data", tmp_path, "--out_dir", tmp_path / "out",
                       "--max_steps", 2, *SHAPE)
    assert code == 0, err
    assert load_data(tmp_path)[2]["vocab_size"] == 50304
    code, _, err = run("sample.py", "--ckpt", tmp_path / "out" / "ckpt.pt")
    assert code == 1 and "put their tokenizer.json into" in err


class Bomb:
    def __reduce__(self):
        return print, ("code has run",)


def test_damaged_checkpoints_are_a_sentence_and_run_no_code(checkpoint, tmp_path, capsys):
    whole = checkpoint.read_bytes()
    for content in (b"", b"no checkpoint", whole[:len(whole) // 2], pickle.dumps(Bomb())):
        (tmp_path / "ckpt.pt").write_bytes(content)
        with pytest.raises(ValueError, match="damaged or no checkpoint"):
            load_checkpoint(tmp_path / "ckpt.pt")
        assert "code has run" not in capsys.readouterr().out


@pytest.mark.parametrize("options, code, sentence", [
    (["--windw", 3], 2, "unrecognized arguments: --windw"),
    (["--window", "many"], 2, "invalid int value: 'many'"),
    (["--eval_every", 0], 1, "eval_every must be at least 1"),
    (["--window", 0], 1, "window is 0, and must be from 1"),
    (["--n_head", 3, "--n_embd", 16], 1, "n_embd / n_head is 5, and must be even"),
    (["--block_size", 100_000], 1, "block_size 100000 needs one more"),
    (["--data", "nowhere"], 1, "nowhere"),
    (["--device", "warp"], 1, "warp"),
    (["--resume"], 1, "there is no checkpoint"),
])
def test_a_wrong_option_of_train_is_one_sentence(data, tmp_path, options, code, sentence,
                                                 monkeypatch, capsys):
    options = ["--data", data, "--out_dir", tmp_path, *options]
    assert sentence in sentence_of(train, options, code, monkeypatch, capsys)


def test_a_run_is_not_overwritten_and_goes_on_only_with_its_data(data, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train.bin", "val.bin", "meta.json"):
        (tmp_path / "data" / name).write_bytes((data / name).read_bytes())
    options = ["--data", tmp_path / "data", "--out_dir", tmp_path / "out"]
    run("train.py", *options, *SHAPE, "--max_steps", 2)
    code, _, err = run("train.py", *options)
    assert code == 1 and "holds a run: go on with --resume" in err
    code, _, err = run("train.py", *options, "--resume", "--n_layer", 2)
    assert code == 1 and "has settled n_layer" in err
    (tmp_path / "data" / "train.bin").write_bytes(TEXT.upper().encode())
    code, _, err = run("train.py", *options, "--resume")
    assert code == 1 and "is not what the run was trained on" in err


# ---- sampling


def test_samples_are_repeatable_and_any_attention_can_be_asked_for(checkpoint):
    options = ["--ckpt", checkpoint, "--prompt", "It is", "--max_new_tokens", 30]
    code, first, err = run("sample.py", *options, "--num_samples", 2)
    assert code == 0 and first.startswith("It is") and "30 tokens in" in err
    assert run("sample.py", *options, "--num_samples", 2)[1] == first
    assert run("sample.py", *options, "--num_samples", 2, "--seed", 1)[1] != first
    code, _, err = run("sample.py", *options, "--attn", "sep", "--window", 4, "--sinks", 1,
                       "--separators", "It s", "--max_seps", 3)
    assert code == 0 and "8 of 34 keys" in err


def test_a_text_is_scored_by_the_dense_forward_from_files_and_pipes(checkpoint, tmp_path):
    text = TEXT[:33].encode()  # block_size and one more
    (tmp_path / "text.txt").write_bytes(text)
    model, _ = load_checkpoint(checkpoint)
    ids = torch.tensor([list(text)])
    nats = model(ids[:, :-1], ids[:, 1:])[1].item()
    code, out, _ = run("sample.py", "--ckpt", checkpoint, "--score", tmp_path / "text.txt")
    assert f"all 32 tokens: perplexity {math.exp(nats):.4f}, " in out
    assert f"{32 * nats / math.log(2) / 33:.4f} bits per byte, 100.00% of the keys" in out
    (tmp_path / "one.txt").write_text("x")
    code, _, err = run("sample.py", "--ckpt", checkpoint, "--score", tmp_path / "one.txt")
    assert code == 1 and "too short" in err
    for source in ("-", "/dev/stdin"):
        with open(tmp_path / "text.txt") as file:
            assert run("sample.py", "--ckpt", checkpoint, "--score", source, stdin=file)[1] == out


def test_a_long_score_is_printed_by_powers_of_ten_and_its_share_of_keys(checkpoint, tmp_path):
    (tmp_path / "long.txt").write_text((TEXT * 3)[:20_001])
    code, out, err = run("sample.py", "--ckpt", checkpoint, "--score", tmp_path / "long.txt",
                         "--attn", "streamingllm", "--window", 6, "--sinks", 4)
    lines = out.splitlines()
    assert lines[0].startswith("first 10,000 tokens: perplexity ") and len(lines) == 2
    share = sum(min(10, n) / n for n in range(1, 20_002)) / 20_001
    assert f"{share:.2%} of the keys" in lines[1]
    assert "10 of 20,001 keys" in err


def test_a_stream_ends_with_a_summary_on_ctrl_c_and_quietly_on_a_closed_pipe(checkpoint):
    process = start("sample.py", "--ckpt", checkpoint, "--stream")
    assert process.stdout.read(100)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "tokens/s; " in err and "Traceback" not in err
    process = start("sample.py", "--ckpt", checkpoint, "--stream")
    process.stdout.read(100)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 0 and "Error" not in err


@pytest.mark.parametrize("options, code, sentence", [
    (["--top_k", 0], 2, "--top_k is 0, and must be at least 1"),
    (["--temperature", "nan"], 2, "--temperature is nan"),
    (["--prompt", ""], 1, "the prompt is empty"),
    (["--score", "nowhere.txt"], 1, "nowhere.txt"),
    (["--score", "/dev/null"], 1, "too short"),
    (["--ckpt", "nowhere.pt"], 1, "there is no checkpoint nowhere.pt"),
    (["--attn", "seps"], 1, "attn is 'seps', and must be one of"),
])
def test_a_wrong_option_of_sample_is_one_sentence(checkpoint, options, code, sentence,
                                                  monkeypatch, capsys):
    options = ["--ckpt", checkpoint, *options]
    assert sentence in sentence_of(sample, options, code, monkeypatch, capsys)


def test_bytes_that_are_no_text_and_large_numbers_are_fine(checkpoint):
    options = ["--ckpt", checkpoint, "--max_new_tokens", 3]
    assert run("sample.py", *options, "--prompt", b"\xff\xfe")[0] == 0
    assert run("sample.py", *options, "--prompt", "-", stdin=subprocess.DEVNULL)[0] == 1
    assert run("sample.py", *options, "--seed", 2 ** 70, "--top_k", 10 ** 30,
               "--temperature", 1e-39)[0] == 0
