"""The path of a user: prepare, train, interrupt, resume, post-train, sample, stream, score."""
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHAPE, run

import sample
import sep_cache
import train
from data import prepare
from data.loader import get_batch, load_data
from model import GPT, sample_token
from train import TrainConfig, get_lr, load_checkpoint


def log_of(out_dir):
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def losses_of(out_dir):
    """(step, loss or None, validation loss or None) of each line of a log."""
    return [(line["step"], line.get("loss"), line.get("val_loss")) for line in log_of(out_dir)]


def assert_close(losses, others, tolerance):
    assert len(losses) == len(others)
    for line, other in zip(losses, others, strict=True):
        for a, b in zip(line, other, strict=True):
            assert a == b or abs(a - b) < tolerance, (line, other)


def trains(*options):
    """Train, which must succeed."""
    code, _, err = run(train, *options)
    assert code == 0, err
    return err


def samples(*options):
    """Sample, which must succeed: (what was printed, what was said about it)."""
    code, out, err = run(sample, *options)
    assert code == 0, err
    return out, err


# ---- preparing data


def test_docs_are_split_by_file_without_repetition(tmp_path, monkeypatch):
    fake_docs(tmp_path, monkeypatch)
    prepare.prepare(tmp_path / "docs")
    train_text = (tmp_path / "docs" / "train.bin").read_text()
    val_text = (tmp_path / "docs" / "val.bin").read_text()
    train_docs = set(train_text.split("\n\n")) - {""}
    val_docs = set(val_text.split("\n\n")) - {""}
    assert not train_docs & val_docs
    assert 0.05 < len(val_docs) / len(train_docs | val_docs) < 0.15
    both = train_text + val_text
    assert both.count("Twice.") == 1 and both.count("Module") == 90


def fake_docs(folder, monkeypatch):
    """Three small packages in the place of Python, NumPy and torch."""
    for name in ("lib", "numpy", "torch"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("")
        for i in range(30):
            (folder / name / f"m{i}.py").write_text(
                f'"""Module {name} {i}."""\n'
                f'def f():\n    """Twice."""\n'
                f'x = g("""a\\nb\\nc\\n{i}""")\n')
    (folder / "lib" / "broken.py").write_text("def (")

    def find_spec(name):
        return importlib.machinery.ModuleSpec(name, None, origin=str(folder / name / "__init__.py"))

    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda name: str(folder / "lib"))
    monkeypatch.setattr(prepare.importlib.util, "find_spec", find_spec)


def test_the_first_training_prepares_its_data_and_the_second_does_not(tmp_path, monkeypatch):
    fake_docs(tmp_path, monkeypatch)
    monkeypatch.setattr(train, "DATA_FOLDER", tmp_path / "data")
    monkeypatch.setattr("data.loader.DATA_FOLDER", tmp_path / "data")
    options = ("--out_dir", tmp_path / "out", "--max_steps", 1, *SHAPE)
    assert "bytes to train" in trains(*options)
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt").info["data_meta"]["source"] == "docs"
    assert "bytes to train" not in trains(*options)


