"""Does training put a segment into its separator? A real model goes on training, with less to see.

    python experiments/post_training.py --model FOLDER --train BOOKS --test OTHER_BOOKS

trains the pretrained model once with each kind of attention, on the same texts in the same order:
300 steps of one text of 1,024 tokens. Every 50 steps it measures the loss on 16 texts of the other
books. Losses go to out-post/KIND.jsonl, and what is there is not trained again. At the end it
prints the table, and draws experiments/figures/post_training.svg.
"""
import argparse
import json
from pathlib import Path
from unittest import mock

import torch
from far_keys import AS_CONFIGURED, GPT, loss_of_halves, mean_and_error, read_texts, token_before
from plotting import new_figure, save_figure
from tqdm import tqdm

N_STEPS = 300
EVAL_EVERY = 50
WARMUP_STEPS = 20
LEARNING_RATE = 1e-4
WINDOW = 32
KINDS = {  # name: (which tokens stay visible, settings); the middle four see about as many keys
    "streamingllm": (AS_CONFIGURED, dict(attn="streamingllm", window=WINDOW)),
    "sep": (AS_CONFIGURED, dict(attn="sep", window=WINDOW)),
    "before": (token_before, dict(attn="sep", window=WINDOW)),
    "fixed": (AS_CONFIGURED, dict(attn="fixed", window=WINDOW, fixed_every=9)),
    "longer": (AS_CONFIGURED, dict(attn="streamingllm", window=140)),
    "full": (AS_CONFIGURED, dict(attn="full")),
}


def train(model, train_texts, test_texts, path):
    """Train on each text once, and write {"step", "first": [losses], "second": [...]} to path."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0, fused=True)
    lines = []
    bar = tqdm(range(N_STEPS + 1), path.stem)
    for step in bar:
        if step % EVAL_EVERY == 0:
            with torch.no_grad():
                losses = torch.stack([loss_of_halves(model, ids) for ids in test_texts], dim=1)
            first, second = losses.tolist()
            lines.append(json.dumps(dict(step=step, first=first, second=second)))
            bar.set_postfix(test_loss=f"{losses[1].mean():.4f}")
        if step == N_STEPS:
            break
        progress = step / N_STEPS
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / WARMUP_STEPS, 1 - progress)
        loss_of_halves(model, train_texts[step]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    path.write_text("\n".join(lines) + "\n")


def report(out):
    """The table and the figure, of the kinds that have been trained."""
    results = {}
    for name in KINDS:
        path = out / f"{name}.jsonl"
        if path.exists():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            results[name] = torch.tensor([line["second"] for line in lines])  # (times, texts)
    steps = [line["step"] for line in lines]
    print(f"\nloss on second halves; error: of the difference to `sep` of the same texts\n\n"
          f"| steps | {' | '.join(map(str, steps))} |\n| --- {'| --- ' * len(steps)}|")
    for name, losses in results.items():
        means = losses.mean(1).tolist()
        print(f"| {name} | {' | '.join(f'{mean:.4f}' for mean in means)} |")
        if name != "sep" and "sep" in results:
            means, errors = mean_and_error(losses - results["sep"])
            cells = [f"{mean:+.4f} ± {error:.4f}"
                     for mean, error in zip(means, errors, strict=True)]
            print(f"| {name} - sep | {' | '.join(cells)} |")
    figure, axes = new_figure()
    for name, losses in results.items():
        axes.plot(steps, losses.mean(1), marker="o", label=name)
    axes.set(xlabel="steps of 1,024 tokens", ylabel="loss on second halves, nats")
    figure.legend(loc="outside right", framealpha=0)
    save_figure(figure, "post_training")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a pretrained model")
    parser.add_argument("--train", type=Path, required=True, help="a text file of books")
    parser.add_argument("--test", type=Path, required=True, help="other books")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS),
                        help=f"which to train (default: {' '.join(KINDS)})")
    parser.add_argument("--out", type=Path, default=Path("out-post"), help="where losses go")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    train_texts = read_texts(args.model, args.train, N_STEPS)
    test_texts = read_texts(args.model, args.test, 16)
    for name in args.kinds:
        path = args.out / f"{name}.jsonl"
        if not path.exists():
            rule, settings = KINDS[name]
            model = GPT.from_pretrained(args.model, max_seps=None, **settings).train()
            with mock.patch("sep_cache.is_kept", rule):
                train(model, train_texts, test_texts, path)
    report(args.out)


if __name__ == "__main__":
    main()
