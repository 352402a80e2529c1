"""lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) around a model.

    pip install lm-eval
    python experiments/harness.py --model FOLDER --tasks gsm8k_cot --attn sep --window 256

prints the harness's own table. The model is a checkpoint of train.py or a pretrained folder; the
options of its attention are those of sample.py. The paper's Table 1 has the tasks gsm8k_cot, and
mmlu with `--num_fewshot 5`. (-1 is the task's own number; --limit 0 takes all problems.) Tasks come
from the Hugging Face hub. Without it a task is a YAML file in --include_path with
`dataset_path: json`.

With --attn full the numbers are those of the harness's own Hugging Face backend, for texts up to
block_size. A longer text is cut by that backend; here it is read whole, as a stream. Answers are
greedy. They end at a stop word of the task, at a special token, or after max_gen_toks tokens.
"""
import copy
import sys

import torch
from common import new_parser
from tqdm import tqdm

from model import CHUNK_SIZE
from options import parse_options, require, run_script
from pretrained import load_model, tokenizer_of
from sep_mask import SepConfig

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
except ImportError:
    lm_eval = None
    TemplateLM = object


class NanoSep(TemplateLM):
    """A GPT and its tokenizer, as the harness calls them."""
    eot_token_id = None  # the harness's name of the token before a text without context

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer = tokenizer_of(model)
        # the begin token, if it has one, else its first special token, or a line break
        first = tokenizer.encode("") or sorted(tokenizer.special_ids) or tokenizer.encode("\n")
        self.eot_token_id = first[0]

    def tok_encode(self, string, add_special_tokens=True):
        return self.tokenizer.encode(string, is_first=add_special_tokens)

    @torch.inference_mode()
    def read(self, cache, ids):
        """Read all ids but the last into the cache, in chunks.

        Returns the log-likelihood in nats of all ids but the first, and whether each of them is the
        likeliest token.
        """
        nats = 0
        is_greedy = True
        for i in range(0, len(ids) - 1, CHUNK_SIZE):
            chunk = torch.tensor([ids[i:i + CHUNK_SIZE + 1]], device=cache.next_row.device)
            logits, _ = self.model(chunk[:, :-1], cache=cache)
            log_p = logits.float().log_softmax(-1)  # (1, T, V)
            targets = chunk[:, 1:]
            nats += log_p.gather(2, targets[..., None]).sum().item()
            is_greedy = is_greedy and log_p.argmax(-1).equal(targets)
        return nats, is_greedy

    def _loglikelihood_tokens(self, requests, **kwargs):
        """What `read` says of each continuation. requests: (anything, context, continuation)."""
        answers = []
        last_context = None  # what the cache has read: the choices of a question share it
        for _, context, continuation in tqdm(requests):
            if context != last_context:
                cache = self.model.new_cache()
                self.read(cache, context)
                last_context = context
            answers.append(self.read(copy.deepcopy(cache), context[-1:] + continuation))
        return answers

    def loglikelihood_rolling(self, requests):
        """The log-likelihood of each whole text."""
        whole = [(None, [self.eot_token_id], self.tok_encode(*request.args))
                 for request in requests]
        return [nats for nats, _ in self._loglikelihood_tokens(whole)]

    def generate_until(self, requests):
        return [self.answer(*request.args) for request in tqdm(requests)]

    def answer(self, prompt, settings):
        """The text that follows the prompt, up to a stop word."""
        ids = self.tok_encode(prompt) or [self.eot_token_id]
        ids = torch.tensor([ids], device=self.model.norm.weight.device)
        new_ids = []
        text = ""
        for token in self.model.generate(ids, settings.get("max_gen_toks", 256), temperature=0):
            new_ids += token.tolist()
            text = self.tokenizer.decode(new_ids)
            has_stop_word = any(word in text for word in settings["until"])
            if has_stop_word or new_ids[-1] in self.tokenizer.special_ids:
                break
        for word in settings["until"]:
            text = text.split(word)[0]
        return text


def main():
    args, sys.argv[1:] = new_parser(
        __doc__, "model", tasks="gsm8k_cot", limit=0, num_fewshot=-1, include_path="",
        device="cuda" if torch.cuda.is_available() else "cpu", dtype="float32",
        separators="").parse_known_args()
    attention = parse_options("", [SepConfig])
    if args.separators:  # else the model's own
        attention["separators"] = args.separators
    require(lm_eval, "the harness is missing: pip install lm-eval")
    model = load_model(args.model, getattr(torch, args.dtype), args.device, **attention)
    results = lm_eval.simple_evaluate(
        NanoSep(model), tasks=args.tasks.split(","), limit=args.limit or None,
        num_fewshot=None if args.num_fewshot < 0 else args.num_fewshot,
        task_manager=lm_eval.tasks.TaskManager(include_path=args.include_path or None))
    print(lm_eval.utils.make_table(results))


if __name__ == "__main__":
    run_script(main)