def test_text_is_prepared_where_there_is_no_torch(tmp_path):
    (tmp_path / "some.txt").write_text("One. Two, three.\n" * 20)
    program = ("import runpy, sys; sys.modules['torch'] = None; "
               "runpy.run_path(sys.argv[0], run_name='__main__')")
    script = str(ROOT / "data" / "prepare.py")
    command = [sys.executable, "-c", f"import sys; sys.argv[0] = {script!r}; {program}",
               "--text", str(tmp_path / "some.txt"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "out" / "train.bin").stat().st_size == 306


def test_a_document_of_100_mb_is_prepared_in_bounded_memory(tmp_path):
    with open(tmp_path / "big.txt", "wb") as f:
        f.truncate(100_000_000)
    tracemalloc.start()
    prepare.prepare(tmp_path / "big", path=tmp_path / "big.txt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "big" / "train.bin").stat().st_size == 90_000_000
    assert peak < 10_000_000


def test_recall_ledgers_are_consistent_and_seeded(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare.prepare(tmp_path / name, "recall", seed=seed)
    a, b, c = ((tmp_path / name / "val.bin").read_bytes() for name in "abc")
    assert a == b != c
    for ledger in a.decode().splitlines()[:50]:
        facts = ledger.rstrip(".").split(".")
        assert len(facts) == 21 and all(len(fact) == 2 for fact in facts)
        assert len({fact[0] for fact in facts}) == len(set(facts))  # one value for each key
    trains("--data", tmp_path / "a", "--out_dir", tmp_path / "out", *SHAPE, "--max_steps", 2,
           "--block_size", 63)


def test_targets_that_do_not_count_leave_the_inputs_alone(tmp_path):
    prepare.prepare(tmp_path, "recall")
    train_tokens, _, meta = load_data(tmp_path)
    for batch_size in (1, 3):
        x, y = get_batch(train_tokens, meta, batch_size, 63, np.random.default_rng(0))
        assert (x >= 0).all()
        assert torch.equal(y[:, :-1] >= 0, torch.isin(x[:, 1:], torch.tensor(meta["answers"])))


# ---- training


def test_training_learns_writes_and_logs(data, tmp_path):
    err = trains("--data", data, "--out_dir", tmp_path, "--max_steps=40", *SHAPE)
    lines = log_of(tmp_path)
    assert "python sample.py --ckpt" in err
    assert [line["step"] for line in lines] == [0, 10, 20, 30, 40]
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 1
    model, _, info = load_checkpoint(tmp_path / "ckpt.pt")
    assert info["step"] == 40
    assert info["val_loss"] == lines[-1]["val_loss"]
    assert model.config.separators == tuple(sorted(b".,?!;:\n"))


def test_learning_rate_rises_to_its_peak_and_falls_to_a_tenth_of_it():
    cfg = TrainConfig(learning_rate=0.2, warmup_steps=10, max_steps=110)
    rates = [get_lr(step, cfg) for step in range(111)]
    assert rates[:10] == pytest.approx([0.02 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(0.2)
    assert rates[60] == pytest.approx(0.11)  # half way down
    assert rates[110] == pytest.approx(0.02)
    assert all(later < earlier for earlier, later in zip(rates[10:], rates[11:], strict=False))
    without_warmup = TrainConfig(learning_rate=0.2, warmup_steps=0, max_steps=0)
    assert get_lr(0, without_warmup) == pytest.approx(0.2)


def test_grad_clip_0_is_no_limit(data, tmp_path):
    for grad_clip in (0, 1e9):
        trains("--data", data, "--out_dir", tmp_path / str(grad_clip), "--grad_clip", grad_clip,
               "--max_steps", 3, *SHAPE)
    assert losses_of(tmp_path / "0") == losses_of(tmp_path / "1000000000.0")


def test_same_seed_same_losses_other_seed_other_losses(data, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trains("--data", data, "--out_dir", tmp_path / name, "--seed", seed, "--max_steps", 10,
               *SHAPE)
    a, b, c = (losses_of(tmp_path / name) for name in "abc")
    assert a == b != c


def test_accumulation_is_the_same_training(data, tmp_path):
    for parts in (1, 4):
        trains("--data", data, "--out_dir", tmp_path / str(parts), "--grad_accum_steps", parts,
               "--max_steps", 20, *SHAPE)
    assert_close(losses_of(tmp_path / "1"), losses_of(tmp_path / "4"), 1e-4)


def test_resume_after_a_signal_equals_the_uninterrupted_run(data, tmp_path, monkeypatch):
    options = ("--data", data, "--max_steps", 40, "--seed", 3, *SHAPE)
    trains("--out_dir", tmp_path / "whole", *options)
    whole = load_checkpoint(tmp_path / "whole" / "ckpt.pt").model.state_dict()
    for number in (signal.SIGINT, signal.SIGTERM):

        def get_lr_and_a_signal(step, cfg, number=number):
            if step == 26:
                signal.raise_signal(number)
            return get_lr(step, cfg)

        cut = tmp_path / str(number)
        with monkeypatch.context() as patch:
            patch.setattr(train, "get_lr", get_lr_and_a_signal)
            code, _, err = run(train, "--out_dir", cut, *options)
        assert code == 128 + number and "stopped at step 27" in err and "--resume" in err
        trains("--resume", "--out_dir", cut)
        assert losses_of(cut) == losses_of(tmp_path / "whole")
        weights = load_checkpoint(cut / "ckpt.pt").model.state_dict()
        assert all(torch.equal(weights[name], whole[name]) for name in whole)


def kill_and_resume(data, out_dir, n_kills, rng):
    """Train with a checkpoint at each step, kill -9 at random moments, resume; then finish."""
    command = [sys.executable, str(ROOT / "train.py"), "--out_dir", str(out_dir)]
    options = ["--data", data, *SHAPE, "--eval_every", 1, "--eval_batches", 1, "--log_every", 1,
               "--max_steps", 400]
    for _ in range(n_kills):
        is_resumed = (out_dir / "ckpt.pt").exists()
        more = ["--resume"] if is_resumed else map(str, options)
        process = subprocess.Popen([*command, *more], stderr=subprocess.DEVNULL)
        while process.poll() is None and not (out_dir / "ckpt.pt").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 4))
        process.kill()
        process.wait()
        load_checkpoint(out_dir / "ckpt.pt")
    subprocess.run([*command, "--resume", "--max_steps", "410"], check=True,
                   stderr=subprocess.DEVNULL)
    assert [line["step"] for line in log_of(out_dir)] == list(range(411))


def test_kill_9_leaves_a_checkpoint_and_a_log_without_gap(data, tmp_path, seed):
    """KILLS=30 in the environment makes it the long version."""
    n_kills = int(os.environ.get("KILLS", 3))
    kill_and_resume(data, tmp_path / "killed", n_kills, np.random.default_rng(seed))


def test_two_processes_train_like_one(data, tmp_path):
    script = str(ROOT / "train.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    options = ["--data", data, *SHAPE, "--max_steps", 50, "--log_every", 1, "--eval_every", 50]

    def start(name, program):
        command = [sys.executable, *program, "--out_dir", tmp_path / name, *options]
        return subprocess.run([str(word) for word in command], capture_output=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})

    one = start("one", [script])
    two = start("two", torchrun)
    assert one.returncode == two.returncode == 0, two.stderr.decode()
    assert len(log_of(tmp_path / "two")) == 51
    assert_close(losses_of(tmp_path / "one"), losses_of(tmp_path / "two"), 1e-5)


def test_post_training_starts_from_the_models_loss_and_goes_down(full_checkpoint, data, tmp_path):
    before = load_checkpoint(full_checkpoint).info["val_loss"]
    options = ("--data", data, "--init_from", full_checkpoint)
    trains(*options, "--out_dir", tmp_path / "same", "--max_steps", 0, "--batch_size", 4,
           "--eval_batches", 2)
    assert losses_of(tmp_path / "same")[0][2] == pytest.approx(before, abs=1e-6)

    trains(*options, "--out_dir", tmp_path / "post", "--attn", "sep", "--window", 8,
           "--max_steps", 40, "--eval_every", 20)
    val_losses = [val_loss for _, _, val_loss in losses_of(tmp_path / "post") if val_loss]
    assert abs(val_losses[0] - before) < 1.5
    assert val_losses[-1] < val_losses[0]
    assert load_checkpoint(tmp_path / "post" / "ckpt.pt").model.config.attn == "sep"


def test_a_new_run_keeps_the_one_before(data, tmp_path):
    trains("--data", data, "--out_dir", tmp_path, "--max_steps", 1, *SHAPE)
    first = (tmp_path / "ckpt.pt").read_bytes()
    trains("--data", data, "--out_dir", tmp_path, "--max_steps", 2, *SHAPE)
    assert (tmp_path / "ckpt.pt.old").read_bytes() == first
    assert load_checkpoint(tmp_path / "ckpt.pt").info["step"] == 2


def test_a_run_that_fails_at_once_moves_nothing(data, tmp_path):
    trains("--data", data, "--out_dir", tmp_path, "--max_steps", 0, *SHAPE)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code, _, _ = run(train, "--data", data, "--out_dir", tmp_path, *SHAPE, "--batch_size", 10 ** 15)
    assert code == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    trains("--resume", "--out_dir", tmp_path, "--max_steps", 1)  # from step 0
    assert [line["step"] for line in log_of(tmp_path)] == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "log.jsonl"]


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(data, tmp_path):
    for eval_every in (250, 1):  # 1: the first loss that is not finite is a validation's
        code, _, err = run(train, "--data", data, "--out_dir", tmp_path, "--max_steps", 40,
                           "--learning_rate", "1e38", "--grad_clip", "1e38", *SHAPE,
                           "--eval_every", eval_every)
        assert code == 1 and "the loss is" in err and "last good checkpoint" in err
        model = load_checkpoint(tmp_path / "ckpt.pt").model
        assert all(weight.isfinite().all() for weight in model.parameters())


def test_a_run_that_was_moved_goes_on_where_it_is(data, tmp_path):
    trains("--data", data, "--out_dir", tmp_path / "a", "--max_steps", 1, *SHAPE)
    (tmp_path / "a").rename(tmp_path / "b")
    trains("--resume", "--out_dir", tmp_path / "b", "--max_steps", 2, "--weight_decay", 0.5)
    checkpoint = load_checkpoint(tmp_path / "b" / "ckpt.pt")
    assert checkpoint.info["step"] == 2 and not (tmp_path / "a").exists()
    assert checkpoint.optimizer_state["param_groups"][0]["weight_decay"] == 0.5


def test_a_folder_that_cannot_be_written_loses_nothing(full_checkpoint, tmp_path, monkeypatch):
    out_dir = tmp_path / "out"
    shutil.copytree(full_checkpoint.parent, out_dir)
    before = (out_dir / "ckpt.pt").read_bytes()
    torch_save = torch.save
    is_full = {"everywhere": True}

    def save(state, f):
        if is_full["everywhere"] or str(out_dir) in f.name:
            f.write(b"half")
            raise OSError(28, "No space left on device")
        torch_save(state, f)

    monkeypatch.setattr(torch, "save", save)
    options = ("--resume", "--out_dir", out_dir, "--max_steps", 60)
    code, _, err = run(train, *options)
    assert code == 1 and "No space left" in err and "is lost" in err
    assert (out_dir / "ckpt.pt").read_bytes() == before

    is_full["everywhere"] = False
    code, _, err = run(train, *options)
    rescued = Path(next(word for word in err.split() if "nanosep-" in word))
    assert code == 1 and load_checkpoint(rescued).info["step"] == 60
    assert (out_dir / "ckpt.pt").read_bytes() == before
    rescued.unlink()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_log_that_cannot_be_written_does_not_end_the_training(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "open_log", lambda *args: open("/dev/full", "a"))
    err = trains("--data", data, "--out_dir", tmp_path, "--max_steps", 2, *SHAPE)
    assert "could not write /dev/full" in err
    assert load_checkpoint(tmp_path / "ckpt.pt").info["step"] == 2


def test_peak_memory_knows_the_units_of_linux_and_macos(monkeypatch):
    def getrusage(who):
        return resource.struct_rusage([0, 0, 3 * 2 ** 20] + [0] * 13)  # the third is ru_maxrss

    monkeypatch.setattr(resource, "getrusage", getrusage)
    monkeypatch.setattr(sys, "platform", "linux")
    assert train.peak_memory(torch.device("cpu")) == 3  # GiB, from KiB
    monkeypatch.setattr(sys, "platform", "darwin")
    assert train.peak_memory(torch.device("cpu")) == 3 / 1024  # from bytes


# ---- sampling, streaming, scoring


def test_tokens_are_sampled_as_often_as_they_are_likely(seed):
    n = 100_000
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    for temperature, top_k in ((1.0, None), (0.7, None), (1.0, 3), (2.0, 1), (1.5, 99)):
        likely = logits / temperature
        if top_k is not None:
            likely[top_k:] = -torch.inf  # the logits descend
        p = likely.softmax(0)
        tokens = sample_token(logits.repeat(n, 1), temperature, top_k)
        counts = tokens.bincount(minlength=len(logits))
        deviation = (n * p * (1 - p)).sqrt()
        assert ((counts - n * p).abs() <= 5 * deviation).all(), (temperature, top_k)
    assert (sample_token(logits.repeat(100, 1), 0, None) == 0).all()  # greedy


def test_samples_are_repeatable_and_training_free_sep_works(full_checkpoint, monkeypatch):
    options = ("--ckpt", full_checkpoint, "--prompt", "It is", "--max_new_tokens", 60,
               "--num_samples", 2)
    texts = [samples(*options, "--seed", seed)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].count("---") == 2 and texts[0].startswith("It is")

    n_threads = []
    monkeypatch.setattr(torch, "set_num_threads", n_threads.append)
    out, err = samples("--ckpt", full_checkpoint, "--attn", "sep", "--window", 8, "--stream",
                       "--max_new_tokens", 300)
    assert len(out) > 200 and "300 tokens in" in err and "a full cache: " in err
    assert n_threads == [1]  # a small model


def test_text_is_decoded_as_its_bytes_arrive():
    text = "naïve 🙂."
    tokenizer = sample.ByteTokenizer()
    parts = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
    assert parts == ["n", "a", "", "ï", "v", "e", " ", "", "", "", "🙂", "."]
    assert tokenizer.decode([0xF0, 0x9F]) == "" and tokenizer.decode([], is_end=True) == "\ufffd"
    assert tokenizer.decode([65], is_end=True) == "A"
    not_utf8 = b"\xff.\r\n"
    assert bytes(tokenizer.encode(not_utf8.decode(errors="surrogateescape"))) == not_utf8


def test_on_a_terminal_text_comes_in_whole_lines_and_its_end_is_not_lost(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    writer = sample.TextWriter()
    seen = []
    for part in ("On", "e.\n", "Two", "x" * 150, "en", "d"):
        writer.write(part)
        seen.append(capsys.readouterr().out)
    writer.flush()
    assert seen == ["", "One.\n", "", "Two" + "x" * 150 + "\n", "", ""]
    assert capsys.readouterr().out == "end\n"


def test_score_is_the_dense_forwards_perplexity(full_checkpoint, data, tmp_path):
    file = tmp_path / "score.txt"
    file.write_bytes((data / "train.bin").read_bytes()[7:1200])
    ids = torch.tensor([list(file.read_bytes())])
    n_so_far = torch.arange(1, ids.shape[1])
    for changes in (dict(attn="full"), dict(attn="streamingllm", window=5, sinks=3),
                    dict(attn="sep", window=8, max_seps=5)):
        options = [f"--{name}={value}" for name, value in changes.items()]
        out, err = samples("--ckpt", full_checkpoint, "--score", file, *options)
        model = load_checkpoint(full_checkpoint).model.double()
        model.configure(**changes)
        with torch.no_grad():
            logits, _ = model(ids[:, :-1])
        dense = F.cross_entropy(logits[0], ids[0, 1:]).exp().item()
        last_row = out.splitlines()[-1].split("|")
        assert last_row[1].strip() == "all 1,192"
        assert float(last_row[2]) == pytest.approx(dense, rel=1e-4)

        printed = float(re.search(r"keys used: ([\d.]+)%", err)[1]) / 100
        if changes["attn"] == "full":
            assert printed == 1
        elif changes["attn"] == "streamingllm":
            share = (n_so_far.clamp(max=5 + 3) / n_so_far).mean().item()
            assert printed == pytest.approx(share, abs=1e-4)
        else:
            assert 8 / 1192 < printed < (n_so_far.clamp(max=8 + 4 + 5) / n_so_far).mean().item()


def test_a_diverged_models_perplexity_is_inf(full_checkpoint, data, tmp_path):
    state = torch.load(full_checkpoint, weights_only=True)
    state["model"]["embed.weight"] *= 1e5
    torch.save(state, tmp_path / "ckpt.pt")
    out, err = samples("--ckpt", tmp_path / "ckpt.pt", "--score", data / "val.bin")
    assert out.splitlines()[-1].split("|")[2].strip() == "inf" and "Warning" not in err


def test_ctrl_c_prints_the_samples_and_the_score_so_far(full_checkpoint, data, monkeypatch):
    def generate(model, ids, *options):
        yield from [torch.tensor([ord("x")])] * 3
        raise KeyboardInterrupt

    monkeypatch.setattr(GPT, "generate", generate)
    assert samples("--ckpt", full_checkpoint, "--prompt", "It")[0] == "Itxxx\n---\n"

    def key_shares_and_a_signal(*args, key_shares=sample.key_shares):
        signal.raise_signal(signal.SIGINT)
        return key_shares(*args)

    monkeypatch.setattr(sample, "key_shares", key_shares_and_a_signal)
    out, _ = samples("--ckpt", full_checkpoint, "--score", data / "train.bin")
    assert out.splitlines()[-1].startswith("| all 512 |")


def test_stream_ends_with_a_summary_on_ctrl_c_and_quietly_on_a_closed_pipe(full_checkpoint):
    command = [sys.executable, str(ROOT / "sample.py"), "--ckpt", str(full_checkpoint), "--stream"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(200)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and b"Traceback" not in err
    assert b"tokens/s" in err.splitlines()[-1]
    out.decode("utf-8")
    piped = subprocess.run(f"{' '.join(command)} | head -c 100", shell=True, capture_output=True,
                           timeout=60)
    assert len(piped.stdout) == 100
    assert b"Traceback" not in piped.stderr and b"rror" not in piped.stderr


# ---- strange texts and shapes


def test_strange_text_trains_and_streams(tmp_path):
    texts = dict(no_separators=b"no separators at all " * 50, only_separators=b".,;" * 400,
                 crlf=b"a\r\nb.\r\n" * 200, nul=b"\0\0.\0" * 300,
                 emoji="naïve 🙂. 🙃\n".encode() * 80, not_utf8=b"\xff\xfe.\x80" * 200)
    for name, text in texts.items():
        file = tmp_path / f"{name}.txt"
        file.write_bytes(text)
        prepare.prepare(tmp_path / name, path=file)
        parts = [(tmp_path / name / part).read_bytes() for part in ("train.bin", "val.bin")]
        assert b"".join(parts) == text
        trains("--data", tmp_path / name, "--out_dir", tmp_path / "out", "--max_steps", 3, *SHAPE)
        out, _ = samples("--ckpt", tmp_path / "out" / "ckpt.pt", "--stream",
                         "--max_new_tokens", 80, "--prompt_file", file)
        assert out.encode("utf-8")


def test_strange_shapes_train_and_stream(data, tmp_path):
    for options in (("--window", 100), ("--max_seps", 0), ("--n_layer", 1, "--n_head", 1),
                    ("--sinks", 50), ("--block_size", 1), ("--window", 1, "--sinks", 0),
                    ("--attn", "fixed", "--fixed_every", 1)):
        trains("--data", data, "--out_dir", tmp_path, "--max_steps", 3, *SHAPE, *options)
        out, _ = samples("--ckpt", tmp_path / "ckpt.pt", "--stream", "--max_new_tokens", 60,
                         "--prompt", "a")
        assert out, options


def test_vocabulary_of_two_and_nanogpt_folders(tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part in ("train.bin", "val.bin"):
        rng.integers(2, size=500).astype(np.uint16).tofile(folder / part)
    options = ("--data", folder, "--out_dir", tmp_path / "out", "--max_steps", 2, *SHAPE)
    trains(*options)  # without meta.json: GPT-2 tokens
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt").model.config.vocab_size == 50304

    meta = dict(vocab_size=2, dtype="uint16", separators=[1])
    (folder / "meta.json").write_text(json.dumps(meta))
    trains(*options)
    base = ("--ckpt", tmp_path / "out" / "ckpt.pt")
    out, _ = samples(*base, "--prompt", "1 0", "--max_new_tokens", 5)
    assert out.split()[:2] == ["1", "0"] and set(out.split()) == {"0", "1", "---"}
    out, _ = samples(*base, "--score", folder / "val.bin")
    assert "all 499" in out and "bits per byte" not in out


def test_the_map_is_printed():
    code, out, _ = run(sep_cache, "Hi, you. And more!", "--window", 4)
    assert code == 0 and all(mark in out for mark in "█▓▒·")
    assert sum(line[:4].strip().isdigit() for line in out.splitlines()) == 18
