"""Everything that RESULTS.md says, measured: trains what is missing, analyses, writes the tables, draws the figures.

    python experiments/results.py                    all of it; most of a day on two cores, in pieces if you like
    python experiments/results.py --only recall      one of the questions below
    python experiments/results.py --no_training      only what the runs that are there can answer

Runs are two side by side, with one thread each. A finished run, and a loss that was measured once, is not repeated.
Tables are printed, and replaced in RESULTS.md between the comments that name them; figures go to figures/*.svg.

Each function below is one question, in the order of RESULTS.md. The arithmetic is in `measures.py`, the drawing in
`figures.py`. Two texts must be there: `python data/prepare.py`'s documentation and its `--source recall`; for books, a
text of yours of about 10 MB prepared with `--text FILE --out data/books`, and another in --unseen for the long stream.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from experiments import figures  # noqa: E402
from experiments.measures import (  # noqa: E402
    FAR_RULES,
    attention_maps,
    block_nats,
    blocks_of,
    changed_loss,
    far_pairs,
    flops_per_token,
    keys_seen,
    lift,
    mean_and_error,
    mention_distances,
    rule_nats,
    stream_nats,
)
from sep_cache import far_layout  # noqa: E402, F401
from train import load_checkpoint, load_data  # noqa: E402

RESULTS = Path(__file__).with_name("RESULTS.md")
SEEDS = (0, 1, 2)
MODES = ("full", "streamingllm", "fixed", "sep")


# ---- runs


class Run(NamedTuple):
    """A run of train.py: its folder's name, its options, the run whose checkpoint it starts from."""
    name: str
    options: tuple
    init_from: str | None = None
    keep_snapshots: bool = False  # a copy of every checkpoint, ckpt-STEP.pt

    @property
    def data(self):
        return self.name.split("-")[0]


def docs_run(attn, seed=0, window=32):
    """The CPU preset on the documentation: block_size 256, 16 separators, 1,000 steps of 4,096 bytes."""
    if attn == "full":
        snapshots = ("--eval_every", 50) if seed == 0 else ()
        return Run(f"docs-full-{seed}", ("--attn", "full", "--seed", seed, *snapshots), keep_snapshots=seed == 0)
    return Run(f"docs-{attn}-{window}-{seed}", ("--attn", attn, "--window", window, "--seed", seed))


def books_run(attn, window, seed=0):
    """Books: block_size 1,024, as many separators as the window has tokens, 700 steps of 4,096 bytes."""
    name = f"books-{attn}-{seed}" if attn == "full" else f"books-{attn}-{window}-{seed}"
    return Run(name, ("--data", "books", "--block_size", 1024, "--batch_size", 4, "--max_steps", 700, "--eval_every", 100,
                      "--attn", attn, "--window", window, "--max_seps", window, "--seed", seed))


def post_run(attn, window, max_steps=150):
    """The model with full attention, trained on with another attention."""
    name = f"books-post_{attn}-{window}-0"
    return Run(name, ("--data", "books", "--batch_size", 4, "--max_steps", max_steps, "--eval_every", 25, "--learning_rate",
                      1e-3, "--attn", attn, "--window", window, "--max_seps", window), init_from="books-full-0")


def recall_run(attn, seed=0):
    """The ledger of facts: three layers whose windows reach 21 tokens, 2,000 steps of 4,096 bytes."""
    return Run(f"recall-{attn}-{seed}", (
        "--data", "recall", "--n_layer", 3, "--n_head", 4, "--n_embd", 128, "--block_size", 64, "--window", 8, "--sinks", 1,
        "--max_seps", "None", "--batch_size", 64, "--max_steps", 2000, "--learning_rate", 1e-3, "--eval_every", 100,
        "--attn", attn, "--seed", seed), keep_snapshots=seed == 0)


BOOKS_FULL = books_run("full", 64)


