#!/bin/bash
# What a GPU has to tell, the most important first, as markdown tables for KERNEL.md. Each step takes
# less than ten minutes, and the next one runs whatever became of it.
#
#     bash experiments/gpu_first_run.sh                  all steps
#     bash experiments/gpu_first_run.sh tests causal     only these
#
# PYTHON names another interpreter than python3; OUT another folder than out-gpu, for what is printed.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
out=${OUT:-out-gpu}
export TQDM_DISABLE=1  # no bars between the tables
steps="tests causal six-1 smollm2-1 training-16384 preset six-64 variants training-4096 training-1024
       gpt2-1 flex smollm2-64 gpt2-64"

# options of speed.py; six layers of 384 channels are what it takes on a GPU
declare -A shape
shape[smollm2]="--vocab_size 49152 --n_layer 30 --n_head 9 --n_kv_head 3 --n_embd 576
                --block_size 8192 --window 256 --max_seps 256"
shape[gpt2]="--vocab_size 50304 --n_layer 12 --n_head 12 --n_embd 768 --window 256 --max_seps 256"

"$python" -c "
import sys, torch
if not torch.cuda.is_available():
    sys.exit('gpu_first_run.sh measures an NVIDIA GPU, and there is none here')
import triton
print(torch.cuda.get_device_name(), 'torch', torch.__version__, 'triton', triton.__version__)
" || exit 1
mkdir -p "$out"

make_tokens() {  # a data folder of random tokens of GPT-2; every 10th is a full stop
    mkdir -p "$out/tokens"
    "$python" -c "
import numpy
tokens = numpy.random.default_rng(0).integers(50257, size=1_000_000).astype('uint16')
tokens[9::10] = 13
tokens.tofile('$out/tokens/train.bin')
tokens.tofile('$out/tokens/val.bin')"
    echo '{"vocab_size": 50304, "dtype": "uint16", "separators": [13]}' > "$out/tokens/meta.json"
}

training_head() {
    echo "| options of train.py | tokens/s | GiB | validation loss |"
    echo "| --- | --- | --- | --- |"
}

for step in ${@:-$steps}; do
    echo "== $step"
    case $step in
        tests) timeout 580 "$python" -m pytest -v tests/test_kernel.py tests/test_record.py ;;
        causal | flex) timeout 580 "$python" experiments/kernel_speed.py --tables "$step" ;;
        variants) timeout 580 "$python" experiments/kernel_speed.py --tables forward dkdv ;;
        preset)
            training_head
            timeout 580 "$python" experiments/training_speed.py ;;
        training-*)  # GPT-2's shape and vocabulary, 32,768 tokens a step
            T=${step#*-}
            make_tokens
            training_head
            for attn in sep full; do
                timeout 280 "$python" experiments/training_speed.py --attn $attn --block_size "$T" \
                    --window 256 --max_seps 1024 --n_layer 12 --n_head 12 --n_embd 768 \
                    --batch_size $((32768 / T)) --max_steps 40 --eval_every 40 --data "$out/tokens"
            done ;;
        six-* | smollm2-* | gpt2-*)
            timeout 580 "$python" experiments/speed.py ${shape[${step%-*}]} \
                --batch_size "${step#*-}" ;;
        *) echo "there is no step $step; there are: $steps" ;;
    esac 2>&1 | tee "$out/$step.log"
    echo "== $step: exit code ${PIPESTATUS[0]}"
done
