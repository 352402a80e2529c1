"""Measures everything that RESULTS.md says: trains what is missing, writes tables, draws figures.

    python experiments/results.py                  all of it; some five hours on two cores
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
    Lab,
    Run,
    books_run,
    describe,
    docs_run,
    larger_run,
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
    """Print a table, and put it into RESULTS.md between the comments that name it."""
    text = markdown(head, rows)
    print(f"\n{name}\n{text}", flush=True)
    if RESULTS.exists():
        place = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        RESULTS.write_text(place.sub(rf"\g<1>{text}\n\g<2>", RESULTS.read_text()))


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


def lifts(lab):
    """Attention by kind of key in models with full attention, and what it is worth."""
    for run, n_texts in ((docs_run("full"), 32), (BOOKS_FULL, 6), (recall_run("full"), 256)):
        if not lab.finished([run]):
            continue
        model = lab.model(run)
        _, val, meta = load_data(run.data)
        blocks = blocks_of(val, model.config.block_size, n_texts, meta["record"])
        is_separator = torch.isin(blocks[:, :-1], torch.tensor(model.config.separators))
        lift_through_training(lab, run, blocks, is_separator)
        found = lift_at_the_end(lab, run, model, blocks, is_separator, meta["answers"])
        figures.lift_by_head(found["lift_8"], run.data)
        if run.data != "recall":
            strongest_head(lab, run, model, blocks, found["lift_8"])
        if run.data == "docs":
            draw_heat_map(model, found["lift_8"], val)


def lift_through_training(lab, run, blocks, is_separator):
    steps = lab.snapshots(run)
    if not steps:
        return

    def compute():
        models = [lab.model(run, step) for step in steps]
        return dict(steps=steps, lift=[lift_of_heads(m, blocks, is_separator, 8) for m in models])

    found = lab.remember(f"{run.name}-lift-history", compute)
    figures.lift_through_training(found["steps"], found["lift"], run.data)


def lift_at_the_end(lab, run, model, blocks, is_separator, answers):
    """Two tables: head by head, and all heads at once. Returns what is in them."""

    def compute():
        return dict(lift_8=lift_of_heads(model, blocks, is_separator, 8),
                    lift_32=lift_of_heads(model, blocks, is_separator, 32),
                    **lift_of_sinks(model, blocks),
                    **losses_without(model, blocks, is_separator, answers))

    found = lab.remember(f"{run.name}-lift", compute)
    rows = []
    for at in np.ndindex(found["lift_8"].shape):
        shares = [found[name][at] for name in ("lift_8", "lift_32", "sinks", "far")]
        losses = [found[name][at] for name in ("separators", "others", "head")]
        rows.append([f"{at[0] + 1}.{at[1] + 1}", *(f"{x:.2f}" for x in shares),
                     *(f"{x:+.4f}" for x in losses)])
    table(f"lift-{run.data}",
          ["layer.head", "lift of separators beyond 8", "beyond 32", "lift of sinks beyond 8",
           "share of attention beyond 8", "loss: its separators hidden",
           "as many other keys hidden", "head silent"], rows)
    table(f"lift-{run.data}-all", ["in all heads", "loss"], [
        ["as trained", f"{found['base']:.4f}"],
        ["separators beyond 8 hidden", f"{found['all_separators']:+.4f}"],
        ["as many other keys hidden", f"{found['all_others']:+.4f}"],
        ["sinks beyond 8 hidden", f"{found['all_sinks']:+.4f}"]])
    return found


def lift_of_heads(model, blocks, is_separator, distance):
    """(n_layer, n_head)."""
    maps = attention_maps(model, blocks[:, :-1])
    far = far_pairs(maps.shape[-1], distance, model.config.sinks)
    return np.stack([lift(p, far, is_separator).numpy() for p in maps])


def lift_of_sinks(model, blocks):
    """Lift of the sinks among all keys beyond 8, and the share of attention that goes there."""
    maps = attention_maps(model, blocks[:, :-1])
    T = maps.shape[-1]
    far = far_pairs(T, 8)
    is_sink = (torch.arange(T) < model.config.sinks).expand(len(blocks), T)
    n_queries = far.any(1).sum() * len(blocks)
    shares = [(p * far).sum((0, 2, 3)) / n_queries for p in maps]
    return dict(sinks=np.stack([lift(p, far, is_sink).numpy() for p in maps]),
                far=np.stack([share.numpy() for share in shares]))


def losses_without(model, blocks, is_separator, answers):
    """What the loss gains when keys beyond 8 are hidden from a head, or it is silent.

    The control hides as many other keys, drawn at random, in the place of the separators.
    """
    T = is_separator.shape[1]
    far = far_pairs(T, 8, model.config.sinks)
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(is_separator.shape, generator=generator)
    order = draw.masked_fill(is_separator, 2).argsort(1)  # other tokens first, at random
    is_drawn = torch.arange(T) < is_separator.sum(1, keepdim=True)
    is_other = torch.zeros_like(is_separator).scatter(1, order, is_drawn)
    is_sink = torch.arange(T) < model.config.sinks
    hidden = dict(separators=far & is_separator[:, None], others=far & is_other[:, None],
                  sinks=far_pairs(T, 8) & is_sink)

    targets = blocks[:, 1:]
    counts = torch.ones_like(targets, dtype=torch.bool)
    if answers:
        counts = torch.isin(targets, torch.tensor(answers))

    def loss(**changes):
        return changed_nats(model, blocks, **changes)[counts].mean().item()

    shape = (model.config.n_layer, model.config.n_head)
    base = loss()
    found = dict(base=base, separators=np.zeros(shape), others=np.zeros(shape),
                 head=np.zeros(shape))
    for at in np.ndindex(shape):
        for kind in ("separators", "others"):
            found[kind][at] = loss(hidden_keys={at: hidden[kind]}) - base
        found["head"][at] = loss(silent_heads=[at]) - base
    for kind, pairs in hidden.items():
        in_all_heads = dict.fromkeys(np.ndindex(shape), pairs)
        found[f"all_{kind}"] = loss(hidden_keys=in_all_heads) - base
    return found


def strongest_head(lab, run, model, blocks, lift_by_head):
    """What the head with the highest lift reads, and which predictions need it."""
    at = tuple(int(i) for i in np.unravel_index(lift_by_head.argmax(), lift_by_head.shape))
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
            gain = changed_nats(model, blocks, {at: far & is_kind[:, None]}) - trained
            is_space, is_line_break = targets == ord(" "), targets == ord("\n")
            found[kind] = [is_kind.double().mean(), lift(p, far, is_kind)[at[1]], gain.mean(),
                           gain[is_line_break].mean(), gain[is_space].mean(),
                           gain[~is_space & ~is_line_break].mean()]
        return found

    found = lab.remember(f"{run.name}-strongest-head", compute)
    rows = []
    for kind in kinds:
        share, lift_of_kind, *gains = found[kind]
        rows.append([kind, f"{share:.1%}", f"{lift_of_kind:.2f}", *(f"{x:+.4f}" for x in gains)])
    table(f"head-{run.data}",
          [f"keys of head {at[0] + 1}.{at[1] + 1}", "share of all tokens", "lift beyond 8",
           "loss when hidden", "on line breaks", "on spaces", "on all else"], rows)


SENTENCE = "Return the sum, rounded.\nIf empty, return 0. See also: mean.\n"


def draw_heat_map(model, lift_by_head, val):
    """The head with the highest lift over a sentence, which follows other text as in training."""
    layer, head = np.unravel_index(lift_by_head.argmax(), lift_by_head.shape)
    before = bytes(val[:128].tolist())
    ids = torch.tensor([list(before + SENTENCE.encode())])
    p = attention_maps(model, ids)[layer, 0, head, 128:, 128:]
    figures.heat_map(p.numpy(), SENTENCE, f"attention of head {layer + 1}.{head + 1}")


# ---- from scratch


def scratch(lab):
    """Every mode from scratch on the documentation, three seeds."""
    runs = [docs_run(attn, seed) for attn in MODES for seed in SEEDS]
    finished = lab.finished([*runs, docs_run("streamingllm", 0, window=48)])
    _, val, _ = load_data("docs")
    rows = []
    for mode, group in by_mode(finished).items():
        model = lab.model(group[0])
        T = model.config.block_size
        last, mean = costs(model, val)
        tflop = flops_per_token(model, mean) * 1000 * BYTES_PER_STEP / 1e12
        full = [docs_run("full", run.seed) for run in group]
        gains = [lab.val_loss(run) - lab.val_loss(other)
                 for run, other in zip(group, full, strict=True) if other in finished]
        rows.append([mode, len(group), over_seeds([lab.val_loss(run) for run in group]),
                     over_seeds(gains, "+.4f") if gains else "", f"{last:.0f}", f"{last / T:.1%}",
                     f"{mean / ((T + 1) / 2):.1%}", f"{tflop:.1f}"])
    table("scratch", ["attn", "seeds", "validation loss", "less full of the same seed",
                      "keys at the end", "KV kept", "pairs computed", "TFLOP"], rows)


# ---- recall


RECALL_EDGES = (3, 6, 9, 12, 18, 24, 36, 63)


def recall(lab):
    """The accuracy of a value by the distance of its key's last mention."""
    runs = [recall_run(attn, seed) for attn in ("sep", "streamingllm") for seed in SEEDS]
    finished = lab.finished([recall_run("full"), recall_run("fixed"), *runs])
    if not finished:
        return
    _, val, meta = load_data("recall")
    ids = torch.from_numpy(val[:2000 * meta["record"]].astype(np.int64)).view(-1, meta["record"])
    distance = fact_distances(ids, meta["answers"])[:, 1:]
    bins = [(distance >= a) & (distance < b) for a, b in pairwise(RECALL_EDGES)]
    accuracies = {}
    for run in finished:
        def compute(run=run):
            model = lab.model(run)
            right = torch.cat([model(part[:, :-1])[0].argmax(-1) == part[:, 1:]
                               for part in ids.split(100)])
            return dict(accuracy=[right[b].double().mean().item() for b in bins])

        accuracy = lab.remember(f"{run.name}-accuracy", compute)["accuracy"]
        accuracies.setdefault(run.mode, []).append(accuracy)
    curves = {attn: np.array(accuracies[attn]) for attn in MODES if attn in accuracies}
    names = [f"{a} to {b - 1}" for a, b in pairwise(RECALL_EDGES)]
    rows = [[name, *(over_seeds(curve[:, i], ".1%") for curve in curves.values())]
            for i, name in enumerate(names)]
    seeds = [f"{attn}, seeds: {len(curve)}" for attn, curve in curves.items()]
    table("recall", ["distance", *seeds], rows)
    figures.recall_by_distance(names, curves)
    steps = range(200, 2001, 200)
    rows = [[run.name, *(f"{lab.val_losses(run)[step]:.3f}" for step in steps)] for run in finished]
    table("recall-learning", ["run", *steps], rows)


