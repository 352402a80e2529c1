"""What the README promises of train.py and sample.py, and of all scripts where they are alike."""
import json
import os
import pickle
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SHAPE, TEXT, TRAINING, run, start, succeed, tiny

import sample
import train
from data.loader import get_batch
from data.tokenizer import ByteTokenizer
from model import GPT
from options import run_script
from pretrained import load_checkpoint
from sample import SampleConfig
from sep_kernel import is_modern
from train import TrainConfig, get_lr


@pytest.fixture
def out_dir(tmp_path):
    return tmp_path / "it's out"


@pytest.fixture
def training(data, out_dir):
    """Options of a short training."""
    return ["--data", data, "--out_dir", out_dir, "--max_steps", 20, *SHAPE]


@pytest.fixture
def train_here(training, monkeypatch):
    """The same in the tests' own process, where parts of it can be replaced."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, training)])
    monkeypatch.setattr(train, "catch_signals", list)
    return train.main


@pytest.fixture
def precisions():
    """The dtypes of all weights that are computed with, and whether in autocast."""
    def watch(module, inputs):
        seen.add(f"autocast {torch.is_autocast_enabled('cpu')}")
        seen.update(weight.dtype for weight in module.parameters())

    seen = set()
    with torch.nn.modules.module.register_module_forward_pre_hook(watch):
        yield seen


def log_of(out_dir):
    """{step: its numbers} of log.jsonl, whose first line says the settings."""
    log = {}
    first, *lines = map(json.loads, (out_dir / "log.jsonl").read_text().splitlines())
    assert first["settings"]["block_size"] == 32
    for line in lines:
        log.setdefault(line["step"], {}).update(line)
    return log


def n_lines(out_dir):
    """How many lines log.jsonl has by now."""
    path = out_dir / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def step_of(out_dir):
    return load_checkpoint(out_dir / "ckpt.pt")[1]["step"]


def shell(command):
    return subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)


def wait_until(condition):
    deadline = time.time() + 60
    while not condition():
        assert time.time() < deadline
        time.sleep(0.001)


# ---- training


def test_training_learns_writes_and_logs(checkpoint):
    log = log_of(checkpoint.parent)
    assert list(log) == list(range(41))
    assert log[0]["val_loss"] > 5.4 and log[40]["val_loss"] < 4.9
    assert log[40]["loss"] < log[1]["loss"] - 0.5
    assert set(os.listdir(checkpoint.parent)) == {"ckpt.pt", "log.jsonl"}


def test_learning_rate_rises_to_its_peak_and_falls_to_a_tenth_of_it():
    cfg = TrainConfig(max_steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [get_lr(step, cfg) for step in range(101)]
    assert [rates[4], rates[50], rates[100]] == pytest.approx([0.5, 0.55, 0.1])
    assert max(rates) == rates[9] > 0.95


def test_gradients_are_clipped_to_norm_1(training, out_dir):
    """After a step Adam's first moment is a tenth of the gradient."""
    succeed("train.py --max_steps 1", *training)
    _, state = load_checkpoint(out_dir / "ckpt.pt")
    moments = [moment["exp_avg"].norm() for moment in state["optimizer"]["state"].values()]
    assert abs(torch.stack(moments).norm() - 0.1) < 1e-4


