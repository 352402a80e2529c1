"""What far keys are worth to a real model, training-free: loss against keys used, and controls.

    python experiments/real_model.py --model FOLDER --text FILE --texts 12

reads stretches of 1,024 tokens from a text file, evenly spaced, with line breaks inside of
paragraphs made spaces. Prints the loss on their second halves, as the difference to full attention
of the same text, and the mean number of keys that their last token sees. All settings take turns.

The controls keep other tokens beyond the window, as many as there are separators. What is kept is
one boolean vector, so a control is a function in the place of `sep_cache.is_kept`.
"""
import argparse
import re
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sep_cache  # noqa: E402
from model import GPT  # noqa: E402
from pretrained import Tokenizer  # noqa: E402

T = 1024
is_kept = sep_cache.is_kept


def separators(ids, positions, config):
    return is_kept(ids, positions, config)


def token_before(ids, positions, config):
    kept = is_kept(ids, positions, config)
    return F.pad(kept[:, 1:], (0, 1)) | (positions < config.sinks)


def token_after(ids, positions, config):
    kept = is_kept(ids, positions, config)
    return F.pad(kept[:, :-1], (1, 0)) | (positions < config.sinks)


def random_tokens(ids, positions, config):
    n = int(is_kept(ids, positions, config).sum())
    chosen = torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))[:n]
    return torch.isin(positions, chosen)[None] | (positions < config.sinks)


def every_nth(ids, positions, config):
    n = ids.shape[1] / int(is_kept(ids, positions, config).sum())
    return ((positions / n).floor() > ((positions - 1) / n).floor())[None] \
        | (positions < config.sinks)


def read_texts(folder, path, n_texts):
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", path.read_text(errors="replace"))
    starts = torch.linspace(0, len(text) - 12 * T, n_texts).long().tolist()
    tokenizer = Tokenizer(folder)
    return [torch.tensor([tokenizer.encode(text[start:start + 12 * T].encode())[:T]])
            for start in starts]


@torch.inference_mode()
def measure(model, ids, rule, settings):
    """The loss on the second half, and how many keys the last token sees."""
    model.configure(**settings)
    with mock.patch("sep_cache.is_kept", rule):
        logits, _ = model(ids)
        positions = torch.arange(T)
        reach = sep_cache.key_reach(rule(ids, positions, model.config), positions[None],
                                    model.config)
    loss = F.cross_entropy(logits[0, T // 2:-1], ids[0, T // 2 + 1:])
    return loss.item(), (T - 1 - positions < reach).sum().item()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a pretrained model")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--texts", type=int, default=12, help="how many (default: 12)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = GPT.from_pretrained(args.model, max_seps=None)
    cases = {"full": (separators, dict(attn="full"))}
    for window in (32, 64, 128, 200, 256):
        cases[f"streamingllm {window}"] = separators, dict(attn="streamingllm", window=window)
    for window in (32, 64, 128):
        cases[f"sep {window}"] = separators, dict(attn="sep", window=window)
    for window in (32, 128):
        for rule in (token_before, token_after, random_tokens, every_nth):
            cases[f"{rule.__name__} {window}"] = rule, dict(attn="sep", window=window)

    results = {name: [] for name in cases}
    for ids in tqdm(read_texts(args.model, args.text, args.texts), "texts"):
        for name, (rule, settings) in cases.items():
            results[name].append(measure(model, ids, rule, settings))
    full = torch.tensor(results["full"])[:, 0]
    print(f"full attention: {full.mean():.4f} nats\n\n| | keys | loss - full | error |\n"
          "| --- | --- | --- | --- |")
    for name, values in results.items():
        loss, keys = torch.tensor(values).unbind(1)
        difference = loss - full
        error = difference.std() / len(full) ** 0.5
        print(f"| {name} | {keys.mean():.0f} | {difference.mean():+.4f} | {error:.4f} |")


if __name__ == "__main__":
    main()