# ---- books


WINDOWS = (16, 32, 64, 128)


def books(lab):
    """A longer context and prose: loss by compute, by keys kept, by position."""
    runs = [BOOKS_FULL, books_run("fixed", 64)]
    runs += [books_run(attn, window) for window in WINDOWS for attn in ("sep", "streamingllm")]
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
        losses = [lab.val_loss(run) for run in group]
        rows.append([mode, len(group), over_seeds(losses), f"{last:.0f}", f"{last / T:.1%}",
                     f"{mean / ((T + 1) / 2):.1%}", f"{flops * 700 / 1e12:.1f}"])
        history = lab.val_losses(group[0])
        steps = [step for step in history if step > 0]
        by_compute[mode] = ([flops * step / 1e12 for step in steps],
                            [history[step] for step in steps])
        by_kv.setdefault(mode.split(",")[0], []).append((last / T, np.mean(losses)))
    table("books", ["attn", "seeds", "validation loss", "keys at the end", "KV kept",
                    "pairs computed", "TFLOP"], rows)
    shown = ["full", "fixed, window 64", "streamingllm, window 128", "sep, window 64"]
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
        loss = lab.block_nats(run).mean()
        points = {"full": [(1.0, loss)]}
        rows = [["full", "", T, "100.0%", f"{loss:.4f}"]]
        for attn in ("streamingllm", "sep"):
            for window in windows:
                changes = dict(attn=attn, window=window, max_seps=window)
                last, _ = costs(lab.model(run, **changes), val)
                loss = lab.block_nats(run, **changes).mean()
                points.setdefault(attn, []).append((last / T, loss))
                rows.append([attn, window, f"{last:.0f}", f"{last / T:.1%}", f"{loss:.4f}"])
        table(f"free-{run.data}",
              ["attn", "window", "keys at the end", "KV kept", "validation loss"], rows)
        panels[f"{run.data}, training-free"] = points
    figures.loss_by_kv(panels)


