#!/bin/bash
# Everything that a GPU has to tell, in 25 minutes: is the kernel right, how fast is it, and what do
# decoding, scoring and training gain. Each step writes a log of its own, and the next one runs
# whatever became of it.
#
#     bash experiments/gpu_first_run.sh                     all steps, logs in out-gpu/
#     bash experiments/gpu_first_run.sh FOLDER              logs in FOLDER/
#     bash experiments/gpu_first_run.sh FOLDER table tiles  only these steps

cd "$(dirname "$0")/.." || exit 1
out=${1:-out-gpu}
shift
wanted=" $* "
budget=1500  # seconds, for all steps together
mkdir -p "$out"

# step NAME SECONDS COMMAND: at most so many seconds, and never more than the budget has left
step() {
    local name=$1 limit=$2 left=$((budget - SECONDS)) begin=$SECONDS
    if [[ $wanted != "  " && $wanted != *" $name "* ]]; then
        return
    fi
    if ((left < limit)); then
        limit=$left
    fi
    if ((limit <= 0)); then
        echo "== $name: not run, the time is over"
        return
    fi
    echo "== $name, at most $limit s"
    timeout -k 10 "$limit" bash -c "$3" 2>&1 | tee "$out/$name.log"
    local code=${PIPESTATUS[0]}
    echo "== $name: exit code $code after $((SECONDS - begin)) s" | tee -a "$out/$name.log"
}

step smoke 120 "nvidia-smi --query-gpu=name,driver_version,power.limit --format=csv
python -m pytest -v tests/test_kernel.py -k 'every_run or library or graph_break or streams'"

step kernel_tests 240 "python -m pytest -v --durations=5 tests/test_kernel.py"

step table 480 "python experiments/kernel_speed.py"

# candidates for the tables of launch sizes in sep_kernel.py; the first line is what stands there
case="python experiments/kernel_speed.py --T 65536 --every 10 --max_seps 1024 --sep_alone"
step tiles 240 "$case
for tile in 128,64,4,3,5,168 128,64,8,3,5,128 64,64,4,3,5 128,64,4,3,3; do
    $case --forward \$tile
done
for tile in 64,64,4,3,5 128,64,8,3,5,128 128,64,4,3,5 64,64,4,3,3,168; do
    $case --dq \$tile
done
for tile in 64,32,4,3,5 64,64,4,2,5 128,64,8,3,5; do
    $case --dkdv \$tile
done
$case --D 128
for tile in 64,64,4,3,5 128,64,8,3,3; do
    $case --D 128 --forward \$tile
done
for tile in 64,64,4,3,4 128,64,8,3,3; do
    $case --D 128 --dq \$tile
done"

# the GPU preset, full and sep: losses, tokens per second, peak memory; and a model for what follows
step train_sep 180 "python train.py --attn sep --max_steps 300 --out_dir $out/sep"
step train_full 180 "python train.py --attn full --max_steps 300 --out_dir $out/full"

step decode 120 "for n in 1 64; do
    for attn in sep full; do
        echo \"\$attn, batch \$n\"
        python sample.py --ckpt $out/\$attn/ckpt.pt --num_samples \$n \
            --max_new_tokens 2000 | tail -c 300
    done
done"

step score 150 "[ -s data/docs/train.bin ] || exit 1
while (( \$(cat $out/text.bin 2>/dev/null | wc -c) < 4000001 )); do
    cat data/docs/train.bin >> $out/text.bin
done
head -c 4000001 $out/text.bin > $out/text_4m.bin
rm $out/text.bin
python sample.py --ckpt $out/sep/ckpt.pt --score $out/text_4m.bin"

# a model of GPT-2's shape, 124M parameters, at two lengths
step long 240 "for T in 16384 65536; do
    for attn in full sep; do
        echo \"\$attn, block_size \$T\"
        timeout 60 python train.py --attn \$attn --n_layer 12 --n_head 12 --n_embd 768 \
            --block_size \$T --window 256 --max_seps 1024 --batch_size 1 --max_steps 20 \
            --eval_every 20 --eval_batches 1 --compile false --out_dir $out/long-\$attn-\$T
    done
done"
