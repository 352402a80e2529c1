"""experiments/harness.py: the numbers of lm-evaluation-harness with its Hugging Face backend."""
import json
import os
import re

import pytest
from conftest import succeed
from test_pretrained import TEXT, TOKENIZERS, safetensors_torch, save

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval")
pytest.importorskip("transformers")
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import make_table  # noqa: E402

METRICS = {
    "multiple_choice": "brier_score",
    "loglikelihood": "perplexity",
    "loglikelihood_rolling": "bits_per_byte",
    "generate_until": "chrf",
}
CHANGES = {
    "multiple_choice": {"doc_to_choice": [" b", " c", " d"], "doc_to_target": 0},
    "loglikelihood": {"doc_to_target": " the seco"},
    # their backend fails at an empty prompt
    "generate_until": {"doc_to_text": "Q{{text}}",
                       "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 20}},
}
# an empty one, short ones, one that ends in a space, one beyond block_size
TEXTS = ["", *TEXT.splitlines(), "The first ", TEXT * 3]
HARNESS = f"experiments/harness.py --device cpu --tasks {','.join(METRICS)}"


@pytest.fixture
def tasks(tmp_path):
    """A folder with a task of each kind. (JSON is YAML.)"""
    data = tmp_path / "docs.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    for kind, metric in METRICS.items():
        task = {
            "task": kind,
            "output_type": kind,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path)},
            "test_split": "test",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": metric}],
        }
        task |= CHANGES.get(kind, {})
        (tmp_path / f"{kind}.yaml").write_text(json.dumps(task))
    return tmp_path


def numbers(table):
    return list(map(float, re.findall(r"\d+\.\d+", table)))


@TOKENIZERS
def test_numbers_equal_those_of_the_hugging_face_backend(seed, tasks, save_tokenizer):
    """With a begin token before every text, and with a tokenizer that adds none."""
    folder = tasks
    weights = save(folder, {"eos_token_id": 1})
    head = weights["lm_head.weight"]
    head *= 0.1
    head[0] = head[130:258] = 0  # no answer has a begin token, all are ASCII
    head[1] *= 3  # some end
    safetensors_torch.save_file(weights, folder / "model.safetensors")
    save_tokenizer(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    begin, end, *_ = vocabulary
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}))
    theirs = lm_eval.simple_evaluate(
        HFLM(str(folder), dtype="float32", device="cpu"), tasks=[*METRICS],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False))
    ours, _ = succeed(HARNESS, "--attn", "full", "--model", folder, "--include_path", tasks)
    expected = numbers(make_table(theirs))
    assert len(expected) > 3 and numbers(ours) == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_of_bytes_is_evaluated(checkpoint, tasks):
    table, _ = succeed(HARNESS, "--attn", "sep", "--model", checkpoint, "--include_path", tasks)
    assert len(numbers(table)) > 3
