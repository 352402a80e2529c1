"""experiments/harness.py: the numbers of lm-evaluation-harness with its Hugging Face backend."""
import json
import os
import sys

import pytest
from conftest import ROOT
from test_pretrained import TEXT, TOKENIZERS, safetensors_torch, save

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval")
pytest.importorskip("transformers")
sys.path.append(str(ROOT / "experiments"))
from harness import NanoSep  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from pretrained import load_model  # noqa: E402

KINDS = {  # of tasks: what is measured, and what is special
    "multiple_choice": ("brier_score", {"doc_to_choice": [" b", " c", " d"], "doc_to_target": 0}),
    "loglikelihood_rolling": ("bits_per_byte", {}),
    # their backend fails at an empty prompt
    "generate_until": ("chrf", {"doc_to_text": "Q{{text}}", "generation_kwargs": {
        "until": ["e", "\n"], "max_gen_toks": 20}}),
}


@pytest.fixture
def tasks(tmp_path):
    """A folder with a task of each kind. (JSON is YAML.)"""
    data = tmp_path / "docs.jsonl"
    texts = ["", *TEXT.splitlines(), "The first ", TEXT]
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for kind, (metric, special) in KINDS.items():
        task = {"task": kind, "output_type": kind, "dataset_path": "json", "test_split": "test",
                "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path)},
                "doc_to_text": "{{text}}", "doc_to_target": "{{text}}",
                "metric_list": [{"metric": metric}]}
        (tmp_path / f"{kind}.yaml").write_text(json.dumps(task | special))
    return tmp_path


@TOKENIZERS
def test_numbers_equal_those_of_the_hugging_face_backend(seed, tasks, save_tokenizer):
    """With a begin token before every text, and with a tokenizer that adds none."""
    weights = save(tasks, {"eos_token_id": 1, "max_position_embeddings": 999})
    head = weights["lm_head.weight"]
    head *= 0.1
    head[0] = head[130:258] = 0  # no answer has a begin token, all are ASCII
    head[1] *= 3  # some end
    safetensors_torch.save_file(weights, tasks / "model.safetensors")
    save_tokenizer(tasks)
    begin, end, *_ = json.loads((tasks / "tokenizer.json").read_text())["model"]["vocab"]
    (tasks / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}))
    theirs, ours = (lm_eval.simple_evaluate(
        model, tasks=[*KINDS], bootstrap_iters=0,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
    )["results"] for model in (HFLM(str(tasks), dtype="float32", device="cpu"),
                               NanoSep(load_model(tasks, attn="full"))))
    for kind, (metric, _) in KINDS.items():
        expected = pytest.approx(theirs[kind][f"{metric},none"], rel=1e-4)
        assert ours[kind][f"{metric},none"] == expected, kind
