"""The path of a user: prepare, train, interrupt, resume, post-train, sample, stream, score."""
import json
import math
import os
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

import train
from conftest import ROOT, SHAPE, run
from data import prepare
from train import load_checkpoint

TEXT = ("It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. "
        "However little known the feelings may be; this truth is well fixed!\n") * 40


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses_of(out):
    return [(line["step"], line.get("loss"), line.get("val_loss")) for line in log_of(out)]


@pytest.fixture
def text(tmp_path):
    (tmp_path / "some.txt").write_text(TEXT)
    prepare.prepare(tmp_path / "text", path=tmp_path / "some.txt")
    return tmp_path / "text"


@pytest.fixture
def trained(text):
    assert run(train, "--data", text, "--out_dir", text / "full", "--attn", "full", "--max_steps", 40, *SHAPE)[0] == 0
    return text / "full" / "ckpt.pt"


def test_training_learns_writes_and_logs(text):
    code, _, err = run(train, "--data", text, "--out_dir", text / "out", "--max_steps=40", *SHAPE)
    lines = log_of(text / "out")
    assert code == 0 and "python sample.py --ckpt" in err
    assert [line["step"] for line in lines] == [0, 10, 20, 30, 40] and lines[-1]["val_loss"] < lines[0]["val_loss"] - 1
    model, _, about = load_checkpoint(text / "out" / "ckpt.pt")
    assert about["step"] == 40 and model.config.separators == tuple(sorted(b".,?!;:\n"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_resume_after_a_signal_equals_the_uninterrupted_run(text, monkeypatch, number):
    options = ("--data", text, "--max_steps", 40, "--seed", 3, *SHAPE)
    assert run(train, "--out_dir", text / "whole", *options)[0] == 0
    schedule = train.learning_rate

    def interrupt(step, config):
        if step == 26:
            signal.raise_signal(number)
        return schedule(step, config)

    monkeypatch.setattr(train, "learning_rate", interrupt)
    code, _, err = run(train, "--out_dir", text / "cut", *options)
    assert code == 128 + number and "stopped at step 27" in err and "--resume" in err
    monkeypatch.setattr(train, "learning_rate", schedule)
    assert run(train, "--resume", "--out_dir", text / "cut")[0] == 0
    assert losses_of(text / "cut") == losses_of(text / "whole")
    a, b = (load_checkpoint(text / name / "ckpt.pt")[0].state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_same_seed_same_losses_other_seed_other_losses(text):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(train, "--data", text, "--out_dir", text / name, "--seed", seed, "--max_steps", 10, *SHAPE)
    assert losses_of(text / "a") == losses_of(text / "b") != losses_of(text / "c")


def test_accumulation_is_the_same_training(text):
    for name, parts in (("one", 1), ("four", 4)):
        run(train, "--data", text, "--out_dir", text / name, "--accumulate", parts, "--max_steps", 20, *SHAPE)
    for (_, a, x), (_, b, y) in zip(losses_of(text / "one"), losses_of(text / "four")):
        assert a == b or abs(a - b) < 1e-4 and (x is None or abs(x - y) < 1e-4)


def test_post_training_starts_from_the_models_loss_and_goes_down(trained, text):
    before = load_checkpoint(trained)[2]["val_loss"]
    run(train, "--data", text, "--init_from", trained, "--out_dir", text / "same", "--max_steps", 0,
        "--batch_size", 4, "--eval_batches", 2)
    assert abs(losses_of(text / "same")[0][2] - before) < 1e-6
    code = run(train, "--data", text, "--init_from", trained, "--attn", "sep", "--window", 8, "--out_dir", text / "post",
               "--max_steps", 40, "--eval_every", 20)[0]
    values = [value for _, _, value in losses_of(text / "post") if value]
    assert code == 0 and abs(values[0] - before) < 1.5 and values[-1] < values[0]
    assert load_checkpoint(text / "post" / "ckpt.pt")[0].config.attn == "sep"


def test_a_new_run_keeps_the_one_before(trained, text):
    old = trained.read_bytes()
    run(train, "--data", text, "--out_dir", trained.parent, "--max_steps", 1, *SHAPE)
    assert (trained.parent / "ckpt.pt.old").read_bytes() == old


def test_samples_are_repeatable_and_training_free_sep_works(trained):
    import sample
    texts = [run(sample, "--ckpt", trained, "--prompt", "It is", "--max_new_tokens", 60, "--num_samples", 2, "--seed", s)[1]
             for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and texts[0].count("---") == 2 and texts[0].startswith("It is")
    code, out, err = run(sample, "--ckpt", trained, "--attn", "sep", "--window", 8, "--stream", "--max_new_tokens", 300)
    assert code == 0 and len(out) > 200 and "% of all)" in err and "300 tokens in" in err


def test_score_is_the_dense_forwards_perplexity(trained, tmp_path):
    import sample
    file = tmp_path / "score.txt"
    file.write_text(TEXT[7:1200])
    for options in (("--attn", "full"), ("--attn", "sep", "--window", 8, "--max_seps", 5)):
        code, out, _ = run(sample, "--ckpt", trained, "--score", file, *options)
        model = load_checkpoint(trained)[0].double()
        model.configure(**dict(zip(("attn", "window", "max_seps"), options[1::2])))
        ids = torch.tensor([list(file.read_bytes())])
        with torch.no_grad():
            dense = math.exp(F.cross_entropy(model(ids[:, :-1])[0][0], ids[0, 1:]))
        printed = float([line for line in out.splitlines() if line.startswith("| all")][0].split("|")[2])
        assert code == 0 and abs(printed / dense - 1) < 1e-4


def test_stream_ends_with_a_summary_on_ctrl_c_and_quietly_on_a_closed_pipe(trained):
    command = [sys.executable, str(ROOT / "sample.py"), "--ckpt", str(trained), "--stream"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(200)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and b"tokens/s" in err.splitlines()[-1] and b"Traceback" not in err
    out.decode("utf-8")
    piped = subprocess.run(f"{' '.join(command)} | head -c 100", shell=True, capture_output=True, timeout=60)
    assert len(piped.stdout) == 100 and b"Traceback" not in piped.stderr and b"rror" not in piped.stderr


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(text):
    code, _, err = run(train, "--data", text, "--out_dir", text / "out", "--learning_rate", "1e38", "--grad_clip", "1e38",
                       "--max_steps", 40, *SHAPE)
    assert code == 1 and "the loss is" in err and "last good checkpoint" in err
    model, _, about = load_checkpoint(text / "out" / "ckpt.pt")
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_folder_that_cannot_be_written_loses_nothing(trained, text, monkeypatch):
    before, save = trained.read_bytes(), torch.save

    def full_disk(state, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    code, _, err = run(train, "--resume", "--out_dir", trained.parent, "--max_steps", 60)
    assert code == 1 and "No space left" in err and trained.read_bytes() == before

    def full_there(state, f):
        full_disk(state, f) if str(trained.parent) in f.name else save(state, f)

    monkeypatch.setattr(torch, "save", full_there)
    code, _, err = run(train, "--resume", "--out_dir", trained.parent, "--max_steps", 60)
    rescued = Path([word for word in err.split() if "nanosep-" in word][0])
    assert code == 1 and load_checkpoint(rescued)[2]["step"] == 60 and trained.read_bytes() == before
    rescued.unlink()


def kill_and_resume(text, out, kills, rng):
    """Train with a checkpoint at each step, kill -9 at random moments, go on; then one run to the end."""
    command = [sys.executable, str(ROOT / "train.py"), "--out_dir", str(out)]
    options = ["--data", str(text), "--eval_every", "1", "--eval_batches", "1", "--log_every", "1", "--max_steps", "400",
               *map(str, SHAPE[:-2])]
    for _ in range(kills):
        resume = (out / "ckpt.pt").exists()
        process = subprocess.Popen([*command, *(["--resume"] if resume else options)], stderr=subprocess.DEVNULL)
        while process.poll() is None and not (out / "ckpt.pt").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 4))
        process.kill()
        process.wait()
        load_checkpoint(out / "ckpt.pt")
    subprocess.run([*command, "--resume", "--max_steps", "410"], check=True, stderr=subprocess.DEVNULL)
    assert [line["step"] for line in log_of(out)] == list(range(411))


def test_kill_9_leaves_a_checkpoint_and_a_log_without_gap(text, seed):
    """KILLS=30 in the environment makes it the long version."""
    kill_and_resume(text, text / "killed", int(os.environ.get("KILLS", 3)), np.random.default_rng(seed))


def test_two_processes_train_like_one(text):
    options = ["--data", str(text), "--max_steps", "50", "--log_every", "1", "--eval_every", "50", "--eval_batches", "2",
               *map(str, SHAPE[:-4])]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    one = subprocess.run([sys.executable, str(ROOT / "train.py"), "--out_dir", text / "one", *options], env=env, capture_output=True)
    two = subprocess.run([*torchrun, "--out_dir", text / "two", *options], env=env, capture_output=True)
    assert one.returncode == two.returncode == 0, two.stderr.decode()
    a, b = losses_of(text / "one"), losses_of(text / "two")
    assert len(a) == len(b) == 51
    assert all(abs((x or 0) - (y or 0)) < 1e-5 for p, q in zip(a, b) for x, y in zip(p, q))
    odd = subprocess.run([*torchrun, "--out_dir", text / "odd", *options, "--batch_size", "3"], env=env, capture_output=True)
    assert odd.returncode == 1 and b"batch_size 3 does not divide" in odd.stderr


def test_docs_are_split_by_file_without_repetition(tmp_path, monkeypatch):
    import importlib.util
    for name in ("lib", "numpy", "torch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        for i in range(30):
            (tmp_path / name / f"m{i}.py").write_text(f'"""Module {name} {i}."""\ndef f():\n    """Twice."""\nx = g("""a\\nb\\nc\\n{i}""")\n')
    (tmp_path / "lib" / "broken.py").write_text("def (")
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: type("spec", (), dict(origin=str(tmp_path / name / "__init__.py"))))
    prepare.prepare(tmp_path / "docs")
    parts = [set((tmp_path / "docs" / name).read_text().split("\n\n")) - {""} for name in ("train.bin", "val.bin")]
    both = (tmp_path / "docs" / "train.bin").read_text() + (tmp_path / "docs" / "val.bin").read_text()
    assert not parts[0] & parts[1] and both.count("Twice.") == 1 and both.count("Module") == 90
    assert 0.05 < len(parts[1]) / len(parts[0] | parts[1]) < 0.15


def test_a_document_of_100_mb_is_prepared_in_bounded_memory(tmp_path):
    with open(tmp_path / "big.txt", "wb") as f:
        f.truncate(100_000_000)
    tracemalloc.start()
    prepare.prepare(tmp_path / "big", path=tmp_path / "big.txt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "big" / "train.bin").stat().st_size == 90_000_000 and peak < 10_000_000


def test_recall_ledgers_are_consistent_and_seeded(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare.prepare(tmp_path / name, "recall", seed=seed)
    a, b, c = ((tmp_path / name / "val.bin").read_bytes() for name in "abc")
    assert a == b != c
    for ledger in a.decode().splitlines()[:50]:
        facts = ledger.rstrip(".").split(".")
        assert len({fact[0] for fact in facts}) == len(set(facts)) and all(len(fact) == 2 for fact in facts)
    code, _, err = run(train, "--data", tmp_path / "a", "--out_dir", tmp_path / "out", "--max_steps", 2, "--block_size", 64,
                       *SHAPE[2:])
    assert code == 0


@pytest.mark.parametrize("data", [b"no separators at all " * 50, b".,;" * 400, b"a\r\nb.\r\n" * 200, b"\0\0.\0" * 300,
                                  "naïve 🙂. 🙃\n".encode() * 80], ids=["no separators", "only separators", "CRLF", "NUL", "emoji"])
def test_strange_text_trains_and_streams(tmp_path, data):
    import sample
    (tmp_path / "t.txt").write_bytes(data)
    prepare.prepare(tmp_path / "t", path=tmp_path / "t.txt")
    assert (tmp_path / "t" / "train.bin").read_bytes() + (tmp_path / "t" / "val.bin").read_bytes() == data
    assert run(train, "--data", tmp_path / "t", "--out_dir", tmp_path / "o", "--max_steps", 3, *SHAPE)[0] == 0
    code, out, _ = run(sample, "--ckpt", tmp_path / "o" / "ckpt.pt", "--stream", "--max_new_tokens", 80,
                       "--prompt_file", tmp_path / "t.txt")
    assert code == 0 and out.encode("utf-8")


@pytest.mark.parametrize("options", [("--window", 100), ("--max_seps", 0), ("--n_layer", 1, "--n_head", 1), ("--sinks", 50),
                                     ("--block_size", 1), ("--window", 1, "--sinks", 0), ("--attn", "fixed", "--fixed_every", 1)])
def test_strange_shapes_train_and_stream(text, options):
    import sample
    assert run(train, "--data", text, "--out_dir", text / "o", "--max_steps", 3, *SHAPE, *options)[0] == 0
    code, out, _ = run(sample, "--ckpt", text / "o" / "ckpt.pt", "--stream", "--max_new_tokens", 60, "--prompt", "a")
    assert code == 0 and out


def test_vocabulary_of_two_and_nanogpt_folders(tmp_path):
    import sample
    folder = tmp_path / "two"
    folder.mkdir()
    for part in ("train.bin", "val.bin"):
        np.random.default_rng(0).integers(2, size=500).astype(np.uint16).tofile(folder / part)
    code, _, err = run(train, "--data", folder, "--out_dir", tmp_path / "gpt2", "--max_steps", 1, *SHAPE)
    assert code == 0 and load_checkpoint(tmp_path / "gpt2" / "ckpt.pt")[0].config.vocab_size == 50304
    (folder / "meta.json").write_text(json.dumps(dict(vocab_size=2, dtype="uint16", separators=[1])))
    assert run(train, "--data", folder, "--out_dir", tmp_path / "o", "--max_steps", 2, *SHAPE)[0] == 0
    code, out, _ = run(sample, "--ckpt", tmp_path / "o" / "ckpt.pt", "--prompt", "1 0", "--max_new_tokens", 5)
    assert code == 0 and set(out.split()) <= {"0", "1", "---"}


def test_the_map_is_printed():
    import sep_cache
    code, out, _ = run(sep_cache, "Hi, you. And more!", "--window", 4)
    assert code == 0 and all(mark in out for mark in "█▓▒·") and len(out.splitlines()) == 3 + 18