class Lab:
    """The folder of the runs: trains them, and remembers what was measured with them."""

    def __init__(self, out_dir, may_train, unseen):
        self.out_dir = out_dir
        self.may_train = may_train
        self.unseen = unseen
        self.measured = out_dir / "measured"
        self.measured.mkdir(parents=True, exist_ok=True)

    def finished(self, runs):
        """Those of the runs that are finished; the missing ones are trained first, if that is allowed."""
        missing = [run for run in runs if not self._is_done(run)]
        if missing and self.may_train:
            sources = [BOOKS_FULL for run in missing if run.init_from and not (self.out_dir / run.init_from / "done").exists()]
            for wave in (sources[:1], missing):
                with ThreadPoolExecutor(max_workers=2) as pool:
                    list(pool.map(self._train, wave))
        return [run for run in runs if self._is_done(run)]

    def _is_done(self, run):
        return (self.out_dir / run.name / "done").exists()

    def _train(self, run):
        folder = self.out_dir / run.name
        folder.mkdir(parents=True, exist_ok=True)
        options = [*run.options, "--device", "cpu", "--out_dir", folder]
        if run.init_from:
            options += ["--init_from", self.out_dir / run.init_from / "ckpt.pt"]
        command = [sys.executable, "train.py", *map(str, options)]
        print("$", " ".join(command[1:]), file=sys.stderr)
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if run.keep_snapshots:
            copy_checkpoints(process, folder)
        if process.wait() != 0:
            raise SystemExit(f"results.py: the run {run.name} ended with exit code {process.returncode}")
        (folder / "done").touch()

    def model(self, run, snapshot="", **changes):
        """The model of a run, or of its snapshot "-STEP", with other settings of attention."""
        model = load_checkpoint(self.out_dir / run.name / f"ckpt{snapshot}.pt")[0].requires_grad_(False).eval()
        model.configure(**changes)
        return model

    def snapshots(self, run):
        """Steps of the checkpoints that were kept, ascending."""
        names = (self.out_dir / run.name).glob("ckpt-*.pt")
        return sorted(int(path.stem.split("-")[1]) for path in names)

    def val_losses(self, run):
        """{step: validation loss} from the log."""
        lines = (self.out_dir / run.name / "log.jsonl").read_text().splitlines()
        return {line["step"]: line["val_loss"] for line in map(json.loads, lines) if "val_loss" in line}

    def remember(self, name, compute):
        """compute(), a dict of arrays, kept in a file of this name."""
        path = self.measured / f"{name}.npz"
        if not path.exists():
            print(f"measuring {name}", file=sys.stderr)
            np.savez(path, **compute())
        return np.load(path)

    def block_nats(self, run, n_tokens=262_144, **changes):
        """`block_nats` on the validation text of the run's data."""
        name = describe(run, changes) + "-blocks"

        def compute():
            model = self.model(run, **changes)
            return dict(nats=block_nats(model, load_data(run.data)[1], n_tokens // model.config.block_size))
        return self.remember(name, compute)["nats"]

    def stream(self, run, tokens, label, chunk_size=1024, **changes):
        """`stream_nats` of tokens, whose name is `label`."""
        name = f"{describe(run, changes)}-stream-{label}"
        return self.remember(name, lambda: stream_nats(self.model(run, **changes), tokens, chunk_size)._asdict())


def describe(run, changes):
    return "-".join([run.name, *(f"{key}_{value}" for key, value in changes.items())])


def copy_checkpoints(process, folder):
    """While a training runs, keep a copy of each checkpoint it writes."""
    path = folder / "ckpt.pt"
    seen = None
    done = threading.Event()
    while True:
        is_over = process.poll() is not None
        if path.exists() and path.stat().st_mtime_ns != seen:
            seen = path.stat().st_mtime_ns
            copy = folder / "copy.pt"
            shutil.copy(path, copy)
            steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()
                     if "val_loss" in line]
            copy.rename(folder / f"ckpt-{steps[-1]}.pt")
        if is_over:
            return
        done.wait(0.5)


# ---- tables


def table(name, head, rows):
    """Print a table, and put it into RESULTS.md between the comments that name it."""
    lines = [head, ["---"] * len(head), *rows]
    text = "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
    print(f"\n{name}\n{text}")
    if RESULTS.exists():
        place = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        RESULTS.write_text(place.sub(lambda match: match[1] + text + "\n" + match[2], RESULTS.read_text()))


def costs(model, tokens):
    """(keys of the last query, keys of the mean query) in texts of block_size tokens."""
    seen = keys_seen(blocks_of(tokens, model.config.block_size, 200)[:, :-1], model.config).double()
    return seen[:, -1].mean().item(), seen.mean().item()


def mean_and_range(values):
    """Several seeds in a cell."""
    if len(values) == 1:
        return f"{values[0]:.4f} (one seed)"
    return f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def plus_minus(differences, digits=4):
    mean, error = mean_and_error(differences)
    return f"{mean:+.{digits}f} ± {error:.{digits}f}"


# ---- 1. do separators receive more attention than their number?


def lifts(lab):
    """Attention by kind of key in models with full attention, through training, and what it is worth."""
    for run, n_texts in ((docs_run("full"), 32), (BOOKS_FULL, 6), (recall_run("full"), 256)):
        if not lab.finished([run]):
            continue
        model = lab.model(run)
        separators = torch.tensor(model.config.separators)
        blocks = blocks_of(load_data(run.data)[1], model.config.block_size, n_texts)
        is_separator = torch.isin(blocks[:, :-1], separators)

        # through training
        steps = lab.snapshots(run)
        if steps:
            def over_training(run=run, steps=steps, blocks=blocks, is_separator=is_separator):
                snapshots = [lab.model(run, f"-{step}") for step in steps]
                return dict(steps=steps, lift=[lift_of_heads(m, blocks, is_separator, 8) for m in snapshots])
            history = lab.remember(f"{run.name}-lift-history", over_training)
            figures.lift_through_training(history["steps"], history["lift"], run.data)

        # at the end, with what each head's separators are worth
        def at_the_end(run=run, model=model, blocks=blocks, is_separator=is_separator):
            return dict(lift_8=lift_of_heads(model, blocks, is_separator, 8),
                        lift_32=lift_of_heads(model, blocks, is_separator, 32),
                        **lift_of_sinks(model, blocks),
                        **losses_without(model, load_data(run.data)[2], blocks, is_separator))
        found = lab.remember(f"{run.name}-lift", at_the_end)
        rows = []
        for layer, head in np.ndindex(found["lift_8"].shape):
            at = (layer, head)
            rows.append((f"{layer + 1}.{head + 1}", f"{found['lift_8'][at]:.2f}", f"{found['lift_32'][at]:.2f}",
                         f"{found['sinks'][at]:.2f}", f"{found['far'][at]:.2f}", f"{found['separators'][at]:+.4f}",
                         f"{found['others'][at]:+.4f}", f"{found['head'][at]:+.4f}"))
        table(f"lift-{run.data}", ("layer.head", "lift, beyond 8", "lift, beyond 32", "lift of the sinks",
                                   "attention beyond 8", "loss without its separators", "without as many other keys",
                                   "without the head"), rows)
        table(f"lift-{run.data}-all", ("all heads at once", "loss"), [
            ("as trained", f"{found['base']:.4f}"), ("no separators beyond 8", f"{found['all_separators']:+.4f}"),
            ("as many other keys hidden", f"{found['all_others']:+.4f}"), ("no sinks beyond 8", f"{found['all_sinks']:+.4f}")])
        if run.data == "docs":
            draw_heat_map(model, found["lift_8"])
        figures.lift_by_head(found["lift_8"], run.data)


def lift_of_heads(model, blocks, is_separator, distance):
    """(n_layer, n_head) float64."""
    maps = attention_maps(model, blocks[:, :-1])
    far = far_pairs(maps.shape[-1], distance, model.config.sinks)
    return np.stack([lift(p, far, is_separator).numpy() for p in maps])


def lift_of_sinks(model, blocks):
    """Lift of the sinks among all keys beyond 8, and the share of attention that goes there at all."""
    maps = attention_maps(model, blocks[:, :-1])
    T = maps.shape[-1]
    far = far_pairs(T, 8)
    is_sink = (torch.arange(T) < model.config.sinks).expand(len(blocks), T)
    n_queries = far.any(1).sum() * len(blocks)
    return dict(sinks=np.stack([lift(p, far, is_sink).numpy() for p in maps]),
                far=np.stack([((p * far).sum((0, 2, 3)) / n_queries).numpy() for p in maps]))


def losses_without(model, meta, blocks, is_separator):
    """What the loss gains when keys beyond 8 are hidden from a head, or from all heads, or a head is silent."""
    if meta["answers"]:
        blocks = blocks.clone()  # the loss is taken on the answers alone
    T = blocks.shape[1] - 1
    far = far_pairs(T, 8, model.config.sinks)
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(is_separator.shape, generator=generator).masked_fill(is_separator, 2).argsort(1)
    n_separators = is_separator.sum(1, keepdim=True)
    others = torch.zeros_like(is_separator).scatter(1, order, torch.arange(T) < n_separators)  # as many, at random
    hide = dict(separators=far & is_separator[:, None], others=far & others[:, None],
                sinks=far_pairs(T, 8) & (torch.arange(T) < model.config.sinks))
    answers = meta["answers"]
    heads = list(np.ndindex(model.config.n_layer, model.config.n_head))
    base = changed_loss(model, blocks, answers=answers)
    found = dict(base=base)
    for kind in ("separators", "others", "head"):
        found[kind] = np.zeros((model.config.n_layer, model.config.n_head))
    for at in heads:
        for kind in ("separators", "others"):
            found[kind][at] = changed_loss(model, blocks, {at: hide[kind]}, answers=answers) - base
        found["head"][at] = changed_loss(model, blocks, silent_heads=[at], answers=answers) - base
    for kind, mask in hide.items():
        found[f"all_{kind}"] = changed_loss(model, blocks, dict.fromkeys(heads, mask), answers=answers) - base
    return found


SENTENCE = "Return the sum, rounded.\nIf empty, return 0. See also: mean.\n"


def draw_heat_map(model, lift_by_head):
    """The head with the highest lift, over a sentence that follows other text as in training."""
    layer, head = np.unravel_index(lift_by_head.argmax(), lift_by_head.shape)
    before = bytes(load_data("docs")[1][:128].tolist())
    ids = torch.tensor([list(before + SENTENCE.encode())])
    p = attention_maps(model, ids)[layer, 0, head, 128:, 128:]
    figures.heat_map(p.numpy(), SENTENCE, f"attention of head {layer + 1}.{head + 1}")


# ---- 2. from scratch


def scratch(lab):
    """Each mode from scratch, three seeds, on the documentation."""
    runs = [docs_run(attn, seed) for attn in MODES for seed in SEEDS] + [docs_run("streamingllm", 0, 48)]
    finished = lab.finished(runs)
    val = load_data("docs")[1]
    losses = {run: lab.block_nats(run).mean() for run in finished}
    rows = []
    for label, group in grouped(finished):
        model = lab.model(group[0])
        last, mean = costs(model, val)
        T = model.config.block_size
        tflop = flops_per_token(model, mean) * 1000 * 4096 / 1e12
        pairs = [lab.block_nats(run).mean(1) - lab.block_nats(docs_run("full", seed_of(run))).mean(1)
                 for run in group if docs_run("full", seed_of(run)) in finished]
        rows.append((label, mean_and_range([losses[run] for run in group]),
                     f"{np.mean([d.mean() for d in pairs]):+.4f}" if pairs else "",
                     len(group), f"{last:.0f}", f"{last / T:.1%}", f"{mean / ((T + 1) / 2):.1%}", f"{tflop:.1f}"))
    table("scratch", ("attn", "validation loss: mean (range)", "less full, same seed", "seeds", "keys at the end", "KV kept",
                      "pairs computed", "TFLOP"), rows)


def grouped(runs):
    """[(mode and window, its runs of all seeds)], in the order of the runs."""
    groups = {}
    for run in runs:
        groups.setdefault(run.name.split("-", 1)[1].rsplit("-", 1)[0].replace("-", ", window "), []).append(run)
    return list(groups.items())


def seed_of(run):
    return int(run.name.rsplit("-", 1)[1])


# ---- 3. recall


EDGES = (3, 6, 9, 12, 18, 24, 36, 63)


def recall(lab):
    """The accuracy of a value by the distance of its key's last mention."""
    runs = [recall_run("full"), recall_run("fixed")] + [recall_run(attn, s) for s in SEEDS for attn in ("sep", "streamingllm")]
    finished = lab.finished(runs)
    if not finished:
        return
    val, meta = load_data("recall")[1:]
    ids = torch.from_numpy(val[:2000 * meta["record"]].astype(np.int64)).view(-1, meta["record"])
    distance = fact_distances(ids, meta["answers"])[:, 1:]
    names = [f"{a} to {b - 1}" for a, b in zip(EDGES, EDGES[1:])]
    curves = {}
    for run in finished:
        def compute(run=run):
            model = lab.model(run)
            right = torch.cat([model(part[:, :-1])[0].argmax(-1) == part[:, 1:] for part in ids.split(100)])
            bins = [(distance >= a) & (distance < b) for a, b in zip(EDGES, EDGES[1:])]
            return dict(accuracy=[right[b].double().mean().item() for b in bins])
        curves.setdefault(run.name.split("-")[1], []).append(lab.remember(f"{run.name}-accuracy", compute)["accuracy"])
    curves = {attn: np.array(curves[attn]) for attn in MODES if attn in curves}  # (seeds, bins)
    rows = []
    for i, name in enumerate(names):
        rows.append((name, *(percent_range(curve[:, i]) for curve in curves.values())))
    heads = [f"{attn} ({len(curve)} seed{'s' * (len(curve) > 1)})" for attn, curve in curves.items()]
    table("recall", ("distance", *heads), rows)
    figures.recall_by_distance(names, curves)
    learning = {run.name: lab.val_losses(run) for run in finished}
    steps = [step for step in (200, 400, 600, 800, 1000, 1200, 1400, 1600, 1800, 2000)]
    table("recall-learning", ("run", *steps), [(name, *(f"{losses[s]:.3f}" for s in steps)) for name, losses in learning.items()])


def fact_distances(ids, answers):
    """From each value to the value of the same key's last mention: ids (N, T) -> (N, T), 0 for none."""
    is_value = torch.isin(ids, torch.tensor(answers))
    distance = torch.zeros_like(ids)
    for row in range(len(ids)):
        last = {}
        for at in is_value[row].nonzero()[:, 0].tolist():
            key = ids[row, at - 1].item()
            distance[row, at] = at - last.get(key, at)
            last[key] = at
    return distance


def percent_range(values):
    low, high = min(values), max(values)
    if f"{low:.1%}" == f"{high:.1%}":
        return f"{low:.1%}"
    return f"{np.mean(values):.1%} ({low:.1%} to {high:.1%})"


# ---- 4. books: compute, KV kept, position, post-training


WINDOWS = (16, 32, 64, 128)


def books(lab):
    """A longer context and plain prose: every mode, by compute and by KV kept."""
    runs = [BOOKS_FULL, books_run("fixed", 64)]
    runs += [books_run(attn, window) for window in WINDOWS for attn in ("sep", "streamingllm")]
    runs += [books_run(*pair, seed) for seed in SEEDS[1:] for pair in (("sep", 16), ("streamingllm", 32))]
    finished = lab.finished(runs)
    if not finished:
        return
    val = load_data("books")[1]
    rows, compute, kept = [], {}, {}
    for label, group in grouped(finished):
        model = lab.model(group[0])
        last, mean = costs(model, val)
        flops = flops_per_token(model, mean)
        losses = [lab.block_nats(run).mean() for run in group]
        rows.append((label, mean_and_range(losses), f"{last:.0f}", f"{last / 1024:.1%}", f"{mean / 512.5:.1%}",
                     f"{flops * 700 * 4096 / 1e12:.1f}"))
        curve = {step: loss for step, loss in lab.val_losses(group[0]).items() if step}
        compute[label] = ([flops * step * 4096 / 1e12 for step in curve], list(curve.values()))
        kept.setdefault(label.split(",")[0], []).append((last / 1024, np.mean(losses)))
    table("books", ("attn", "validation loss: mean (range)", "keys at the end", "KV kept", "pairs computed", "TFLOP"), rows)
    figures.loss_by_compute({name: compute[name] for name in
                             ("full", "streamingllm, window 64", "fixed, window 64", "sep, window 64") if name in compute})
    by_position(lab, finished)
    training_free(lab, kept)


def by_position(lab, finished):
    """Loss by position in texts of 1,024 tokens, at equal rows."""
    edges = (0, 32, 64, 128, 256, 512, 1024)
    shown = [run for run in finished if seed_of(run) == 0]
    if BOOKS_FULL not in shown:
        return
    rows = []
    for a, b in zip(edges, edges[1:]):
        rows.append((f"{a} to {b - 1}", *(f"{lab.block_nats(run)[:, a:b].mean():.4f}" for run in shown)))
    table("books-position", ("position", *(run.name.removeprefix("books-").removesuffix("-0") for run in shown)), rows)


def training_free(lab, trained):
    """Models with full attention, used with another one; beside models trained with it."""
    panels = {"books, trained": trained}
    for run, windows in ((BOOKS_FULL, (16, 32, 64, 128, 256)), (docs_run("full"), (8, 16, 32, 64, 128))):
        if not lab.finished([run]):
            continue
        val, T = load_data(run.data)[1], lab.model(run).config.block_size
        curves = {"full": [(1.0, lab.block_nats(run).mean())]}
        rows = [("full", "", "", "100.0%", f"{curves['full'][0][1]:.4f}")]
        for attn in ("streamingllm", "sep"):
            for window in windows:
                changes = dict(attn=attn, window=window, max_seps=window)
                last, _ = costs(lab.model(run, **changes), val)
                loss = lab.block_nats(run, **changes).mean()
                curves.setdefault(attn, []).append((last / T, loss))
                rows.append((attn, window, f"{last:.0f}", f"{last / T:.1%}", f"{loss:.4f}"))
        table(f"free-{run.data}", ("attn", "window", "keys at the end", "KV kept", "validation loss"), rows)
        panels[f"{run.data}, training-free"] = curves
    figures.loss_by_kv(panels)


def post(lab):
    """Post-training: a model with full attention goes on with sep, or with a window of as many rows."""
    finished = lab.finished([post_run("full", 64), post_run("sep", 32), post_run("streamingllm", 64)])
    if not finished:
        return
    curves = [lab.val_losses(run) for run in finished]
    heads = [run.name.removeprefix("books-post_").removesuffix("-0") for run in finished]
    table("post", ("step", *heads), [(step, *(f"{curve[step]:.4f}" for curve in curves)) for step in curves[0]])


# ---- 5. where far keys stand


def positions(lab):
    """Four rules for separators whose distance training has not shown, on 12,000 unseen tokens."""
    tokens = load_data("docs")[1][:12_289]
    columns = {}
    for label, run, changes in (
            ("trained with sep, window 32, 16 separators", docs_run("sep"), {}),
            ("trained with full, used with sep, window 64, 16 separators", docs_run("full"), dict(attn="sep", window=64))):
        if not lab.finished([run]):
            continue
        model = lab.model(run, **changes)
        nats = {rule: lab.remember(f"{describe(run, changes)}-rule-{rule}", lambda model=model, rule=rule: dict(
            nats=rule_nats(model, tokens, rule)))["nats"] for rule in FAR_RULES}
        streamed = lab.stream(run, tokens, "12k", **changes)["nats"].mean()
        assert abs(nats["dropped"].mean() / streamed - 1) < 1e-3, "this evaluation is not the model's"
        without = lab.stream(run, tokens, "12k", **{**changes, "max_seps": 0})["nats"].mean()
        columns[label] = [np.exp(without), *(np.exp(nats[rule].mean()) for rule in FAR_RULES)]
    rows = [(rule, *(f"{column[i]:.4f}" for column in columns.values()))
            for i, rule in enumerate(("no separators", *FAR_RULES))]
    table("positions", ("far separators at", *columns), rows)


# ---- 6. long streams


def stream(lab):
    """A million unseen tokens and more, at equal rows; more and fewer separators; words that come again."""
    rows = []
    for data, sep, window in (("docs", docs_run("sep"), docs_run("streamingllm", 0, 48)),
                              *(("books", books_run("sep", w), books_run("streamingllm", 2 * w)) for w in WINDOWS[:3])):
        if len(lab.finished([sep, window])) < 2:
            continue
        tokens = load_data(data)[1]
        ours, theirs = lab.stream(sep, tokens, "val"), lab.stream(window, tokens, "val")
        edges = (0, 1000, 10_000, 100_000, len(tokens) - 1)
        spans = list(zip(edges, edges[1:])) + [(0, edges[-1])]
        cells = [f"{np.exp(ours['nats'][a:b].mean()):.4f} / {np.exp(theirs['nats'][a:b].mean()):.4f}" for a, b in spans]
        n = len(ours["nats"]) // 1000 * 1000
        per_thousand = (ours["nats"][:n] - theirs["nats"][:n]).reshape(-1, 1000).mean(1)
        rows.append((f"{sep.name} / {window.name}", f"{ours['rows']:.0f} / {theirs['rows']:.0f}", *cells,
                     plus_minus(per_thousand)))
        words(data, sep, window, tokens, ours["nats"], theirs["nats"])
    table("stream", ("sep / streamingllm", "rows", "first 1,000", "to 10,000", "to 100,000", "after that", "all",
                     "difference, nats"), rows)
    more_separators(lab)


def more_separators(lab):
    """The same models with fewer and more visible separators than in training."""
    columns = {}
    for run in (docs_run("sep"), books_run("sep", 16), books_run("sep", 64)):
        if not lab.finished([run]):
            continue
        tokens = load_data(run.data)[1]
        for n in (0, 4, 8, 16, 32, 64, None):
            found = lab.stream(run, tokens, "val", max_seps=n)
            columns.setdefault(run.name, {})[n] = f"{np.exp(found['nats'].mean()):.4f}"
    if columns:
        table("max_seps", ("max_seps", *columns), [(n, *(c[n] for c in columns.values())) for n in (0, 4, 8, 16, 32, 64, None)])


GAPS = (1, 32, 64, 128, 256, 512, 1024, 1 << 40)


def words(data, sep, window, tokens, ours, theirs):
    """Loss on words by the distance of their last mention."""
    text = bytes(tokens.tolist())
    rows = []
    for label, names_only in (("all words of four letters or more", False), ("names", True)):
        gap = mention_distances(text, names_only=names_only)[1:]  # of the predicted bytes
        bins = [("first mention", gap == 0)]
        bins += [(f"{a} to {b - 1}" if b < 1 << 40 else f"{a} and more", (gap >= a) & (gap < b)) for a, b in zip(GAPS, GAPS[1:])]
        for name, at in bins:
            if at.sum() > 100:
                rows.append((label, name, f"{at.sum():,}", f"{ours[at].mean():.4f}", f"{theirs[at].mean():.4f}",
                             plus_minus(ours[at] - theirs[at])))
    table(f"words-{sep.name}", ("words", "last mention, bytes back", "bytes", sep.name, window.name, "difference"), rows)


def long(lab):
    """Four million unseen tokens in one stream."""
    if lab.unseen is None:
        print("--unseen FILE gives the text of the long stream", file=sys.stderr)
        return
    tokens = np.memmap(lab.unseen, dtype=np.uint8, mode="r")[:4_000_001]
    runs = lab.finished([books_run("sep", 64), books_run("streamingllm", 128)])
    if len(runs) < 2:
        runs = lab.finished([books_run("sep", 16), books_run("streamingllm", 32)])
    if len(runs) < 2:
        return
    found = {run.name: lab.stream(run, tokens, "unseen", chunk_size=256) for run in runs}
    n = len(tokens) - 1
    edges = [("first 10,000", 0, 10_000), ("first 100,000", 0, 100_000), ("first 1,000,000", 0, 1_000_000),
             ("last 100,000", n - 100_000, n), (f"all {n:,}", 0, n)]
    rows = [(name, *(f"{np.exp(f['nats'][a:b].mean()):.4f}" for f in found.values())) for name, a, b in edges]
    rows += [("keys that the last token sees", *(f"{f['rows']:.0f}" for f in found.values())),
             ("cache at the end, MiB", *(f"{f['mib']:.3f}" for f in found.values()))]
    for name, part in (("first", slice(10, 1000)), ("last", slice(-990, None))):
        rows.append((f"µs per token, {name} 250,000 (median)",
                     *(f"{np.median(f['seconds'][part]) / 256 * 1e6:.0f}" for f in found.values())))
    table("long", ("", *found), rows)
    figures.perplexity_by_position({name: f["nats"] for name, f in found.items()})


# ---- 7. the space as a separator


def spaces(lab):
    """The space and the tab among the separators, as the paper has them."""
    if not (ROOT / "data" / "spaces").exists():
        return
    options = list(books_run("sep", 16).options)
    options[1] = "spaces"
    run = Run("spaces-sep-16-0", tuple(options))
    finished = lab.finished([run, books_run("sep", 16), books_run("streamingllm", 32)])
    if run not in finished:
        return
    table("spaces", ("run", "validation loss", "keys at the end"), [
        (r.name, f"{lab.block_nats(r).mean():.4f}", f"{costs(lab.model(r), load_data(r.data)[1])[0]:.0f}") for r in finished])


# ---- the command line


PARTS = dict(lift=lifts, scratch=scratch, recall=recall, books=books, post=post, positions=positions, stream=stream, long=long,
             spaces=spaces)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one question instead of all")
    parser.add_argument("--no_training", action="store_true", help="use only the runs that are finished")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out-results", help="where the runs go (default: out-results)")
    parser.add_argument("--unseen", type=Path, metavar="FILE", help="a text of more than 4,000,000 bytes for the long stream")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    lab = Lab(args.out_dir, not args.no_training, args.unseen)
    if args.only in (None, "mask"):
        figures.mask()
    for name, part in PARTS.items():
        if args.only in (None, name):
            part(lab)


if __name__ == "__main__":
    main()
