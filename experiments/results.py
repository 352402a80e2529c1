"""Measures everything that RESULTS.md says: trains what is missing, writes tables, draws figures.

    python experiments/results.py                  all of it; some six hours on two cores
    python experiments/results.py --only recall    one of the questions below
    python experiments/results.py --no_training    what the runs that are there can answer
    python experiments/results.py --model FOLDER --text FILE    the table of a pretrained model

Runs go two side by side, with one thread each. A run that is finished is not repeated, and neither
is a loss that was measured. Tables are printed, and put into RESULTS.md between the comments that
name them; figures go to figures/*.svg.

Each function below is one question. The runs are listed in `runs.py`, the arithmetic is in
`measures.py`, the drawing in `figures.py`. The texts, first:

    python data/prepare.py                                the documentation on this machine
    python data/prepare.py --source recall
    python data/prepare.py --text FILE --out data/books   10 MB of books; others for --unseen
    python data/prepare.py --text FILE --out data/spaces --separators $'.,?!;:\\n \\t'
    perl -0pe 's/(?<!\\n)\\n(?!\\n)/ /g' FILE > JOINED      the same books without line breaks in
    python data/prepare.py --text JOINED --out data/unwrapped          their paragraphs
"""
import argparse
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this file runs as a script
from data.loader import load_data
from experiments import figures
from experiments.measures import (
    FAR_RULES,
    attention_maps,
    block_starts,
    blocks_of,
    changed_nats,
    fact_distances,
    far_pairs,
    flops_per_token,
    keys_seen,
    lift,
    mean_and_error,
    mention_distances,
    rule_nats,
)
from experiments.runs import (
    BOOKS_FULL,
    BYTES_PER_STEP,
    MODES,
    SEEDS,
    VALIDATION_BYTES,
    Lab,
    books_run,
    describe,
    docs_run,
    longer_run,
    post_run,
    recall_run,
)
from llama import load_model, load_tokenizer
from sample import score
from sep_cache import SepCache

RESULTS = Path(__file__).with_name("RESULTS.md")


# ---- tables


def table(name, head, rows):
    """Print a table, and put it into RESULTS.md between the comments that name it.

    Without rows, nothing happens: what RESULTS.md says stays.
    """
    rows = list(rows)
    if not rows:
        return
    text = markdown(head, rows)
    print(f"\n{name}\n{text}", flush=True)
    place = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    page, n_places = place.subn(lambda match: f"{match[1]}{text}\n{match[2]}", RESULTS.read_text())
    if n_places == 0:
        print(f"results.py: RESULTS.md has no place for the table {name}", file=sys.stderr)
    RESULTS.write_text(page)


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def over_seeds(values, form=".4f"):
    """One cell: the value of one seed, or mean (lowest to highest) of several."""
    cells = [format(value, form) for value in (np.mean(values), min(values), max(values))]
    if len(values) == 1 or cells[1] == cells[2]:
        return cells[0]
    return f"{cells[0]} ({cells[1]} to {cells[2]})"


def plus_minus(differences, chosen=None):
    """Mean and standard error, in one cell."""
    mean, error = mean_and_error(differences, chosen)
    return f"{mean:+.4f} ± {error:.4f}"


def by_mode(runs):
    """{attn and window: its runs of all seeds}, in the order of the runs."""
    groups = {}
    for run in runs:
        groups.setdefault(run.mode, []).append(run)
    return groups


def costs(model, tokens):
    """Keys that the last and the mean query of a text of block_size tokens see."""
    ids = blocks_of(tokens, model.config.block_size, 200)[:, :-1]
    seen = keys_seen(ids, model.config).double()
    return seen[:, -1].mean().item(), seen.mean().item()


# ---- the mask


def mask(lab):
    """The definition, drawn; needs no run."""
    figures.mask()


# ---- lift: do separators receive more attention than their number?

KINDS_OF_TEXT = {"line breaks": "\n", "`. , ? ! ; :`": ".,?!;:", "spaces": " ", "`e`": "e",
                 "`a`": "a", "`o`": "o"}
KINDS_OF_LEDGER = {"full stops": ".", "keys": "abcdefgh", "values": "0123456789"}