def post(lab):
    """Post-training: full attention goes on as it is, with sep, or with a window of equal rows."""
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
    _, val, _ = load_data("docs")
    tokens = val[:12_289]
    settings = {
        "trained with sep, window 32": (docs_run("sep"), {}),
        "trained with full, used with sep, window 64": (docs_run("full"),
                                                        dict(attn="sep", window=64)),
    }
    columns = {}
    for label, (run, changes) in settings.items():
        if not lab.finished([run]):
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


EQUAL_ROWS = {  # sep, and streamingllm with as many rows, each trained for it
    "docs, 52 rows": [(docs_run("sep", seed), docs_run("streamingllm", seed, window=48))
                      for seed in SEEDS],
    "books, 36 rows": [(books_run("sep", 16, seed), books_run("streamingllm", 32, seed))
                       for seed in SEEDS],
    "books, 36 rows, 2,100 steps": [(longer_run("sep", 16), longer_run("streamingllm", 32))],
    "books, 36 rows, 2.7 million parameters": [(larger_run("sep", 16),
                                                larger_run("streamingllm", 32))],
    "books, 68 rows": [(books_run("sep", 32), books_run("streamingllm", 64))],
    "books, 132 rows": [(books_run("sep", 64), books_run("streamingllm", 128))],
}

