"""Measures the results of the README and prints them as markdown. The scripts do the work; finished runs are not repeated.

    python tests/results.py --size cpu                  all of it on 2 CPU cores, about two hours
    python tests/results.py --size gpu                  the same questions with the baby GPT, on one GPU
    python tests/results.py --size cpu --only recall    one of: scratch, post, free, recall, stream, speed
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from sample import score  # noqa: E402
from sep_cache import SepCache, far_layout, reach  # noqa: E402
from train import load_checkpoint, load_data  # noqa: E402

RECALL = ("--data", "recall", "--n_layer", 3, "--n_head", 4, "--n_embd", 128, "--block_size", 64, "--window", 8, "--sinks", 1,
          "--max_seps", "None", "--batch_size", 64, "--max_steps", 3000, "--learning_rate", 1e-3)
MODES = ("full", "stream", "fixed", "sep")
SIZES = {
    "cpu": dict(post=240, free=(8, 16, 32, 64, 128), stream=4_000_000, full=20_000, shapes={"": ()}),
    "gpu": dict(post=480, free=(16, 32, 64, 128, 256), stream=4_000_000, full=100_000, shapes={"": (), "-8192": (
        "--block_size", 8192, "--window", 256, "--max_seps", 512, "--batch_size", 8)}),
}


def train(out, *options):
    """The log of a run of train.py, made now if it is not there."""
    log = out / "log.jsonl"
    if not (out / "done").exists():
        command = [sys.executable, str(ROOT / "train.py"), "--out_dir", str(out), *map(str, options)]
        print("$", " ".join(["python train.py", *command[2:]]), file=sys.stderr)
        subprocess.run(command, check=True)
        (out / "done").touch()
    return [json.loads(line) for line in log.read_text().splitlines()]


def table(head, rows):
    print(f"\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |")


def chart(title, x, y, curves):
    """A mermaid chart of {name: values}, whose first line says which curve is which, in the order of the colours."""
    print(f"\n```mermaid\nxychart-beta\n  title \"{title} ({', '.join(curves)})\"\n  x-axis {json.dumps(x)}\n  y-axis \"{y}\"")
    for values in curves.values():
        print(f"  line {json.dumps([round(v, 4) for v in values])}")
    print("```")


def cost(config, tokens):
    """(KV kept after block_size tokens, share of the attention map computed), means over the start of a text."""
    T = config.block_size
    n_far = far_layout(torch.from_numpy(tokens[:len(tokens) // T * T][:200 * T].astype(np.int64)).view(-1, T), config)[1]
    window, sinks, max_seps = reach(config)
    far = n_far.clamp(max=sinks) + (n_far - sinks).clamp(0, max_seps)
    near = torch.arange(1, T + 1).clamp(max=window)
    return (far[:, -1].float().mean() + min(window, T)).item() / T, ((far + near).float().mean() / ((T + 1) / 2)).item()


def losses(log):
    return {line["step"]: line["val_loss"] for line in log if "val_loss" in line}


def scratch(runs, size):
    """Each mode from scratch on the same data and steps."""
    for name, shape in size["shapes"].items():
        rows, curves, compute = [], {}, {}
        for attn in MODES:
            log = train(runs / (attn + name), "--attn", attn, *shape)
            model, _, about = load_checkpoint(runs / (attn + name) / "ckpt.pt")
            config, batch, kept_and_share = model.config, about["train"]["batch_size"], cost(model.config, load_data("docs")[1])
            curves[attn] = {step: loss for step, loss in losses(log).items() if step}
            keys = kept_and_share[1] * (config.block_size + 1) / 2
            flops = 6 * sum(p.numel() for p in model.parameters()) + 12 * config.n_layer * config.n_embd * keys  # per token
            compute[attn] = [step * batch * config.block_size * flops / 1e12 for step in curves[attn]]
            speed = np.median([line["tokens_per_s"] for line in log[1:]])
            rows.append((attn, f"{curves[attn][max(curves[attn])]:.4f}", *(f"{x:.1%}" for x in kept_and_share), f"{speed:,.0f}",
                         f"{compute[attn][-1]:.1f}", f"{log[-1]['memory_gib']:.2f}"))
        table(("attn", "validation loss", "KV kept", "map computed", "tokens/s", "TFLOP", "peak GiB"), rows)
        chart("validation loss by step", list(curves["full"]), "nats per byte", {k: list(v.values()) for k, v in curves.items()})
        grid = compute["full"][:-1]
        chart("validation loss by compute in TFLOP", [round(x, 1) for x in grid], "nats per byte",
              {k: np.interp(grid, compute[k], list(curves[k].values())).tolist() for k in curves})


def post(runs, size):
    """A full model goes on training, with full and with sep attention."""
    train(runs / "full", "--attn", "full")
    curves = {attn: losses(train(runs / f"post-{attn}", "--init_from", runs / "full" / "ckpt.pt", "--attn", attn, "--max_steps",
                                 size["post"], "--learning_rate", 1e-3, "--eval_every", size["post"] // 6)) for attn in ("full", "sep")}
    table(("step", *curves), [(s, *(f"{curve[s]:.4f}" for curve in curves.values())) for s in curves["full"]])
    chart("post-training: validation loss by step", list(curves["full"]), "nats per byte",
          {k: list(v.values()) for k, v in curves.items()})


def free(runs, size):
    """A full model, just used with another attention."""
    train(runs / "full", "--attn", "full")
    rows, val = [], load_data("docs")[1]
    for attn in ("full", "stream", "sep"):
        for window in size["free"] if attn != "full" else size["free"][:1]:
            log = train(runs / f"free-{attn}-{window}", "--init_from", runs / "full" / "ckpt.pt", "--attn", attn, "--window",
                        window, "--max_seps", "None", "--max_steps", 0)
            kept, _ = cost(load_checkpoint(runs / f"free-{attn}-{window}" / "ckpt.pt")[0].config, val)
            rows.append((attn, window if attn != "full" else "-", f"{kept:.1%}", f"{losses(log)[0]:.4f}"))
    table(("attn", "window", "KV kept", "validation loss"), rows)


def recall(runs, size):
    """The accuracy of a value by the distance of its key's last mention."""
    if not (ROOT / "data" / "recall").exists():
        subprocess.run([sys.executable, str(ROOT / "data" / "prepare.py"), "--source", "recall"], check=True)
    val, meta = load_data("recall")[1:]
    ids = torch.from_numpy(val[:2000 * meta["record"]].astype(np.int64)).view(-1, meta["record"])
    is_value = torch.isin(ids, torch.tensor(meta["answers"]))
    distance = torch.zeros_like(ids)  # from a value to the value of the same key's last mention, 0 for none
    for row in range(len(ids)):
        last = {}
        for at in is_value[row].nonzero()[:, 0].tolist():
            key = ids[row, at - 1].item()
            distance[row, at] = at - last.get(key, at)
            last[key] = at
    edges = (3, 6, 9, 12, 18, 24, 36, 63)
    curves, learning = {}, {}
    for attn in MODES:
        learning[attn] = losses(train(runs / f"recall-{attn}", "--attn", attn, *RECALL))
        model = load_checkpoint(runs / f"recall-{attn}" / "ckpt.pt")[0]
        with torch.no_grad():
            right = torch.cat([model(part[:, :-1])[0].argmax(-1) == part[:, 1:] for part in ids.split(100)])
        curves[attn] = [right[(distance[:, 1:] >= a) & (distance[:, 1:] < b)].double().mean().item()
                        for a, b in zip(edges, edges[1:])]
    names = [f"{a}-{b - 1}" for a, b in zip(edges, edges[1:])]
    table(("distance", *curves), [(name, *(f"{curve[i]:.1%}" for curve in curves.values())) for i, name in enumerate(names)])
    chart("recall by distance", names, "accuracy", curves)
    steps = list(learning["full"])[1:]
    chart("recall: validation loss by step", steps, "nats per byte", {k: [v[step] for step in steps] for k, v in learning.items()})


