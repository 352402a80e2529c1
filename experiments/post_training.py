"""Does training put a segment into its separator? A real model goes on training, with less to see.

    python experiments/post_training.py --model FOLDER --train BOOKS --test OTHER_BOOKS

trains the pretrained model once with each kind of attention, on the same texts in the same order:
300 steps of one text of 1,024 tokens. Every 50 steps it measures the loss on 16 texts of the other
books. Losses go to out-post/KIND.jsonl, and what is there is not trained again. At the end it
prints the table, and draws experiments/figures/post_training.svg.
"""
import json
from pathlib import Path
from unittest import mock

import torch
from common import new_parser, print_head, print_row, read_texts, with_errors
from far_keys import AS_CONFIGURED, loss_of_halves, token_before
from plotting import new_figure, save_figure
from tqdm import tqdm

from pretrained import load_model, tokenizer_of

N_STEPS = 300
EVAL_EVERY = 50
WARMUP_STEPS = 20
LEARNING_RATE = 1e-4
KINDS = {  # name: (which tokens stay visible, attn, window)
    "streamingllm": (AS_CONFIGURED, "streamingllm", 32),
    "sep": (AS_CONFIGURED, "sep", 32),  # this one and the next three see about as many keys
    "before": (token_before, "sep", 32),
    "fixed": (AS_CONFIGURED, "fixed", 32),
    "longer": (AS_CONFIGURED, "streamingllm", 140),
    "full": (AS_CONFIGURED, "full", 32),
}


def train(model, train_texts, test_texts, path):
    """Train on each text once, and write {"step", "second": [losses of second halves]} to path."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0, fused=True)
    lines = []
    for step in tqdm(range(N_STEPS + 1), path.stem):
        if step % EVAL_EVERY == 0:
            with torch.no_grad():
                losses = [loss_of_halves(model, ids)[1].item() for ids in test_texts]
            lines.append(json.dumps(dict(step=step, second=losses)))
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
    print("\nloss on second halves; error: of the difference to `sep` of the same texts")
    print_head("steps", *steps)
    figure, axes = new_figure()
    for name, losses in results.items():
        print_row(name, *[f"{mean:.4f}" for mean in losses.mean(1)])
        if name != "sep" and "sep" in results:
            print_row(f"{name} - sep", *with_errors(losses - results["sep"], "+.4f"))
        axes.plot(steps, losses.mean(1), marker="o", label=name)
    axes.set(xlabel="steps of 1,024 tokens", ylabel="loss on second halves, nats")
    figure.legend(loc="outside right", framealpha=0)
    save_figure(figure, "post_training")


def main():
    parser = new_parser(__doc__, "model", "train", "test", kinds=list(KINDS), out=Path("out-post"))
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    tokenizer = tokenizer_of(load_model(args.model))
    train_texts = read_texts(tokenizer, args.train, N_STEPS)
    test_texts = read_texts(tokenizer, args.test, 16)
    for name in args.kinds:
        path = args.out / f"{name}.jsonl"
        if not path.exists():
            rule, attn, window = KINDS[name]
            model = load_model(args.model, attn=attn, window=window, max_seps=None, fixed_every=9)
            with mock.patch("sep_mask.is_kept", rule):
                train(model, train_texts, test_texts, path)
    report(args.out)


if __name__ == "__main__":
    main()