FAR_MENTIONS = [(kind, a, b) for kind in ("words", "names") for a, b in ((32, 256), (256, 1024))]


def stream(lab):
    """A million unseen bytes at equal rows, by position; words that come again."""
    rows = []
    rows_by_position = []
    rows_of_names = []
    for name, pairs in EQUAL_ROWS.items():
        pairs = [pair for pair in pairs if len(lab.finished(pair)) == 2]
        if not pairs:
            continue
        _, val, _ = load_data(pairs[0][0].data)
        # (seeds, 2, n)
        nats = np.array([[lab.stream(run, val, "val")["nats"] for run in pair] for pair in pairs])
        difference = nats[:, 0] - nats[:, 1]
        sep, window = np.exp(nats.mean(2)).T
        rows.append([name, over_seeds(sep, ".3f"), over_seeds(window, ".3f"),
                     ", ".join(plus_minus(of_a_seed) for of_a_seed in difference)])
        rows_by_position.append([name, *stream_by_position(nats.mean(0))])
        gaps = {kind: mention_distances(bytes(val.tolist()), names_only=kind == "names")[1:]
                for kind in ("words", "names")}  # of the predicted bytes
        for (run, _), of_a_seed in zip(pairs, difference, strict=True):
            cells = [plus_minus(of_a_seed, (gaps[kind] >= a) & (gaps[kind] < b))
                     for kind, a, b in FAR_MENTIONS]
            rows_of_names.append([name, run.seed, *cells])
        if name in ("docs, 52 rows", "books, 36 rows", "books, 132 rows"):
            words(name.replace(", ", "-").replace(" ", "-"), gaps, nats)
    table("stream", ["", "sep: perplexity", "streamingllm",
                     "difference in nats, a number for each seed"], rows)
    table("stream-positions", ["sep / streamingllm", "first 1,000", "to 10,000", "to 100,000",
                               "after that"], rows_by_position)
    head = [f"{kind}, {a} to {b - 1} bytes back" for kind, a, b in FAR_MENTIONS]
    table("names", ["", "seed", *head], rows_of_names)
    best_of_each(lab)


def stream_by_position(nats):
    """The perplexities of both models, (2, n), in parts of the text."""
    edges = (0, 1000, 10_000, 100_000, nats.shape[1])
    return [" / ".join(f"{np.exp(part.mean()):.3f}" for part in nats[:, a:b])
            for a, b in pairwise(edges)]


def best_of_each(lab):
    """All models over the same streams: is the opponent of equal rows a strong one?"""
    runs = [docs_run(attn, seed) for attn in ("sep", "streamingllm") for seed in SEEDS]
    runs += [run for pairs in EQUAL_ROWS.values() for pair in pairs for run in pair]
    finished = [run for run in dict.fromkeys(runs) if lab.is_finished(run)]
    rows = []
    for data in ("docs", "books"):
        _, val, _ = load_data(data)
        for mode, group in by_mode([run for run in finished if run.data == data]).items():
            found = [lab.stream(run, val, "val") for run in group]
            perplexities = [np.exp(f["nats"].mean()) for f in found]
            rows.append([f"{data}: {mode}", len(group), f"{found[0]['rows']:.0f}",
                         over_seeds(perplexities, ".3f")])
    table("stream-all", ["", "seeds", "rows", "perplexity"], rows)


GAP_EDGES = (1, 32, 64, 128, 256, 512, 1024, 1 << 40)


