"""Draws the figures of RESULTS.md and the README, as SVG files for light and for dark pages.

The one idea: backgrounds are transparent, text and axes are a grey with enough contrast on both,
and a curve is known by its line and its marker, not by its colour alone.
"""
from pathlib import Path

import numpy as np

from sep_cache import SepConfig, sees

try:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch, Rectangle
except ImportError:
    raise SystemExit("results.py: the figures need matplotlib; install it with: "
                     "pip install matplotlib") from None

FOLDER = Path(__file__).with_name("figures")
GREY = "#808080"
plt.rcParams.update({
    "svg.hashsalt": "nanoSep",  # the same drawing gives the same file
    "font.size": 10,
    "figure.dpi": 100,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "axes.titlecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.transparent": True,
})

STYLES = {  # colours that the colour-blind can tell apart, and that show on white and on near-black
    "sep": dict(color="#e0681a", marker="o", linestyle="-"),
    "streamingllm": dict(color="#2f8fd0", marker="s", linestyle="--"),
    "full": dict(color="#808080", marker="D", linestyle="-."),
    "fixed": dict(color="#12a07a", marker="^", linestyle=":"),
}


def style(name):
    """The style of a mode, whatever else its label says."""
    return STYLES[name.split(",")[0]]


def save(figure, name):
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def printable(text):
    return [{"\n": "↵", " ": "␣"}.get(c, c) for c in text]


def mask():
    """The definition, on a sentence."""
    text = "The sun set, and it got cold. Ann slept."
    config = SepConfig(window=6, sinks=2, max_seps=None)
    kept = [j < config.sinks or ord(c) in config.separators for j, c in enumerate(text)]
    kinds = {
        "window": (f"window: the last {config.window} tokens", "#2f8fd0", 0.6),
        "separator": ("separator beyond the window", "#e0681a", 1.0),
        "sink": (f"sinks: the first {config.sinks} tokens", "#12a07a", 0.9),
        "hidden": ("not computed", GREY, 0.15),
    }
    figure, axes = plt.subplots(figsize=(6.4, 5.8))
    for i in range(len(text)):
        for j in range(i + 1):
            kind = "hidden"
            if i - j < config.window:
                kind = "window"
            elif sees(i, j, kept, config):
                kind = "sink" if j < config.sinks else "separator"
            _, color, alpha = kinds[kind]
            cell = Rectangle((j + 0.06, i + 0.06), 0.88, 0.88)
            cell.set(color=color, alpha=alpha, linewidth=0)
            axes.add_patch(cell)
    text_axes(axes, text, fontsize=9)
    axes.set_ylabel("query")
    axes.set_xlabel("key")
    handles = [Patch(color=color, alpha=alpha, label=label)
               for label, color, alpha in kinds.values()]
    axes.legend(handles=handles, loc="upper right", fontsize=10)
    save(figure, "mask")


def text_axes(axes, text, fontsize=7):
    """A token at each tick of both axes, the first query on top."""
    n = len(text)
    names = printable(text)
    axes.set_xlim(0, n)
    axes.set_ylim(n, 0)
    axes.set_xticks(np.arange(n) + 0.5, names, fontsize=fontsize)
    axes.set_yticks(np.arange(n) + 0.5, names, fontsize=fontsize)
    axes.tick_params(length=0, pad=1)
    axes.grid(False)
    axes.set_aspect("equal")
    for spine in axes.spines.values():
        spine.set_visible(False)


def heat_map(p, text, title):
    """One head over one sentence: p (n, n), from the row of a query to the column of a key."""
    figure, axes = plt.subplots(figsize=(7.2, 6.8))
    separators = ".,?!;:\n"
    for i, j in np.argwhere(np.tril(p) > 0.01):
        is_separator = text[j] in separators
        color = "#e0681a" if is_separator else "#2f8fd0"
        alpha = float(min(1.0, p[i, j] ** 0.4))  # so that small shares show, too
        axes.add_patch(Rectangle((j, i), 1, 1, color=color, alpha=alpha, linewidth=0))
    text_axes(axes, text)
    for j, label in enumerate(axes.get_xticklabels()):
        if text[j] in separators:
            label.set_color("#e0681a")
            label.set_fontweight("bold")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.set_title(title, fontsize=11)
    handles = [
        Patch(color="#e0681a", label="to a separator"),
        Patch(color="#2f8fd0", label="to any other token"),
        Patch(color=GREY, alpha=0.3, label="the fainter, the less"),
    ]
    axes.legend(handles=handles, loc="upper right")
    save(figure, "separator_head")