def lifts(lab):
    """Attention by kind of key in models with full attention, and what it is worth."""
    heads = []
    without_kinds = {}
    readers = []
    for run, n_texts in ((docs_run("full"), 64), (BOOKS_FULL, 16),
                         (books_run("full", 64, data="unwrapped"), 16), (recall_run("full"), 256)):
        if not lab.finished([run]):
            continue
        model = lab.model(run)
        _, val, meta = load_data(run.data)
        blocks = blocks_of(val, model.config.block_size, n_texts, meta["record"])
        is_separator = torch.isin(blocks[:, :-1], torch.tensor(model.config.separators))
        lift_through_training(lab, run, blocks, is_separator)
        found = lift_at_the_end(lab, run, model, blocks, is_separator, meta["answers"])
        strongest = np.unravel_index(found["lift_8"].argmax(), found["lift_8"].shape)
        figures.lift_by_head(found["lift_8"], run.data)
        heads += rows_of_heads(run.data, found, strongest)
        without_kinds[run.data] = losses_without_kinds(lab, run, model, blocks, is_separator,
                                                       meta["answers"])
        if run.data != "recall":
            readers += what_a_head_reads(lab, run, model, blocks, strongest)
        if run.data == "docs":
            draw_heat_map(model, strongest, val)
    table("lift", ["data", "layer.head", "lift of separators beyond 8", "beyond 32",
                   "share of attention beyond 8", "loss: its separators hidden",
                   "as many other keys hidden", "head silent"], heads)
    ledgers = without_kinds.pop("recall", {})
    for name, columns in (("hidden", without_kinds), ("hidden-recall", {"recall": ledgers})):
        labels = dict.fromkeys(label for column in columns.values() for label in column)
        rows = [[label, *(column[label] for column in columns.values())] for label in labels]
        table(name, ["hidden in all heads", *columns], rows)
    table("head", ["data: head", "keys", "share of all tokens", "lift beyond 8",
                   "loss when hidden", "on line breaks", "on spaces", "on all else"], readers)


def lift_through_training(lab, run, blocks, is_separator):
    steps = lab.snapshots(run)
    if not steps:
        return

    def compute():
        lifts_of_steps = []
        for step in steps:
            model = lab.model(run, step)
            maps = attention_maps(model, blocks[:, :-1])
            far = far_pairs(maps.shape[-1], 8, model.config.sinks)
            lifts_of_steps.append(lift_of_heads(maps, far, is_separator))
        return dict(steps=steps, lift=lifts_of_steps)

    found = lab.remember(f"{run.name}-lift-history", compute)
    figures.lift_through_training(found["steps"], found["lift"], run.data)


def lift_at_the_end(lab, run, model, blocks, is_separator, answers):
    """(n_layer, n_head) each: lift beyond 8 and 32, share of attention beyond 8, losses without."""

    def compute():
        maps = attention_maps(model, blocks[:, :-1])
        T = maps.shape[-1]
        far = far_pairs(T, 8)
        n_queries = far.any(1).sum() * len(blocks)
        share = torch.stack([(p * far).sum((0, 2, 3)) / n_queries for p in maps])
        lifts_beyond = {f"lift_{distance}": lift_of_heads(
            maps, far_pairs(T, distance, model.config.sinks), is_separator) for distance in (8, 32)}
        return dict(**lifts_beyond, share=share.numpy(),
                    **losses_without_heads(model, blocks, is_separator, answers))

    return lab.remember(f"{run.name}-lift-of-heads", compute)


def lift_of_heads(maps, far, is_kind):
    """`lift` of every head: maps (n_layer, B, H, T, T) -> (n_layer, n_head)."""
    return np.stack([lift(p, far, is_kind).numpy() for p in maps])


def losses_without_heads(model, blocks, is_separator, answers):
    """What is lost when a head is silent or loses keys beyond 8: (n_layer, n_head) each.

    separators: it loses those; others: as many other keys; head: it is silent.
    """
    far = far_pairs(is_separator.shape[1], 8, model.config.sinks)
    hidden = dict(separators=far & is_separator[:, None],
                  others=far & as_many_others(is_separator)[:, None])
    counts = what_counts(blocks, answers)
    base = changed_nats(model, blocks)[counts].mean()

    def loss(**changes):
        return changed_nats(model, blocks, **changes)[counts].mean() - base

    shape = (model.config.n_layer, model.config.n_head)
    found = {name: np.zeros(shape) for name in ("separators", "others", "head")}
    for at in np.ndindex(shape):
        for kind, pairs in hidden.items():
            found[kind][at] = loss(hidden_keys={at: pairs})
        found["head"][at] = loss(silent_heads=[at])
    return found


def what_counts(blocks, answers):
    """The predictions whose loss is taken: all, or the values that an earlier mention tells."""
    if not answers:
        return torch.ones_like(blocks[:, 1:], dtype=torch.bool)
    return fact_distances(blocks, answers)[:, 1:] > 0


