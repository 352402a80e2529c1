"""One look for all figures: lines and text in a grey that can be read on white and on black."""
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

GREY = "#808080"
matplotlib.use("svg")
for part in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
    plt.rcParams[part] = GREY
# the same data give the same file
plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "nanoSep", "font.size": 9})


def new_figure(rows=1, height=3.4, **options):
    return plt.subplots(rows, figsize=(7, height * rows), layout="constrained", **options)


def save_figure(figure, name):
    folder = Path(__file__).resolve().parent / "figures"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / f"{name}.svg", transparent=True, metadata={"Date": None})