def test_an_old_gpu_computes_in_float32_and_says_so(train_here, out_dir, precisions, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", print)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=7))
    for module in (train, sample):
        monkeypatch.setattr(module, "is_modern", lambda device: is_modern(torch.device("cuda", 0)))
    with pytest.warns(UserWarning, match="below compute capability 8.0: float32"):
        train_here()
        sample.run(SampleConfig(out_dir, "cpu"), {})
    assert precisions == {"autocast False", torch.float32}


def test_stopped_and_resumed_is_uninterrupted_to_the_last_digit(training, out_dir, tmp_path):
    training += ["--max_steps", 100_000]
    command = "train.py", *training
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        n_enough = n_lines(out_dir) + 30
        process = start(*command)
        wait_until(lambda: n_lines(out_dir) > n_enough)  # noqa: B023
        process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode == 1 and "Traceback" not in err
        _, advice = err.splitlines()[-1].split("go on with: python ")
        command = shlex.split(advice)
    process = start("train.py", *training, "--out_dir", tmp_path)
    wait_until(lambda: n_lines(tmp_path) > n_lines(out_dir))
    process.kill()
    process.communicate()
    log, uninterrupted = log_of(out_dir), log_of(tmp_path)
    assert list(log) == list(range(step_of(out_dir) + 1))
    assert all(log[step]["loss"] == uninterrupted[step]["loss"] for step in range(1, len(log)))


def test_kill_9_at_any_moment_leaves_a_whole_checkpoint_and_soon_no_other_file(training,
                                                                               out_dir):
    succeed("train.py", *training)
    for _ in range(2):
        n_enough = n_lines(out_dir) + 3
        process = start("train.py --resume --max_steps 100000 --eval_every 1", *training)
        # while a checkpoint is being written
        wait_until(lambda: n_lines(out_dir) > n_enough  # noqa: B023
                   and len(os.listdir(out_dir)) > 2)
        time.sleep(random.random() / 1000)
        process.kill()
        process.communicate()
        step = step_of(out_dir)
    succeed(f"train.py --resume --max_steps {step + 1}", *training)
    assert set(os.listdir(out_dir)) == {"ckpt.pt", "log.jsonl"}


def test_a_save_that_fails_half_way_leaves_the_checkpoint_as_it_was(train_here, out_dir,
                                                                    monkeypatch):
    def save_half_of_the_last(state, path):
        save(state, path)
        if state["step"] == 20:
            os.truncate(path, 1000)
            raise OSError("full")

    save = torch.save
    monkeypatch.setattr(torch, "save", save_half_of_the_last)
    assert train_here() == 1
    assert step_of(out_dir) == 0


def make_ckpt_a_folder(out_dir):
    (out_dir / "ckpt.pt").mkdir(exist_ok=True)


def make_out_dir_a_file(out_dir):
    shutil.rmtree(out_dir, ignore_errors=True)
    out_dir.touch()


@pytest.mark.parametrize("spoil", [make_ckpt_a_folder, make_out_dir_a_file])
def test_errors_of_saving_end_no_training(train_here, out_dir, monkeypatch, capsys, spoil):
    def spoil_and_get_batch(*arguments):
        spoil(out_dir)
        return get_batch(*arguments)

    monkeypatch.setattr(train, "get_batch", spoil_and_get_batch)
    assert train_here() == 1
    err = capsys.readouterr().err
    assert "could not be written, and is as it was" in err and "stopped at step 20" in err


@pytest.mark.parametrize("n_processes, micro_batch_size", [(1, 3), (2, 1), (3, None)])
def test_any_split_of_a_batch_trains_like_one_process_and_one_process_writes(
        training, out_dir, tmp_path, n_processes, micro_batch_size):
    succeed("train.py", *training, "--out_dir", tmp_path)
    options = map(str, [*training, "--micro_batch_size", micro_batch_size])
    shell(f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node={n_processes} "
          f"train.py {shlex.join(options)}")
    one, split = log_of(tmp_path), log_of(out_dir)
    assert all(abs(split[step]["loss"] - one[step]["loss"]) < 1e-5 for step in range(1, 21))
    assert abs(split[20]["val_loss"] - one[20]["val_loss"]) < 1e-5
    assert n_lines(out_dir) == 23


def test_ranks_that_another_program_left_behind_do_not_matter_and_bars_are_not_drawn_unasked(
        training, out_dir):
    out_dir.mkdir()
    (out_dir / "log.jsonl").write_text("of an earlier run")
    _, err = start("train.py", *training, env=os.environ | {
        "RANK": "1", "WORLD_SIZE": "two", "TQDM_DISABLE": "1"}).communicate()
    assert len(log_of(out_dir)) == 21
    assert err.startswith("validation loss")


def test_post_training_starts_from_the_model_and_changes_its_attention(checkpoint, data, out_dir):
    before = checkpoint.parent
    command = "train.py --attn sep --max_steps 20"
    options = "--data", data, "--init_from", before, "--out_dir", out_dir, *TRAINING
    _, err = succeed(command, *options)
    assert "validation:   0%" in err  # it shows how far it is
    assert "after 20 steps" in succeed(f"{command} --resume", *options)[1]
    log = log_of(out_dir)
    assert log[0]["val_loss"] < log_of(before)[40]["val_loss"] + 0.1
    assert log[20]["val_loss"] < log[0]["val_loss"]
    assert load_checkpoint(out_dir / "ckpt.pt")[0].config.attn == "sep"


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint_from_before(training, out_dir):
    code, _, err = run("train.py --learning_rate 1e30 --warmup_steps 1", *training)
    assert code == 1 and "not finite" in err and "lower --learning_rate" in err
    model, _ = load_checkpoint(out_dir / "ckpt.pt")
    assert all(weight.isfinite().all() for weight in model.parameters())


class Bomb:
    def __reduce__(self):
        return print, ("code has run",)


def test_damaged_checkpoints_are_a_sentence_and_run_no_code(checkpoint, tmp_path, capsys):
    whole = checkpoint.read_bytes()
    for content in (b"no checkpoint", whole[:10_000], pickle.dumps(Bomb(), protocol=2)):
        (tmp_path / "ckpt.pt").write_bytes(content)
        with pytest.raises(ValueError, match="no whole checkpoint"):
            step_of(tmp_path)
        assert "code has run" not in capsys.readouterr().out


def test_resume_goes_on_with_the_same_options_and_names_what_differs(training, data, tmp_path):
    shutil.copytree(data, tmp_path / "other")
    (tmp_path / "other" / "train.bin").write_bytes(TEXT.upper().encode())
    for options, code, sentence in (
            ("--max_steps 10", 0, "after 10 steps"),
            ("", 1, "is of an earlier run: go on with --resume"),
            ("--resume", 0, "after 20 steps"),
            ("--resume --max_steps 10", 0, "after 20 steps"),
            ("--resume --max_steps 30 --n_layer 2", 1, "'n_layer': 2"),
            (f"--resume --data {tmp_path}/other", 1, "is not what the run was trained on")):
        found, _, err = run(f"train.py {options}", *training)
        assert found == code and sentence in err


# ---- sampling


def test_samples_are_repeatable_and_any_attention_can_be_asked_for(checkpoint):
    options = "--ckpt", checkpoint.parent, "--prompt", "It is"
    command = "sample.py --max_new_tokens 20 --num_samples 2"
    first, err = succeed(command, *options)
    assert first.startswith("It is") and "20 tokens in" in err
    assert succeed(command, *options)[0] == first
    assert succeed(f"{command} --seed 1", *options)[0] != first
    # the prompt has 3 separators after its sink: it does not matter which others are drawn
    _, err = succeed(f"{command} --attn sep --window 4 --sinks 1 --max_seps 3", *options,
                     "--separators", "t s")
    assert "8 of 24 keys" in err


def write(ids, **settings):
    """Print a sample of a model that draws these bytes, or -1; a full stop ends a text."""
    model = GPT(tiny())
    model.generate = lambda *_: torch.tensor(ids)[:, None]
    tokenizer = ByteTokenizer()
    tokenizer.special_ids = {ord(".")}
    sample.write(model, tokenizer, [ord("a")], SampleConfig(**settings))


def test_a_model_that_has_become_broken_ends_a_sample_with_a_sentence():
    with pytest.raises(ValueError, match="logits are not finite"):
        write([ord("b"), -1])


@pytest.mark.parametrize("stream, expected", [(False, "ab\n"), (True, "ab.c\n")])
def test_a_token_that_ends_a_text_ends_a_sample_but_no_stream(capsys, stream, expected):
    write(list(b"b.c"), stream=stream)
    assert capsys.readouterr().out == expected


def test_weights_may_have_another_dtype(checkpoint, precisions, capsys):
    perplexities = []
    for dtype in ("float32", "bfloat16", "float16"):
        sample.run(SampleConfig(checkpoint, "cpu", dtype, score=ROOT / "LICENSE"), {})
        perplexities.append(float(capsys.readouterr().out.split()[-1]))
    assert precisions >= {torch.float32, torch.bfloat16, torch.float16}
    assert max(perplexities) < 1.05 * min(perplexities)


@torch.no_grad()
def test_a_text_is_scored_as_one_stream(checkpoint):
    text = TEXT[:1301]
    model, _ = load_checkpoint(checkpoint)
    model.configure(attn="streamingllm", window=6)
    ids = torch.tensor([list(text.encode())])
    _, nats = model(ids[:, :-1], ids[:, 1:], model.new_cache())
    process = start("sample.py --score - --attn streamingllm --window 6 --device cpu",
                    "--ckpt", checkpoint, stdin=subprocess.PIPE)
    out, err = process.communicate(text)
    assert out.startswith("1,300 tokens: perplexity") and "10 of 1,300 keys" in err
    assert float(out.split()[-1]) == pytest.approx(nats.exp().item(), rel=1e-4)


def test_a_stream_ends_with_a_summary_on_ctrl_c(checkpoint):
    process = start("sample.py --stream", "--ckpt", checkpoint)
    assert process.stdout.read(100)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 0 and "tokens/s; " in err and "Traceback" not in err


def test_bytes_that_are_no_text_and_large_numbers_are_fine(checkpoint):
    command = f"sample.py --max_new_tokens 3 --seed {2 ** 60} --top_k {2 ** 99} --temperature 1e-39"
    succeed(command, "--ckpt", checkpoint, "--prompt", "\udcff\udcfe")


# ---- all scripts


@pytest.mark.parametrize("command, code, sentence", [
    ("data/prepare.py --text=", 1, "No such file"),
    ("data/prepare.py --text /dev/null", 1, "too little text"),
    # the whole name, not its stem
    ("data/prepare.py --text {root}/data/loader.py", 1, "data/loader.py is there already"),
    ("sep_mask.py So. --attn seps", 2, "attn is 'seps', and must be one of full, streamingllm"),
    ("sep_mask.py So. --sinks -1", 2, "sinks is -1, and must be at least 0"),
    ("sep_mask.py So. --max_seps -1", 2, "max_seps is -1, and must be at least 0"),
    ("sep_mask.py So. --fixed_every 0", 2, "fixed_every is 0, and must be at least 1"),
    ("train.py --window 0", 2, "window is 0, and must be at least 1"),
    ("train.py --data {data} --out_dir {out} --device cpu --no-compile --block_size 100000", 1,
     "block_size 100000 needs one more"),
    ("sample.py --ckpt {ckpt} --temperature nan", 2, "temperature is nan"),
    ("sample.py --ckpt {ckpt} --dtype int8", 2, "dtype is int8, and must be float32, bfloat16 or"),
    ("sample.py --ckpt {ckpt} --prompt -", 1, "the prompt is empty"),
    ("sample.py --ckpt {ckpt} --score /dev/null", 1, "too short"),
    ("sample.py --ckpt {ckpt} --score=", 1, "No such file"),
    ("sample.py --ckpt nowhere.pt", 1, "nowhere.pt: there is no such file or folder"),
])
def test_a_wrong_option_is_one_sentence(data, checkpoint, tmp_path, command, code, sentence):
    found, _, err = run(
        command.format(root=ROOT, data=data, out=tmp_path, ckpt=checkpoint))
    assert found == code and sentence in err


def test_a_mistake_in_the_code_is_a_sentence_with_its_place_or_a_traceback(train_here, monkeypatch):
    def wrong(*_):
        raise TypeError("a mistake")

    monkeypatch.setattr(train, "get_lr", wrong)
    with pytest.raises(SystemExit, match=r"error: a mistake \(.*/test_scripts.py:\d+; .*-X dev"):
        run_script(train_here)
    monkeypatch.setattr(sys, "flags", SimpleNamespace(dev_mode=True))
    with pytest.raises(TypeError):
        run_script(wrong)


@pytest.mark.parametrize("stderr", ["2>&-", "2>&1 | true", "2>/dev/full"])
def test_a_closed_standard_error_stops_nothing(data, tmp_path, stderr):
    for command in (f"data/prepare.py --text {data.parent}/some.txt --out {tmp_path}/data",
                    f"train.py --data {tmp_path}/data --out_dir {tmp_path} --max_steps 2 "
                    + shlex.join(SHAPE)):
        shell(f"{sys.executable} {command} {stderr}")
    assert step_of(tmp_path) == 2


@pytest.mark.parametrize("command", [
    "sep_mask.py So. | true", "sep_mask.py So. >&-", "train.py --help | true",
    "sample.py --help | true", "data/prepare.py --help | true", "sample.py --ckpt {} >&-",
    "sample.py --ckpt {} --stream | true"])
def test_a_closed_standard_output_ends_a_script_quietly(checkpoint, command):
    assert "Error" not in shell(f"{sys.executable} {command.format(checkpoint)}").stderr