def as_many_others(is_kind):
    """As many keys of each text as there are of the kind, drawn from the others: (B, T) bool."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(is_kind.shape, generator=generator)
    order = draw.masked_fill(is_kind, 2).argsort(1)  # the others first, in random order
    is_drawn = torch.arange(is_kind.shape[1]) < is_kind.sum(1, keepdim=True)
    return torch.zeros_like(is_kind).scatter(1, order, is_drawn)


def rows_of_heads(data, found, strongest):
    """Two rows of the table: the head with the highest lift, and the median of the others."""
    forms = dict(lift_8=".2f", lift_32=".2f", share=".2f", separators="+.4f", others="+.4f",
                 head="+.4f")
    is_other = np.ones(found["lift_8"].shape, dtype=bool)
    is_other[strongest] = False
    layer, head = strongest
    others = [np.median(found[name][is_other]) for name in forms]
    return [[data, f"{layer + 1}.{head + 1}",
             *(format(found[name][strongest], form) for name, form in forms.items())],
            [data, "median of the others",
             *(format(value, form) for value, form in zip(others, forms.values(), strict=True))]]


def losses_without_kinds(lab, run, model, blocks, is_separator, answers):
    """What is lost when all keys of a kind beyond 8 are hidden from all heads: {kind: cell}."""
    ids = blocks[:, :-1]
    T = ids.shape[1]
    kinds = {"all separators": is_separator,
             "as many others, at random": as_many_others(is_separator)}
    for label, characters in (KINDS_OF_LEDGER if answers else KINDS_OF_TEXT).items():
        kinds[label] = torch.isin(ids, torch.tensor(list(characters.encode())))
    places = {"positions 0 to 3": slice(0, 4), "positions 4 to 7": slice(4, 8)}
    if answers:
        places = {"position 0": 0, "position 3": 3, "position 6": 6}
    for label, positions in places.items():
        kinds[label] = torch.zeros_like(is_separator)
        kinds[label][:, positions] = True

    def compute():
        counts = what_counts(blocks, answers)
        trained = changed_nats(model, blocks)
        maps = attention_maps(model, ids)
        found = {}
        for label, is_kind in kinds.items():
            far = far_pairs(T, 8, 0 if label in places else model.config.sinks)
            in_all_heads = dict.fromkeys(np.ndindex(model.config.n_layer, model.config.n_head),
                                         far & is_kind[:, None])
            increase = changed_nats(model, blocks, in_all_heads) - trained
            found[label] = mean_and_error(increase.numpy().flatten(), counts.numpy().flatten(),
                                          n_stretches=len(ids))
            if label in places:  # of queries that have all of these keys beyond 8
                far[:16] = False
                lifts_of_kind = lift_of_heads(maps, far, is_kind)
                found[f"lift of {label}"] = [lifts_of_kind.min(), lifts_of_kind.max()]
        return found

    found = lab.remember(f"{run.name}-without-kinds", compute)
    cells = {}
    for label, is_kind in kinds.items():
        mean, error = found[label]
        cells[label] = f"{mean:+.4f} ± {error:.4f} ({is_kind.double().mean():.1%} of tokens)"
        if label in places:
            low, high = found[f"lift of {label}"]
            cells[label] = f"{mean:+.4f} ± {error:.4f} (lift {low:.2f} to {high:.2f})"
    return cells


def what_a_head_reads(lab, run, model, blocks, at):
    """Rows of the table: which keys a head reads, and which predictions need them."""
    at = tuple(int(i) for i in at)
    ids = blocks[:, :-1]
    targets = blocks[:, 1:]
    is_break = ids == ord("\n")
    is_separator = torch.isin(ids, torch.tensor(model.config.separators))
    kinds = {"line breaks": is_break, "other separators": is_separator & ~is_break,
             "spaces": ids == ord(" ")}
    far = far_pairs(ids.shape[1], 8, model.config.sinks)

    def compute():
        p = attention_maps(model, ids)[at[0]]
        trained = changed_nats(model, blocks)
        found = {}
        for kind, is_kind in kinds.items():
            increase = changed_nats(model, blocks, {at: far & is_kind[:, None]}) - trained
            is_space, is_line_break = targets == ord(" "), targets == ord("\n")
            found[kind] = [is_kind.double().mean(), lift(p, far, is_kind)[at[1]], increase.mean(),
                           increase[is_line_break].mean(), increase[is_space].mean(),
                           increase[~is_space & ~is_line_break].mean()]
        return found

    found = lab.remember(f"{run.name}-strongest-head", compute)
    rows = []
    for kind in kinds:
        share, lift_of_kind, *increases = found[kind]
        rows.append([f"{run.data}: {at[0] + 1}.{at[1] + 1}", kind, f"{share:.1%}",
                     f"{lift_of_kind:.2f}", *(f"{x:+.4f}" for x in increases)])
    return rows


SENTENCE = "Return the sum, rounded.\nIf empty, return 0. See also: mean.\n"


def draw_heat_map(model, at, val):
    """A head over a sentence, which follows other text as in training."""
    layer, head = at
    before = bytes(val[:128].tolist())
    ids = torch.tensor([list(before + SENTENCE.encode())])
    p = attention_maps(model, ids)[layer, 0, head, 128:, 128:]
    figures.heat_map(p.numpy(), SENTENCE, f"attention of head {layer + 1}.{head + 1}")


# ---- from scratch


def scratch(lab):
    """Every mode from scratch on the documentation, three seeds."""
    runs = [docs_run(attn, seed) for attn in MODES for seed in SEEDS]
    finished = lab.finished([*runs, docs_run("streamingllm", 0, window=48)])
    if not finished:
        return
    _, val, _ = load_data("docs")
    rows = []
    for mode, group in by_mode(finished).items():
        model = lab.model(group[0])
        T = model.config.block_size
        last, mean = costs(model, val)
        tflop = flops_per_token(model, mean) * 1000 * BYTES_PER_STEP / 1e12
        full = [docs_run("full", run.seed) for run in group]
        differences = [lab.loss(run) - lab.loss(other)
                       for run, other in zip(group, full, strict=True) if other in finished]
        rows.append([mode, len(group), over_seeds([lab.loss(run) for run in group]),
                     over_seeds(differences, "+.4f") if differences else "", f"{last:.0f}",
                     f"{last / T:.1%}", f"{mean / ((T + 1) / 2):.1%}", f"{tflop:.1f}"])
    table("scratch", ["attn", "seeds", "validation loss", "minus full, same seed",
                      "keys at the end", "KV kept", "pairs computed", "TFLOP"], rows)


# ---- recall


RECALL_EDGES = (1, 2, 3, 4, 6, 8, 12, 21)  # facts of 3 tokens


def recall(lab):
    """The accuracy of a value by how many facts lie between it and its key's last mention."""
    runs = [recall_run("full")]
    runs += [recall_run(attn, seed) for attn in ("streamingllm", "sep") for seed in SEEDS]
    finished = lab.finished(runs)
    if not finished:
        return
    _, val, meta = load_data("recall")
    ids = torch.from_numpy(val[:2000 * meta["record"]].astype(np.int64)).view(-1, meta["record"])
    distance = fact_distances(ids, meta["answers"])[:, 1:] // 3
    bins = [(distance >= a) & (distance < b) for a, b in pairwise(RECALL_EDGES)]
    heads = []
    columns = []
    curves = {}
    for mode, group in by_mode(finished).items():
        accuracy = np.array([accuracies(lab, run, ids, bins) for run in group])  # (seeds, bins)
        columns.append([over_seeds(of_bin, ".1%") for of_bin in accuracy.T])
        last, _ = costs(lab.model(group[0]), val)
        heads.append(f"{mode}; {last:.0f} keys at the end; seeds: {len(group)}")
        curves[mode] = accuracy
    names = [f"{a}" if b == a + 1 else f"{a} to {b - 1}" for a, b in pairwise(RECALL_EDGES)]
    table("recall", ["facts back", *heads], zip(names, *columns, strict=True))
    figures.recall_by_distance(names, curves)

    steps = range(200, 2001, 200)
    rows = [[run.name, *(f"{lab.val_losses(run)[step]:.3f}" for step in steps)] for run in finished]
    is_value = torch.isin(ids[:, 1:], torch.tensor(meta["answers"]))
    unknowable = (distance[is_value] == 0).double().mean().item()  # first mentions
    floor = unknowable * np.log(len(meta["answers"]))
    table("recall-learning", ["run", *steps], rows)
    print(f"the least loss that is possible: {floor:.3f}")


