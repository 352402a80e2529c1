"""lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) around a model.

    pip install lm-eval
    python experiments/harness.py --model FOLDER --attn sep --window 256 --tasks gsm8k_cot,mmlu

prints the harness's own table. The model is a checkpoint of train.py or a pretrained folder. The
paper's Table 1 has these two tasks, MMLU with `--num_fewshot 5`. Tasks come from the Hugging Face
hub. Without it a task is a YAML file in --include_path with `dataset_path: json`.

With --attn full the numbers are those of the harness's own Hugging Face backend. So a text longer
than block_size is cut there as that backend cuts it. The beginning of a context is dropped. A text
whose whole likelihood is asked for is scored in windows of block_size tokens. Any other attention
has a bounded cache, so it reads every text whole, as a stream.

The token before a text without context is that backend's: bos_token in tokenizer_config.json, or
else eos_token. Without that file it is the first token of a line break, as in sample.py. An answer
ends at a stop word of the task, at any special token, or after max_gen_toks tokens. It is greedy
unless the task sets a temperature. Other settings of sampling are ignored.
"""
import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import common  # noqa: F401  finds the modules of the root
import torch
from tqdm import tqdm

from model import CHUNK_SIZE
from options import check_minima, fields_of, option, parse_options, read_json, require, run_script
from pretrained import load_model, tokenizer_of
from sep_mask import FOREVER, SepConfig

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ImportError:
    lm_eval = None
    TemplateLM = object


@dataclass
class HarnessConfig:
    """What to evaluate. ValueError names the field that is out of range."""
    model: str = option("out/ckpt.pt", "a checkpoint of train.py, or the folder of a pretrained "
                                       "model")
    tasks: str = option("gsm8k_cot,mmlu", "names of tasks, with commas between them")
    limit: int | None = option(None, "only the first so many problems of each task", 1)
    num_fewshot: int | None = option(None, "worked examples before each problem; None: the task's "
                                           "own number", 0)
    include_path: str = option(None, "a folder with YAML files of further tasks")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where to compute")
    dtype: str = option("float32", "float32, bfloat16 or float16, of the weights")
    # goes to SepConfig
    separators: str = option(None, "the characters that separate segments, a line break in bash: "
                                   "$'.,\\n'")

    def __post_init__(self):
        check_minima(self)
        require(self.dtype in ("float32", "bfloat16", "float16"),
                f"dtype is {self.dtype}, and must be float32, bfloat16 or float16")


class NanoSep(TemplateLM):
    """A GPT and its tokenizer, as the harness calls them.

    prefix_id: the token before a text without context.
    """
    eot_token_id = None  # the harness's name of prefix_id

    def __init__(self, model, tokenizer, prefix_id):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.eot_token_id = prefix_id
        self._device = model.norm.weight.device
        self.max_length = FOREVER  # tokens that the model reads
        if model.config.attn == "full":
            self.max_length = model.config.block_size

    def tok_encode(self, string, add_special_tokens=True):
        return self.tokenizer.encode(string, is_first=add_special_tokens)

    def end_of(self, context, n_new):
        """As much of the context's end as leaves room for n_new more tokens."""
        require(n_new < self.max_length, f"{n_new} new tokens, of a likelihood or of max_gen_toks, "
                f"are too many for attn=full and block_size {self.max_length}")
        return context[n_new - self.max_length:]

    @torch.inference_mode()
    def score(self, ids, cache):
        """Read all ids but the last into the cache, in chunks.

        Returns the log-likelihood in nats of all ids but the first, and whether each of them is the
        likeliest token.
        """
        nats = 0
        is_greedy = True
        for i in range(0, len(ids) - 1, CHUNK_SIZE):
            chunk = torch.tensor(ids[i:i + CHUNK_SIZE + 1], device=self.device)
            logits, _ = self.model(chunk[None, :-1], cache=cache)
            log_p = logits[0].float().log_softmax(-1)  # (T, V)
            targets = chunk[1:]
            nats += log_p.gather(1, targets[:, None]).sum().item()
            is_greedy = is_greedy and log_p.argmax(-1).equal(targets)
        return nats, is_greedy

    def _loglikelihood_tokens(self, requests, **kwargs):
        """What `score` says of each continuation. requests: (anything, context, continuation)."""
        answers = []
        last_context = None  # what the cache has read
        for _, context, continuation in tqdm(requests, "likelihoods", leave=False):
            context = self.end_of(context, len(continuation) - 1)
            # the choices of a question share their context
            if context != last_context:
                cache = self.model.new_cache()
                self.score(context, cache)
                last_context = context
            answers.append(self.score(context[-1:] + continuation, copy.deepcopy(cache)))
        return answers

    def loglikelihood_rolling(self, requests):
        """The log-likelihood of each whole text."""
        answers = []
        for request in tqdm(requests, "texts"):
            ids = self.tok_encode(*request.args)
            windows = get_rolling_token_windows(ids, self.eot_token_id, self.max_length, 1)
            windows = [(None, *make_disjoint_window(window)) for window in windows]
            answers.append(sum(nats for nats, _ in self._loglikelihood_tokens(windows)))
        return answers

    def generate_until(self, requests):
        return [self.answer(*request.args) for request in tqdm(requests, "answers")]

    def answer(self, prompt, settings):
        """The text that follows the prompt."""
        settings = normalize_gen_kwargs(settings)
        n_new = settings["max_gen_toks"]
        ids = self.end_of(self.tok_encode(prompt), n_new) or [self.eot_token_id]
        ids = torch.tensor([ids], device=self.device)
        new_ids = []
        text = ""
        for token in self.model.generate(ids, n_new, settings.get("temperature", 0)):
            new_ids += token.tolist()
            text = self.tokenizer.decode(new_ids)
            has_stop_word = any(word in text for word in settings["until"])
            if has_stop_word or new_ids[-1] in self.tokenizer.special_ids:
                break
        for word in settings["until"]:
            text, *_ = text.split(word)
        return text


def prefix_id_of(folder, tokenizer):
    """The token before a text without context: see the top of this file."""
    path = Path(folder, "tokenizer_config.json")
    names = read_json(path) if path.is_file() else {}
    token = names.get("bos_token") or names.get("eos_token") or "\n"
    if isinstance(token, dict):
        token = token["content"]
    return tokenizer.encode(token)[0]


def main():
    shown = dict.fromkeys(asdict(SepConfig()), "the model's")
    options = parse_options(__doc__, [HarnessConfig, SepConfig], shown=shown)
    require(lm_eval, "the harness is missing: pip install lm-eval")
    cfg = HarnessConfig(**fields_of(HarnessConfig, options))
    attention = fields_of(SepConfig, options)
    model = load_model(cfg.model, getattr(torch, cfg.dtype), cfg.device, **attention)
    tokenizer = tokenizer_of(model)
    results = lm_eval.simple_evaluate(
        NanoSep(model, tokenizer, prefix_id_of(cfg.model, tokenizer)), tasks=cfg.tasks.split(","),
        num_fewshot=cfg.num_fewshot, limit=cfg.limit, log_samples=False,
        task_manager=lm_eval.tasks.TaskManager(include_path=cfg.include_path))
    print(make_table(results))


if __name__ == "__main__":
    run_script(main)
