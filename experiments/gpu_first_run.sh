#!/bin/bash
# What a GPU has to tell: is the kernel right, how fast is it, and what does training gain. Each
# step takes less than 10 minutes, and the next one runs whatever became of it.
#
#     bash experiments/gpu_first_run.sh               all steps
#     bash experiments/gpu_first_run.sh tests table   only these
#
# PYTHON names another interpreter than python3; OUT another folder than out-gpu.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
out=${OUT:-out-gpu}
mkdir -p "$out"

for step in ${@:-tests table train long}; do
    echo "== $step"
    case $step in
        tests) timeout 580 "$python" -m pytest -v tests/test_kernel.py ;;
        table) timeout 580 "$python" experiments/kernel_speed.py ;;
        train) timeout 580 "$python" train.py --out_dir "$out/train" ;;
        long)  # a model of GPT-2's shape, 124M parameters, over long texts
            for attn in full sep; do
                timeout 280 "$python" train.py --attn $attn --block_size 16384 --window 256 \
                    --max_seps 1024 --n_layer 12 --n_head 12 --n_embd 768 --batch_size 2 \
                    --max_steps 60 --eval_every 60 --out_dir "$out/long-$attn"
            done ;;
        *) echo "there is no step $step: tests, table, train, long" ;;
    esac 2>&1 | tee "$out/$step.log"
    echo "== $step: exit code ${PIPESTATUS[0]}"
done