def accuracies(lab, run, ids, bins):
    """The share of values that a run's model tells, in each bin of predictions."""

    def compute():
        model = lab.model(run)
        right = torch.cat([model(part[:, :-1])[0].argmax(-1) == part[:, 1:]
                           for part in ids.split(100)])
        return dict(accuracy=[right[b].double().mean().item() for b in bins])

    return lab.remember(f"{run.name}-accuracy", compute)["accuracy"]


# ---- books


WINDOWS = (16, 32, 64, 128)


def books(lab):
    """A longer context and prose: loss by compute, by keys kept, by position."""
    runs = [BOOKS_FULL, books_run("fixed", 64)]
    runs += [books_run(attn, window) for attn in ("streamingllm", "sep") for window in WINDOWS]
    for seed in SEEDS[1:]:
        runs += [books_run("sep", 16, seed), books_run("streamingllm", 32, seed)]
    finished = lab.finished(runs)
    if not finished:
        return
    _, val, _ = load_data("books")
    rows = []
    by_compute = {}
    by_kv = {}
    for mode, group in by_mode(finished).items():
        model = lab.model(group[0])
        T = model.config.block_size
        last, mean = costs(model, val)
        flops = flops_per_token(model, mean) * BYTES_PER_STEP  # of a step
        losses = [lab.loss(run) for run in group]
        rows.append([mode, len(group), over_seeds(losses), f"{last:.0f}", f"{last / T:.1%}",
                     f"{mean / ((T + 1) / 2):.1%}", f"{flops * 700 / 1e12:.1f}"])
        history = lab.val_losses(group[0])
        steps = [step for step in history if step > 0]
        by_compute[mode] = ([flops * step / 1e12 for step in steps],
                            [history[step] for step in steps])
        by_kv.setdefault(mode.split(",")[0], []).append((last / T, np.mean(losses)))
    table("books", ["attn", "seeds", "validation loss", "keys at the end", "KV kept",
                    "pairs computed", "TFLOP"], rows)
    shown = ["full", "fixed, window 64", "streamingllm, window 32", "sep, window 16"]
    figures.loss_by_compute({mode: by_compute[mode] for mode in shown if mode in by_compute})
    books_by_position(lab, [run for run in finished if run.seed == 0])
    training_free(lab, by_kv)


