"""Worked problems of arithmetic behind eight worked examples: what does each attention lose?

    python experiments/gsm8k.py --model FOLDER --problems gsm8k_test.jsonl

reads the eight usual examples of chain of thought (Wei et al., arXiv 2201.11903) once per attention
into a cache, and for each problem goes on from a copy of it. Prints the loss on the worked answers
of 200 problems and on the final numbers alone, as the difference to full attention, with its
standard error over problems.
"""
import argparse
import copy
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from far_keys import GPT, Tokenizer, mean_and_error
from tqdm import tqdm

from sep_cache import make_cache

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
    ids = [tokenizer.encode(part.encode(), is_first=False) for part in parts]
    logits, _ = model(torch.tensor([sum(ids, [])]), cache=copy.deepcopy(cache))
    logits = torch.cat([last_logits, logits[0, :-1]])
    losses = F.cross_entropy(logits, torch.tensor(sum(ids, [])), reduction="none")
    _, answer, final = losses.split([len(part) for part in ids])
    return torch.stack([answer.mean(), final.mean()])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a pretrained model")
    parser.add_argument("--problems", type=Path, required=True, help="GSM8K's test.jsonl")
    parser.add_argument("--n", type=int, default=200, help="how many problems (default: 200)")
    args = parser.parse_args()
    tokenizer = Tokenizer(args.model)
    examples = torch.tensor([tokenizer.encode(PROMPT.read_bytes())])
    problems = read_problems(args.problems)[:args.n]
    model = GPT.from_pretrained(args.model, max_seps=None)
    print(f"{examples.shape[1]} tokens of examples, {len(problems)} problems\n\n"
          "| attention | keys | answer - full | error | number - full | error |\n"
          "| --- | --- | --- | --- | --- | --- |")
    full = None  # the losses of the first case
    for settings in CASES:
        model.configure(**settings)
        cache = make_cache(model.config)
        with torch.inference_mode():
            logits, _ = model(examples, cache=cache)
        keys = cache.n_visible_keys
        losses = [loss_of_answer(model, cache, logits[0, -1:], tokenizer, problem)
                  for problem in tqdm(problems, str(settings))]
        losses = torch.stack(losses, dim=1)  # (2, problems)
        if full is None:
            full = losses
        (answer, number), (answer_error, number_error) = mean_and_error(losses - full)
        name = f"{settings['attn']} {settings.get('window', '')}"
        print(f"| {name} | {keys:.0f} | {answer:+.4f} | {answer_error:.4f} | {number:+.4f} | "
              f"{number_error:.4f} |", flush=True)
    print(f"\nfull attention: answer {full[0].mean():.4f}, number {full[1].mean():.4f} nats")


if __name__ == "__main__":
    main()