def stream(runs, size):
    """Perplexity by position in a long stream, and what the rule for the sinks is worth."""
    tokens, shown = load_data("docs")[0][:size["stream"] + 1], {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, attn, changes, length in (
            ("sep", "sep", {}, size["stream"]), ("sep, sinks run away", "sep", dict(block_size=1 << 40), size["stream"]),
            ("stream, as many rows", "stream", None, size["stream"]), ("full", "full", {}, size["full"])):
        train(runs / attn, "--attn", attn)
        model = load_checkpoint(runs / attn / "ckpt.pt")[0].to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        window, max_seps = model.config.window, model.config.max_seps
        model.configure(**(dict(window=window + max_seps) if changes is None else changes))
        print(f"scoring {name}", file=sys.stderr)
        cache, young = (SepCache(model.config, 1, device, model.embed.weight.dtype) for _ in range(2))
        shown[name] = score(model, cache, tokens[:length + 1], device, True)
        if attn != "full":  # the same bytes at the start of a stream: does their position matter?
            fresh = score(model, young, tokens[length - 100_000:length + 1], device, True)
            shown[name]["last 100,000, read as a new text"] = fresh["all 100,000"]
        shown[name] |= dict(rows=cache.n_rows, MiB=cache.nbytes / 2 ** 20)
    names = dict.fromkeys(key for spans in shown.values() for key in spans)
    table(("", *shown), [(key, *(f"{spans[key]:.4g}" if key in spans else "" for spans in shown.values())) for key in names])


def speed(runs, size):
    """Training a GPT-2 124M shape at long texts, full against sep. On a GPU."""
    if not torch.cuda.is_available():
        return print("\nNot measured: this machine has no GPU.")
    rows = []
    for T in (16384, 65536):
        for attn in ("full", "sep"):
            log = train(runs / f"speed-{attn}-{T}", "--attn", attn, "--n_layer", 12, "--n_head", 12, "--n_embd", 768, "--block_size",
                        T, "--window", 256, "--max_seps", 1024, "--batch_size", 1, "--max_steps", 40, "--eval_every", 40,
                        "--eval_batches", 1)
            rows.append((T, attn, f"{log[-1]['tokens_per_s']:,}", f"{log[-1]['memory_gib']:.1f} GiB"))
    table(("block_size", "attn", "tokens/s", "peak memory"), rows)


def main():
    parts = dict(scratch=scratch, post=post, free=free, recall=recall, stream=stream, speed=speed)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--only", choices=parts, help="one part instead of all")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out-results", help="where the runs go (default: out-results)")
    args = parser.parse_args()
    for name, part in parts.items():
        if args.only in (None, name):
            print(f"\n### {part.__doc__}")
            part(args.out_dir / args.size, SIZES[args.size])


if __name__ == "__main__":
    main()