def books_by_position(lab, runs):
    """The same losses, by position in the text of 1,024 bytes."""
    edges = (0, 32, 64, 128, 256, 512, 1024)
    rows = []
    for a, b in pairwise(edges):
        losses = [lab.block_nats(run)[:, a:b].mean() for run in runs]
        rows.append([f"{a} to {b - 1}", *(f"{loss:.4f}" for loss in losses)])
    table("books-position", ["position", *(run.mode for run in runs)], rows)


def training_free(lab, trained):
    """Models with full attention, only used with another; one figure with those trained for it."""
    panels = {"books, trained": trained}
    settings = [(BOOKS_FULL, (16, 32, 64, 128, 256)), (docs_run("full"), (8, 16, 32, 64, 128))]
    for run, windows in settings:
        if not lab.finished([run]):
            continue
        _, val, _ = load_data(run.data)
        T = lab.model(run).config.block_size
        loss = lab.loss(run)
        points = {"full": [(1.0, loss)]}
        rows = [["full", "", T, "100.0%", f"{loss:.4f}"]]
        for attn in ("streamingllm", "sep"):
            for window in windows:
                changes = dict(attn=attn, window=window, max_seps=window)
                last, _ = costs(lab.model(run, **changes), val)
                loss = lab.loss(run, **changes)
                points.setdefault(attn, []).append((last / T, loss))
                rows.append([attn, window, f"{last:.0f}", f"{last / T:.1%}", f"{loss:.4f}"])
        table(f"free-{run.data}",
              ["attn", "window", "keys at the end", "KV kept", "validation loss"], rows)
        panels[f"{run.data}, training-free"] = points
    figures.loss_by_kv(panels)


def post(lab):
    """Post-training: full attention goes on as it is, with sep, or with a window of equal keys."""
    modes = (("full", 64), ("sep", 32), ("streamingllm", 64))
    finished = lab.finished([post_run(attn, window) for attn, window in modes])
    if not finished:
        return
    histories = [lab.val_losses(run) for run in finished]
    rows = [[step, *(f"{history[step]:.4f}" for history in histories)] for step in histories[0]]
    table("post", ["step", *(run.mode.removeprefix("post_") for run in finished)], rows)


# ---- where far keys stand


