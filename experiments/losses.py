"""The losses of training runs in one picture.

    python experiments/losses.py out-full out-sep --out losses.svg

draws the training loss of each run over its steps as a thin line, the mean of the last 10 steps.
Its validation losses are markers. Both are read from log.jsonl in the run's folder. The beginning,
where the loss is more than twice the least one, is cut off. The legend says the folder, and those
settings that are not the same in all runs. The log of an older train.py has no settings, so its
legend is the folder alone.
"""
import json
import statistics
from pathlib import Path

from common import new_parser, read_log
from plotting import new_figure, write_svg

N_SMOOTHED = 10  # steps
# settings that the legend leaves out: the folder is there, and the separators belong to the data
LEFT_OUT = ("out_dir", "separators")


def read_settings(run):
    """The settings of a run, a list such as ["window 64", ...]; [] if its log has none."""
    with open(run / "log.jsonl") as log:
        settings = json.loads(log.readline()).get("settings", {})
    return [f"{name} {value}" for name, value in settings.items() if name not in LEFT_OUT]


def smooth(losses):
    """The mean of each number and those before it, N_SMOOTHED at most."""
    return [statistics.mean(losses[max(0, end - N_SMOOTHED):end])
            for end in range(1, len(losses) + 1)]


def main():
    parser = new_parser(__doc__, "out")
    parser.add_argument("runs", type=Path, nargs="+")
    args = parser.parse_args()
    settings = list(map(read_settings, args.runs))
    known = [each for each in settings if each]
    figure, axes = new_figure()
    lowest = []
    for run, own in zip(args.runs, settings, strict=True):
        differing = [text for text in own if any(text not in other for other in known)]
        train_losses = read_log(run, "loss")
        val_losses = read_log(run, "val_loss")
        line, = axes.plot(list(train_losses), smooth(list(train_losses.values())), linewidth=0.8)
        axes.plot(list(val_losses), list(val_losses.values()), "o", markersize=4,
                  color=line.get_color(), label=", ".join([str(run)] + differing))
        lowest.append(min(val_losses.values()))
    axes.set_ylim(top=2 * min(lowest))
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False)
    write_svg(figure, args.out)


if __name__ == "__main__":
    main()
