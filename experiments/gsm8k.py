"""Worked problems of arithmetic behind eight worked examples: what does each attention lose?

    python experiments/gsm8k.py --model FOLDER --problems gsm8k_test.jsonl

reads the eight usual examples of chain of thought (Wei et al., arXiv 2201.11903) once per attention
into a cache, and for each problem goes on from a copy of it. Prints the loss on the worked answers
of 200 problems and on the final numbers alone, as the difference to full attention, with its
standard error over problems.
"""
import copy
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from common import new_parser, print_head, print_row, with_errors
from tqdm import tqdm

from pretrained import load_model, tokenizer_of

PROMPT = Path(__file__).with_name("gsm8k_prompt.txt")
CASES = [dict(attn="full")]
CASES += [dict(attn=attn, window=window) for attn in ("streamingllm", "sep")
          for window in (64, 128, 192, 256)]
CASES += [dict(attn="fixed", window=128, fixed_every=7)]  # about as many keys as sep


def read_problems(path):
    """[(question, worked answer, final number)], without the <<calculator's notes>>."""
    problems = []
    for line in path.read_text().splitlines():
        problem = json.loads(line)
        answer = re.sub(r"<<.*?>>", "", problem["answer"])
        worked, number = answer.split("\n#### ")
        problems.append((problem["question"], worked, number))
    return problems


@torch.inference_mode()
def loss_of_answer(model, cache, last_logits, tokenizer, problem):
    """Mean loss in nats on the tokens of the worked answer, and of the final number."""
    question, worked, number = problem
    parts = [f"Q: {question}\nA:", f" {worked.replace(chr(10), ' ')} The answer is", f" {number}"]
    parts = [torch.tensor(tokenizer.encode(part, is_first=False)) for part in parts]
    ids = torch.cat(parts)
    logits, _ = model(ids[None], cache=copy.deepcopy(cache))
    logits = torch.cat([last_logits, logits[0, :-1]])
    losses = F.cross_entropy(logits, ids, reduction="none")
    _, answer, final = losses.split([len(part) for part in parts])
    return torch.stack([answer.mean(), final.mean()])


def main():
    args = new_parser(__doc__, "model", "problems", n=200).parse_args()
    model = load_model(args.model, max_seps=None)
    tokenizer = tokenizer_of(model)
    examples = torch.tensor([tokenizer.encode(PROMPT.read_text())])
    problems = read_problems(args.problems)[:args.n]
    print(f"{examples.shape[1]} tokens of examples, {len(problems)} problems")
    print_head("attention", "keys", "answer - full", "number - full")
    full = None  # the losses of the first case
    for settings in CASES:
        model.configure(**settings)
        cache = model.new_cache()
        with torch.inference_mode():
            logits, _ = model(examples, cache=cache)
        keys = cache.row_visible.sum()
        losses = [loss_of_answer(model, cache, logits[0, -1:], tokenizer, problem)
                  for problem in tqdm(problems, str(settings))]
        losses = torch.stack(losses, dim=1)  # (2, problems)
        if full is None:
            full = losses
        name = f"{settings['attn']} {settings.get('window', '')}"
        print_row(name, int(keys), *with_errors(losses - full, "+.4f"))
    print(f"\nfull attention: answer {full[0].mean():.4f}, number {full[1].mean():.4f} nats")


if __name__ == "__main__":
    main()