def positions(lab):
    """Four rules for separators at a distance that training has not shown, 12,288 unseen bytes."""
    settings = {
        "trained with sep, window 32": (docs_run("sep"), {}),
        "trained with full, used with sep, window 64": (docs_run("full"),
                                                        dict(attn="sep", window=64)),
    }
    finished = lab.finished([run for run, _ in settings.values()])
    if not finished:
        return
    _, val, _ = load_data("docs")
    tokens = val[:12_289]
    columns = {}
    for label, (run, changes) in settings.items():
        if run not in finished:
            continue
        model = lab.model(run, **changes)
        nats = {}
        for rule in FAR_RULES:
            def compute(model=model, rule=rule):
                return dict(nats=rule_nats(model, tokens, rule))

            name = f"{describe(run, changes)}-rule-{rule}"
            nats[rule] = lab.remember(name, compute)["nats"].mean()
        streamed = lab.stream(run, tokens, "12k", **changes)["nats"].mean()
        assert abs(nats["dropped"] / streamed - 1) < 1e-3, "this evaluation is not the model's"
        without = {**changes, "max_seps": 0}
        nats["no separators"] = lab.stream(run, tokens, "12k", **without)["nats"].mean()
        columns[label] = nats
    rows = [[rule, *(f"{np.exp(nats[rule]):.4f}" for nats in columns.values())]
            for rule in (*FAR_RULES, "no separators")]
    table("positions", ["far separators", *columns], rows)


# ---- long streams


COMPARISONS = {  # each model trained for the attention that it uses; a pair for each seed
    "docs: sep 32 / streamingllm 48": [(docs_run("sep"), docs_run("streamingllm", 0, window=48))],
    "docs: sep 32 / streamingllm 32": [
        (docs_run("sep", seed), docs_run("streamingllm", seed)) for seed in SEEDS],
    "docs: sep 32 / fixed 32": [(docs_run("sep", seed), docs_run("fixed", seed)) for seed in SEEDS],
    "books: sep 16 / streamingllm 32": [
        (books_run("sep", 16, seed), books_run("streamingllm", 32, seed)) for seed in SEEDS],
    "the same, 1,400 steps for 700": [(longer_run("sep", 16), longer_run("streamingllm", 32))],
    "the same, spaces are separators, too": [
        (books_run("sep", 16, seed, data="spaces"), books_run("streamingllm", 32, seed))
        for seed in SEEDS],
    "the same without spaces, lines not wrapped": [
        (books_run("sep", 16, data="unwrapped"), books_run("streamingllm", 32, data="unwrapped"))],
    "books: sep 32 / streamingllm 64": [(books_run("sep", 32), books_run("streamingllm", 64))],
    "books: sep 64 / streamingllm 128": [(books_run("sep", 64), books_run("streamingllm", 128))],
}
FAR_MENTIONS = [(kind, a, b) for kind in ("words", "names") for a, b in ((32, 256), (256, 1024))]


def stream(lab):
    """A million unseen bytes as a stream: who is ahead, and on which bytes."""
    rows = []
    rows_of_kinds = []
    rows_of_mentions = []
    for name, pairs in COMPARISONS.items():
        pairs = [pair for pair in pairs if len(lab.finished(pair)) == 2]
        if not pairs:
            continue
        _, val, _ = load_data(pairs[0][0].data)
        streams = [[lab.stream(run, val, "val") for run in pair] for pair in pairs]
        nats = np.array([[s["nats"] for s in pair] for pair in streams])  # (seeds, 2, n)
        difference = nats[:, 0] - nats[:, 1]
        ours, theirs = np.exp(nats.mean(2)).T
        rows.append([name, " / ".join(f"{s['n_keys']:.0f}" for s in streams[0]),
                     over_seeds(ours, ".3f"), over_seeds(theirs, ".3f"),
                     ", ".join(plus_minus(of_a_seed) for of_a_seed in difference)])
        rows_of_kinds.append([name, *by_kind_of_byte(val[1:], difference.mean(0))])
        rows_of_mentions.append([name, *by_mention(val, difference.mean(0))])
    if lab.unseen is not None:
        tokens, found = long_streams(lab)
        if len(found) == 2:
            difference = np.subtract(*(f["nats"] for f in found.values()))
            rows_of_mentions.append(["books: sep 16 / streamingllm 32, 4,000,000 other bytes",
                                     *by_mention(tokens, difference)])
    table("stream", ["", "keys", "perplexity of the first", "of the second",
                     "difference in nats, for each seed"], rows)
    table("kinds", ["difference in nats per byte", "from line breaks", "from spaces",
                    "from all else"], rows_of_kinds)
    table("mentions", ["difference in nats", *(f"{kind}, {a} to {b - 1} bytes back"
                                               for kind, a, b in FAR_MENTIONS)], rows_of_mentions)
    fresh_and_streamed(lab)


def by_kind_of_byte(targets, difference):
    """What the prediction of some bytes adds to the mean difference; the cells add up to it."""
    is_break, is_space = targets == ord("\n"), targets == ord(" ")
    return [plus_minus(np.where(is_kind, difference, 0))
            for is_kind in (is_break, is_space, ~is_break & ~is_space)]


