#!/usr/bin/env bash
# Patched llama.cpp with its KV cache on an NVIDIA GPU: the same tests as on the CPU, the same quality, states that move
# between both. Needs patches/build.sh --cuda --tests; without a GPU everything is skipped. Ends with
# "N passed, N failed, N skipped".
#
#   patches/tests/cuda.sh [--bench]   --bench: then llama-bench on a random model of Llama 3 8B's shape (5 GB in build/)
#   KVQ_BIN=DIR     programs under test (default: build/llama/bin)
#   DEPTHS=A,B,...  of --bench: tokens in the cache (default: 0,8192,32768,131072)
set -euo pipefail
# shellcheck source=patches/lib.sh
. "$(dirname "$0")/../lib.sh"

bin=${KVQ_BIN:-$root/build/llama/bin}
model=$root/models/tiny-12m-q8_0.gguf
text=$root/models/amazon-excerpt.txt
work=$root/build/cuda
recipes=(on 2 3 4 skvq kivi:k=2.25 qaq aqua:profile=tiny.kvq.gguf)
mkdir -p "$work"
cd "$work"
unset LLAMA_ARG_KVQ
export GGML_NO_BACKTRACE=1

passed=0 failed=0
check() {
    local name=$1 rc=0 start=$SECONDS
    shift
    "$@" >out.log 2>&1 </dev/null || rc=$?
    if ((rc == 0)); then
        passed=$((passed + 1))
        echo "ok      $name ($((SECONDS - start)) s)"
    else
        failed=$((failed + 1))
        echo "FAILED  $name (status $rc)"
        tail -n 15 out.log | sed 's/^/        /'
    fi
}

if ! nvidia-smi -L >/dev/null 2>&1; then
    echo "SKIP    everything: no NVIDIA GPU"
    echo "0 passed, 0 failed, 1 skipped"
    exit
fi
nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version --format=csv,noheader

echo "== llama.cpp's API"
on_gpu() { KVQ_TEST_NGL=$1 "${@:2}"; }
for ngl in 99 2; do
    check "skvq:k=8,v=8, $ngl layers on the GPU" on_gpu $ngl "$bin/test_llama" "$model" skvq:k=8,v=8
done
check "kivi:k=4,v=4" on_gpu 99 "$bin/test_llama" "$model" kivi:k=4,v=4 0.02
check "outlier tokens" on_gpu 99 "$bin/test_llama" "$model" ott:k=4,v=8,skip-layers=0 0.01
# Made from the end of the text, of whose beginning everything else here makes use.
tail -c 48000 "$text" >calibration.txt
check "llama-kvq-calibrate" "$bin/llama-kvq-calibrate" -m "$model" -f calibration.txt -o tiny.kvq.gguf -c 1024 --chunks 8
aqua=aqua:profile=tiny.kvq.gguf
check "a profile" on_gpu 99 "$bin/test_llama" "$model" $aqua,k=4,v=8 0.01
check "widths by attention" on_gpu 99 "$bin/test_llama" "$model" qaq:bits=3.5 0.01
check "what is in saved states" on_gpu 99 "$bin/test_state" "$model" 300
check "K-shifts lose nothing" on_gpu 99 "$bin/test_shift" "$model" "$text" skvq:k=2,v=2

echo "== text and states"
prompt=$(head -c 2600 "$text")
completion() {
    "$bin/llama-completion" -m "$model" --temp 0 -no-cnv --no-warmup -lv 4 --kvq skvq:k=4,v=4 -c 1024 -p "$prompt" "$@"
}
without_graphs() {
    completion -n 200 -ngl 99 >graphs.txt 2>graphs.log && GGML_CUDA_DISABLE_GRAPHS=1 completion -n 200 -ngl 99 >plain.txt &&
        cmp graphs.txt plain.txt
}
check "CUDA graphs change nothing" without_graphs
moves() {
    completion -n 1 -ngl "$1" --prompt-cache "$1.state" &&
        completion -n 32 -ngl "$2" --prompt-cache "$1.state" --prompt-cache-ro >moved.log 2>&1 && grep 'exact match' moved.log
}
check "a state of the CPU goes on on the GPU" moves 0 99
check "a state of the GPU goes on on the CPU" moves 99 0
n_gpus=$(nvidia-smi -L | wc -l)
layer_split() {
    completion -n 100 -ngl 99 -sm none >one.txt && completion -n 100 -ngl 99 -sm layer >all.txt && cmp one.txt all.txt
}
if ((n_gpus > 1)); then check "layers split over $n_gpus GPUs" layer_split; fi

echo "== quality: mean KLD against f16"
perplexity() {
    "$bin/llama-perplexity" -m "$model" -f "$text" -fa on -c 1024 -b 1024 -ub 64 --chunks 2 --kl-divergence-base f16.dat "$@"
}
kld() { perplexity --kl-divergence "$@" 2>&1 | sed -n 's/^Mean *KLD: *-\{0,1\}\([0-9.]*\).*/\1/p'; }
same_quality() {
    local cpu gpu
    cpu=$(kld -ngl 0 --kvq "$1") gpu=$(kld -ngl 99 --kvq "$1")
    echo "$1: CPU $cpu, GPU $gpu" | tee -a kld.txt
    python3 -c "import sys; cpu, gpu = map(float, sys.argv[1:]); sys.exit(abs(cpu - gpu) > .05 * cpu + 2e-4)" "$cpu" "$gpu"
}
rm -f kld.txt
check "f16, on the GPU" perplexity -ngl 99
for recipe in "${recipes[@]}"; do check "the GPU's is the CPU's: $recipe" same_quality "$recipe"; done
cat kld.txt

if [ "${1:-}" = --bench ]; then
    echo "== llama-bench, random weights, Llama 3 8B's shape"
    big=$root/build/random-8b.gguf
    [ -f "$big" ] || "$root/patches/random_model.py" "$big"
    depths=${DEPTHS:-0,8192,32768,131072}
    bench() { "$bin/llama-bench" -m "$big" -ngl 99 -fa 1 -p 0 -n 32 -r 3 -d "$depths" -o csv "$@"; }
    for args in "-ctk f16 -ctv f16" "-ctk q8_0 -ctv q8_0" "-ctk q4_0 -ctv q4_0" "-kvq skvq:k=2,v=2" "-kvq skvq:k=3,v=3" \
        "-kvq kivi:k=2.25"; do
        read -r -a words <<<"$args"
        bench "${words[@]}" 2>>bench.log >"bench.csv" || { tail -n 3 bench.log; continue; }
        python3 - "$args" <<'PY'
import csv, sys
for row in csv.DictReader(open("bench.csv")):
    print(f"{sys.argv[1]:24} depth {row['n_depth']:>7}: {float(row['avg_ts']):8.2f} t/s  +- {float(row['stddev_ts']):.2f}")
PY
    done
fi

echo "$passed passed, $failed failed, 0 skipped"
((failed == 0))
