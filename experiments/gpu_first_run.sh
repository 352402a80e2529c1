#!/bin/bash
# What a GPU has to tell, the most important first, as markdown tables for KERNEL.md. Each step takes
# less than ten minutes, and the next one runs whatever became of it.
#
#     bash experiments/gpu_first_run.sh                  all steps
#     bash experiments/gpu_first_run.sh record preset    only these
#
# PYTHON names another interpreter than python3; OUT another folder than out-gpu, for what is printed.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
out=${OUT:-out-gpu}
export TQDM_DISABLE=1 KINETO_LOG_LEVEL=99  # no bars, no notes of the profiler between the tables
steps="record preset sdpa tests causal six-1 smollm2-1 training-16384 all-tests six-64 variants
       training-4096 training-1024 gpt2-1 flex smollm2-64 gpt2-64"

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

record_a_step() {  # is a step of decoding recorded, and are its tokens those of one that is not?
    "$python" -c "
import torch, model
gpt = model.GPT(model.GPTConfig(n_layer=6, n_head=6, n_embd=384)).to('cuda', torch.bfloat16)
ids = torch.randint(256, (4, 200), device='cuda')
ids[:, 9::10] = gpt.config.separators[0]
record = model.record
recorded = []

def watch(step, device):
    replay = record(step, device)
    recorded.append(replay is not step)
    return replay

def and_ask(step, device):  # asks the device for a number, which cannot be recorded
    return record(lambda: step() or ids.sum().item(), device)

def write(way):
    model.record = way
    torch.manual_seed(0)
    return torch.stack(list(gpt.generate(ids, 400)))

plain = write(lambda step, device: step)
same = torch.equal(write(watch), plain)
print('steps recorded:', recorded, ' the same tokens as without:', same)
same = torch.equal(write(and_ask), plain)
print('the same tokens after recordings that failed:', same)"
}

which_sdpa() {  # the operator of attention over the rows of a cache, and its error
    "$python" -c "
import torch
from torch.profiler import ProfilerActivity, profile
from model import cached_attention
print('| H | H_kv | D | rows | B | T | operator | largest error | of rounding alone |')
print('| --- ' * 9 + '|')
for H, H_kv, D, rows in ((6, 6, 64, 192), (9, 3, 64, 640), (32, 8, 128, 640)):
    for B, T in ((1, 1), (64, 1), (1, 512)):  # a token of one text, of 64, and a chunk
        q = torch.randn(B, H, T, D, device='cuda').bfloat16()
        k, v = torch.randn(2, B, H_kv, rows, D, device='cuda').bfloat16()
        mask = torch.zeros(B, 1, H // H_kv * T, rows, device='cuda').bfloat16()
        mask[..., :128] = -torch.inf  # the leading keys are hidden
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            y = cached_attention(q, k, v, mask)
        called = [event.key.removeprefix('aten::') for event in profiled.key_averages()]
        names = [name for name in called if name.startswith('_scaled_dot_product')]
        k, v = (x[:, :, 128:].double().repeat_interleave(H // H_kv, 1) for x in (k, v))
        exact = (q.double() @ k.mT * D ** -0.5).softmax(-1) @ v
        errors = [f'{(x - exact).abs().max():.5f}' for x in (y, exact.bfloat16())]
        print('|', *[f'{x} |' for x in (H, H_kv, D, rows, B, T, *names, *errors)])"
}

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
        record) record_a_step ;;
        sdpa) which_sdpa ;;
        tests) timeout 580 "$python" -m pytest -v tests/test_kernel.py tests/test_record.py ;;
        all-tests) timeout 580 "$python" -m pytest -q ;;
        causal | flex) timeout 580 "$python" experiments/kernel_speed.py --tables "$step" ;;
        variants) timeout 580 "$python" experiments/kernel_speed.py --tables forward dkdv ;;
        preset)  # and with the whole batch at once
            training_head
            timeout 280 "$python" experiments/training_speed.py
            timeout 280 "$python" experiments/training_speed.py --micro_batch_size None ;;
        training-*)  # GPT-2's shape and vocabulary, 32,768 tokens a step
            T=${step#*-}
            B=$((32768 / T))
            make_tokens
            training_head
            for attn in sep full; do
                timeout 280 "$python" experiments/training_speed.py --attn $attn --block_size "$T" \
                    --window 256 --max_seps 1024 --n_layer 12 --n_head 12 --n_embd 768 \
                    --batch_size $B --micro_batch_size $B --max_steps 40 --eval_every 40 \
                    --data "$out/tokens"
            done ;;
        six-* | smollm2-* | gpt2-*)
            timeout 580 "$python" experiments/speed.py ${shape[${step%-*}]} \
                --batch_size "${step#*-}" ;;
        *) echo "there is no step $step; there are: $steps" ;;
    esac 2>&1 | tee "$out/$step.log"
    echo "== $step: exit code ${PIPESTATUS[0]}"
done
