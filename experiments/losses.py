"""The losses of training runs in one picture.

    python experiments/losses.py out-full out-sep --out losses.svg

reads log.jsonl in the folder of each run. The training loss is a thin line, the mean of 10 steps;
validation losses are dots. The legend says the folder, and the settings that differ between the
runs. (Logs of older versions have no settings.)
"""
import json
from pathlib import Path

import numpy as np
from common import new_parser, read_log
from plotting import new_figure


def read_settings(run):
    """The settings of a run: {name: value}."""
    with open(run / "log.jsonl") as log:
        return json.loads(log.readline()).get("settings", {})


def main():
    parser = new_parser(__doc__, "out")
    parser.add_argument("runs", type=Path, nargs="+")
    args = parser.parse_args()
    settings = [read_settings(run) for run in args.runs]
    figure, axes = new_figure()
    for run, own in zip(args.runs, settings):
        train = read_log(run, "loss")
        val = read_log(run, "val_loss")
        n = min(10, len(train))
        smooth = np.convolve(list(train.values()), np.ones(n) / n, "valid")
        line, = axes.plot(list(train)[n - 1:], smooth, linewidth=0.8)
        differing = [f"{name} {value}" for name, value in own.items() if name != "out_dir"
                     and any(other.get(name, value) != value for other in settings)]
        axes.plot(val.keys(), val.values(), "o", color=line.get_color(),
                  label=", ".join([str(run), *differing]))
    axes.set(xlabel="step", ylabel="loss, nats per token", yscale="log")
    axes.legend(framealpha=0)
    figure.savefig(args.out, transparent=True)


if __name__ == "__main__":
    main()