def by_mention(text, difference):
    """The mean difference on bytes of words whose last mention is beyond the window."""
    gaps = {kind: mention_distances(bytes(text), names_only=kind == "names")[1:]
            for kind in ("words", "names")}
    return [plus_minus(difference, (gaps[kind] >= a) & (gaps[kind] < b))
            for kind, a, b in FAR_MENTIONS]


def fresh_and_streamed(lab):
    """The same bytes, read as the second half of a fresh text of block_size, and in the stream."""
    runs = [run for pairs in COMPARISONS.values() for pair in pairs for run in pair]
    finished = [run for run in dict.fromkeys(runs) if lab.is_finished(run)]
    rows = []
    for data in dict.fromkeys(run.data for run in finished):
        _, val, _ = load_data(data)
        for mode, group in by_mode([run for run in finished if run.data == data]).items():
            T = lab.model(group[0]).config.block_size
            starts = block_starts(val, T, VALIDATION_BYTES // T)
            at = starts[:, None] + np.arange(T // 2, T)
            streams = [lab.stream(run, val, "val") for run in group]
            fresh = np.mean([lab.block_nats(run)[:, T // 2:] for run in group], axis=0)
            streamed = np.mean([s["nats"][at] for s in streams], axis=0)
            difference = (streamed - fresh).flatten()
            label = f"{data}: {mode}".replace("longer_", "1,400 steps, ")
            rows.append([label, len(group), f"{streams[0]['n_keys']:.0f}",
                         f"{fresh.mean():.4f}", f"{streamed.mean():.4f}", plus_minus(difference),
                         over_seeds([np.exp(s["nats"].mean()) for s in streams], ".3f")])
    table("fresh", ["", "seeds", "keys", "fresh texts", "in the stream", "cost of the stream",
                    "perplexity of the whole stream"], rows)


def more_separators(lab):
    """The same models with fewer and with more visible separators than in training."""
    runs = lab.finished([docs_run("sep"), books_run("sep", 16)])
    if not runs:
        return
    rows = []
    for n in (0, 4, 8, 16, 32, 64, None):
        cells = []
        for run in runs:
            _, val, _ = load_data(run.data)
            nats = lab.stream(run, val, "val", max_seps=n)["nats"]
            cells.append(f"{np.exp(nats.mean()):.4f}")
        rows.append([n, *cells])
    table("max_seps", ["max_seps", *(f"{run.data}: {run.mode}" for run in runs)], rows)
    rows = []
    for run, horizons in ((docs_run("sep"), (64, 96, 128, 192, 256)),
                          (books_run("sep", 16), (128, 256, 512, 768, 1024))):
        if run in runs:
            rows += nearer_horizons(lab, run, horizons)
    table("horizons", ["data: horizon", "max_seps 4", "16", "None"], rows)
    half_the_horizon(lab)


def half_the_horizon(lab):
    """The whole streams, if separators are dropped at half of block_size."""
    pairs = [(docs_run("sep", seed), docs_run("streamingllm", seed)) for seed in SEEDS]
    pairs += [(books_run("sep", 16, seed), books_run("streamingllm", 32, seed)) for seed in SEEDS]
    rows = []
    for sep, window in pairs:
        if len(lab.finished([sep, window])) < 2:
            continue
        _, val, _ = load_data(sep.data)
        half = lab.model(sep).config.block_size // 2
        halved, whole, theirs = (found["nats"] for found in (
            lab.stream(sep, val, "val", block_size=half), lab.stream(sep, val, "val"),
            lab.stream(window, val, "val")))
        rows.append([f"{sep.data}: {sep.mode}", sep.seed,
                     *(f"{np.exp(nats.mean()):.3f}" for nats in (whole, halved, theirs)),
                     plus_minus(halved - whole), plus_minus(halved - theirs)])
    table("half", ["", "seed", "horizon block_size", "half of it", "streamingllm",
                   "half less whole, nats", "half less streamingllm"], rows)


def nearer_horizons(lab, run, horizons):
    """A horizon below the trained one: the distances that training has shown often."""
    _, val, _ = load_data(run.data)
    rows = []
    for horizon in horizons:
        found = [lab.stream(run, val[:131_073], "131k", max_seps=n, block_size=horizon)
                 for n in (4, 16, None)]
        rows.append([f"{run.data}: {horizon}", *(f"{np.exp(f['nats'].mean()):.4f}" for f in found)])
    return rows


def long_streams(lab):
    """The unseen text, and {mode: its stream} for two models of as many keys."""
    tokens = np.memmap(lab.unseen, dtype=np.uint8, mode="r")[:4_000_001]
    runs = lab.finished([books_run("sep", 16), books_run("streamingllm", 32)])
    return tokens, {run.mode: lab.stream(run, tokens, "unseen", chunk_size=512) for run in runs}


def long(lab):
    """Four million unseen bytes in one stream, at equal keys."""
    if lab.unseen is None:
        print("results.py: the long stream needs --unseen FILE", file=sys.stderr)
        return
    tokens, found = long_streams(lab)
    if len(found) < 2:
        return
    n = len(tokens) - 1
    spans = {"first 10,000": (0, 10_000), "first 100,000": (0, 100_000),
             "first 1,000,000": (0, 1_000_000), "last 100,000": (n - 100_000, n),
             f"all {n:,}": (0, n)}
    streams = found.values()
    rows = [[f"perplexity, {name}", *(f"{np.exp(f['nats'][a:b].mean()):.4f}" for f in streams)]
            for name, (a, b) in spans.items()]
    rows.append(["keys that the last token sees", *(f"{f['n_keys']:.0f}" for f in streams)])
    rows.append(["MiB of the cache, from the first token on",
                 *(f"{f['mib']:.3f}" for f in streams)])
    for name, chunks in (("first", slice(5, 505)), ("last", slice(-505, -5))):
        times = [np.median(f["seconds"][chunks]) / 512 * 1e6 for f in streams]
        rows.append([f"CPU µs per token, {name} 256,000 (median)", *(f"{t:.0f}" for t in times)])
    table("long", ["", *found], rows)
    figures.perplexity_by_position({mode: f["nats"] for mode, f in found.items()})


# ---- the space as a separator


def spaces(lab):
    """The space and the tab among the separators, as the paper has them."""
    runs = [run for seed in SEEDS
            for run in (books_run("sep", 16, seed), books_run("sep", 16, seed, data="spaces"),
                        books_run("streamingllm", 32, seed))]
    finished = lab.finished(runs)
    if not finished:
        return
    _, val, _ = load_data("books")
    rows = []
    for data in ("books", "spaces"):
        for mode, group in by_mode([run for run in finished if run.data == data]).items():
            last, _ = costs(lab.model(group[0]), val)
            losses = [lab.loss(run) for run in group]
            label = mode + (", also spaces and tabs" if data == "spaces" else "")
            rows.append([label, len(group), f"{last:.0f}", over_seeds(losses)])
    table("spaces", ["attn", "seeds", "keys at the end", "validation loss"], rows)


# ---- the command line


PARTS = {
    "mask": mask, "lift": lifts, "scratch": scratch, "recall": recall, "books": books,
    "post": post, "positions": positions, "stream": stream, "max_seps": more_separators,
    "long": long, "spaces": spaces,
}


def pretrained(folder, text):
    """Perplexity per token and keys used of a pretrained model: `--model FOLDER --text FILE`."""
    tokens = load_tokenizer(folder).encode_file(text)
    model = load_model(folder)
    weight = next(model.parameters())
    rows = []
    for attn in ("full", "streamingllm", "fixed", "sep"):
        for window in (64, 128, 256, 512):
            model.configure(attn=attn, window=window)
            cache = SepCache(model.config, 1, weight.device, weight.dtype)
            result = score(model, cache, tokens, weight.device)
            perplexity = np.exp(list(result.nats.values())[-1])
            rows.append((attn, window, f"{result.key_share:.2%}", f"{perplexity:.4f}"))
            if attn == "full":
                break  # it has no window
    print(markdown(("attn", "window", "keys used, mean over tokens", "perplexity"), rows))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one question instead of all")
    parser.add_argument("--no_training", action="store_true", help="use only finished runs")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out-results",
                        help="where the runs go (default: out-results)")
    parser.add_argument("--unseen", type=Path, metavar="FILE",
                        help="a text of more than 4,000,000 bytes, for the long stream")
    parser.add_argument("--model", type=Path, metavar="FOLDER",
                        help="instead of all this: the table of a pretrained model on --text")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what --model reads")
    args = parser.parse_args()
    if (args.model is None) != (args.text is None):
        parser.error("--model and --text go together")
    if args.model:
        try:
            return pretrained(args.model, args.text)
        except (ValueError, OSError) as error:
            sys.exit(f"results.py: {error}")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    lab = Lab(args.out_dir, may_train=not args.no_training, unseen=args.unseen)
    try:
        for name, part in PARTS.items():
            if args.only in (None, name):
                part(lab)
    except (ValueError, OSError) as error:
        sys.exit(f"results.py: {error}")


if __name__ == "__main__":
    main()