def words(name, gaps, nats):
    """Loss on words by the distance of their last mention: nats (seeds, 2, n)."""
    rows = []
    difference = nats[:, 0] - nats[:, 1]
    for kind, gap in gaps.items():
        groups = {"first mention": gap == 0}
        for a, b in pairwise(GAP_EDGES):
            label = f"{a} and more" if b == GAP_EDGES[-1] else f"{a} to {b - 1}"
            groups[label] = (gap >= a) & (gap < b)
        for label, at in groups.items():
            if at.sum() >= 100:
                sep, window = nats[:, :, at].mean((0, 2))
                rows.append([kind, label, f"{at.sum():,}", f"{sep:.4f}", f"{window:.4f}",
                             plus_minus(difference.mean(0), at),
                             ", ".join(f"{x:+.4f}" for x in difference[:, at].mean(1))])
    table(f"words-{name}", ["of", "last mention, bytes back", "bytes", "sep", "streamingllm",
                            "difference", "by seed"], rows)


def more_separators(lab):
    """The same models with fewer and with more visible separators than in training."""
    runs = lab.finished([docs_run("sep"), books_run("sep", 16)])
    rows = []
    for n in (0, 4, 8, 16, 32, 64, None):
        cells = []
        for run in runs:
            _, val, _ = load_data(run.data)
            nats = lab.stream(run, val, "val", max_seps=n)["nats"]
            cells.append(f"{np.exp(nats.mean()):.4f}")
        rows.append([n, *cells])
    table("max_seps", ["max_seps", *(f"{run.data}: {run.mode}" for run in runs)], rows)
    if docs_run("sep") in runs:
        nearer_horizons(lab, docs_run("sep"), load_data("docs")[1][:131_073])


def nearer_horizons(lab, run, tokens):
    """A horizon below the trained one: the distances that training has shown often."""
    rows = []
    for horizon in (64, 96, 128, 192, 256):
        found = [lab.stream(run, tokens, "131k", max_seps=n, block_size=horizon)
                 for n in (4, 16, None)]
        rows.append([horizon, *(f"{np.exp(f['nats'].mean()):.4f}" for f in found)])
    table("horizons", ["horizon", "max_seps 4", "16", "None"], rows)


def long(lab):
    """Four million unseen bytes in one stream, at equal rows."""
    if lab.unseen is None:
        print("results.py: the long stream needs --unseen FILE", file=sys.stderr)
        return
    tokens = np.memmap(lab.unseen, dtype=np.uint8, mode="r")[:4_000_001]
    runs = lab.finished([books_run("sep", 16), books_run("streamingllm", 32)])
    if len(runs) < 2:
        return
    found = [lab.stream(run, tokens, "unseen", chunk_size=512) for run in runs]
    n = len(tokens) - 1
    spans = {"first 10,000": (0, 10_000), "first 100,000": (0, 100_000),
             "first 1,000,000": (0, 1_000_000), "last 100,000": (n - 100_000, n),
             f"all {n:,}": (0, n)}
    rows = [[f"perplexity, {name}", *(f"{np.exp(f['nats'][a:b].mean()):.4f}" for f in found)]
            for name, (a, b) in spans.items()]
    rows.append(["keys that the last token sees", *(f"{f['rows']:.0f}" for f in found)])
    rows.append(["MiB of the cache, from the first token on", *(f"{f['mib']:.3f}" for f in found)])
    for name, chunks in (("first", slice(5, 505)), ("last", slice(-505, -5))):
        times = [np.median(f["seconds"][chunks]) / 512 * 1e6 for f in found]
        rows.append([f"CPU µs per token, {name} 256,000 (median)", *(f"{t:.0f}" for t in times)])
    table("long", ["", *(run.mode for run in runs)], rows)
    nats = {run.mode: f["nats"] for run, f in zip(runs, found, strict=True)}
    figures.perplexity_by_position(nats)


# ---- the space as a separator


def spaces(lab):
    """The space and the tab among the separators, as the paper has them."""
    if not (ROOT / "data" / "spaces").exists():
        print("results.py: spaces needs the books again, prepared with --out data/spaces and "
              "--separators $'.,?!;:\\n \\t'", file=sys.stderr)
        return
    base = books_run("sep", 16)
    options = ["spaces" if word == "books" else word for word in base.options]
    with_spaces = Run("spaces-sep-16-0", tuple(options))
    rows = []
    for run in lab.finished([base, with_spaces, books_run("streamingllm", 32)]):
        _, val, _ = load_data(run.data)
        last, _ = costs(lab.model(run), val)
        rows.append([f"{run.data}: {run.mode}", f"{last:.0f}", f"{lab.val_loss(run):.4f}"])
    table("spaces", ["run", "keys at the end", "validation loss"], rows)


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
    for name, part in PARTS.items():
        if args.only in (None, name):
            part(lab)


if __name__ == "__main__":
    main()