def lift_by_head(lift, data):
    """Bars, a group for each layer."""
    figure, axes = plt.subplots(figsize=(7.2, 3))
    n_layer, n_head = lift.shape
    x = np.arange(n_layer * n_head) + np.repeat(np.arange(n_layer), n_head) * 0.8
    values = lift.flatten()
    bars = axes.bar(x, values, color="#2f8fd0", width=0.85)
    bars[values.argmax()].set_color("#e0681a")
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1.2,
                 label="as much attention as any other key")
    for at, value in zip(x, values, strict=True):
        axes.text(at, value + 0.03, f"{value:.1f}", ha="center", fontsize=8)
    axes.set_xticks(x, [f"{i // n_head + 1}.{i % n_head + 1}" for i in range(len(x))], fontsize=9)
    axes.set_xlabel("layer.head")
    axes.set_ylabel("lift of separators")
    axes.grid(False, axis="x")
    axes.set_ylim(top=1.25 * values.max())
    axes.legend(loc="upper left")
    save(figure, f"lift_by_head_{data}")


def lift_through_training(steps, lifts, data):
    """A line for each head, the strongest one in colour: lifts (snapshots, n_layer, n_head)."""
    figure, axes = plt.subplots(figsize=(7.2, 3.4))
    curves = np.asarray(lifts).reshape(len(steps), -1)
    n_head = np.asarray(lifts).shape[2]
    best = curves[-1].argsort()[::-1]
    others = axes.plot(steps, curves[:, best[2:]], color=GREY, alpha=0.45, linewidth=1)
    others[0].set_label("the other heads")
    for index, key in zip(best[:2], ("sep", "streamingllm"), strict=True):
        label = f"head {index // n_head + 1}.{index % n_head + 1}"
        axes.plot(steps, curves[:, index], label=label, markevery=2, **STYLES[key])
    axes.axhline(1, color=GREY, linestyle=":", linewidth=1.2)
    axes.set_ylim(top=1.3 * curves.max())
    axes.set_xlabel("training step")
    axes.set_ylabel("lift of separators")
    axes.legend(loc="upper right", ncols=3)
    save(figure, f"lift_through_training_{data}")


def recall_by_distance(names, curves):
    """{mode: (seeds, bins)} accuracies: a thin line for each seed, a thick one for their mean."""
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    x = np.arange(len(names))
    for attn, curve in curves.items():
        label = attn if len(curve) == 1 else f"{attn}, mean of {len(curve)} seeds"
        axes.plot(x, 100 * curve.mean(0), label=label, **STYLES[attn])
        if len(curve) > 1:
            axes.plot(x, 100 * curve.T, color=STYLES[attn]["color"], linewidth=0.8)
    axes.axhline(10, color=GREY, linewidth=1, linestyle=(0, (1, 3)))
    axes.text(0, 12, "guessing", fontsize=9)
    axes.set_xticks(x, names)
    axes.set_xlabel("facts back to the last mention (a fact: 3 tokens; window: 8 tokens)")
    axes.set_ylabel("recalled, %")
    axes.set_ylim(0, 104)
    axes.legend(loc="lower left", bbox_to_anchor=(0.02, 0.12))
    save(figure, "recall")


def loss_by_compute(curves):
    """{label: (TFLOP, validation loss)}."""
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    for label, (tflop, loss) in curves.items():
        axes.plot(tflop, loss, label=label, **style(label))
    axes.set_xlabel("training compute, TFLOP (visible pairs counted)")
    axes.set_ylabel("validation loss, nats per byte")
    axes.legend()
    save(figure, "loss_by_compute")


def loss_by_kv(panels):
    """{title: {mode: [(share of the keys, loss), ...]}}, side by side."""
    figure, row = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.6), squeeze=False)
    for axes, (title, curves) in zip(row[0], panels.items(), strict=True):
        for mode, points in curves.items():
            share, loss = np.array(sorted(points)).T
            if mode == "full":
                axes.axhline(loss[0], **{**STYLES["full"], "marker": None, "label": "full (100 %)"})
            else:
                axes.plot(100 * share, loss, label=mode, **STYLES[mode])
        axes.set_xscale("log")
        ticks = [3, 6, 12, 25, 50]
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("keys kept, % of full attention's")
        axes.legend(fontsize=9)
    row[0][0].set_ylabel("validation loss, nats per byte")
    figure.tight_layout()
    save(figure, "loss_by_kv")


def perplexity_by_position(streams, step=100_000):
    """{label: nats of a long stream}: a point for every 100,000 tokens."""
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    for name, nats in streams.items():
        n = len(nats) // step * step
        perplexity = np.exp(np.asarray(nats[:n], dtype=np.float64).reshape(-1, step).mean(1))
        over_all = np.exp(np.mean(nats, dtype=np.float64))
        millions = np.arange(1, len(perplexity) + 1) * step / 1e6
        axes.plot(millions, perplexity, label=f"{name}: {over_all:.3f} over all", markevery=5,
                  **style(name))
    axes.set_xlabel("position in the stream, million tokens")
    axes.set_ylabel(f"perplexity per {step:,} bytes")
    axes.legend()
    save(figure, "perplexity_by_position")
