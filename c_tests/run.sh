#!/usr/bin/env bash
# Every check of the project, from a fresh clone: Rust, C, patches, patched llama.cpp. About 30 minutes on 2 cores, ten more the
# first time, when llama.cpp is compiled. Ends with "N passed, N failed, N skipped" and a status; each step's output is in build/checks.
set -euo pipefail
# shellcheck source=patches/lib.sh
. "$(dirname "$0")/../patches/lib.sh"

logs=$root/build/checks
target=${CARGO_TARGET_DIR:-$root/target}
cmake_dir=$root/build/c_tests
mkdir -p "$logs"
cd "$root"

# A line of each step, by whichever lane ran it: passed, failed, or skipped and its name.
results=$logs/results
: >"$results"
skip() {
    echo "skipped $1" >>"$results"
    echo "SKIP    $1: $2"
}

# step NAME COMMAND...: runs it into a log of its own; a failure is shown and counted, and the next step runs all the
# same.
step() {
    local name=$1 log start=$SECONDS
    log=$logs/$(printf '%s' "$name" | tr -c 'a-zA-Z0-9\n' '_').log
    shift
    # In a subshell, since die and a failing command end the shell they run in.
    if (set -e; run_logged "$log" "$name" "$@"); then
        echo passed >>"$results"
        echo "ok      $name ($((SECONDS - start)) s)"
    else
        echo failed >>"$results"
        # In one piece, since another lane may write as well.
        echo "$(echo "FAILED  $name ($((SECONDS - start)) s): $log"
            grep -E -A 12 '^(FAILED|error)|panicked|[0-9]+ failed' "$log" | head -n 60 | sed 's/^/        /')"
    fi
}

# Patches stay small: at most 5 files, 350 changed lines, 12 files of llama.cpp.
patch_budget() {
    local files lines n
    n=$(find patches -maxdepth 1 -name '0*.patch' | wc -l)
    lines=$(cat patches/0*.patch | grep -c -E '^(\+([^+]|$|\+[^+])|-([^-]|$|-[^-]))')
    files=$(sed -n 's,^+++ b/,,p' patches/0*.patch | sort -u | wc -l)
    echo "$n patches, $lines changed lines, $files upstream files"
    ((n >= 1 && n <= 5 && lines <= 350 && files <= 12))
}

# warned MODEL RECIPE: a recipe that does not fit the model says so.
warned() {
    build/llama/bin/llama-perplexity -m "$1" -f models/amazon-excerpt.txt -c 512 -b 512 -ub 64 --chunks 1 --kvq "$2" 2>&1 |
        grep 'does not fit this model.*use --kvq on'
}

# The instruction sets that this processor has, one a line: the library says "" to one that it has not.
list_isas() {
    local isa
    for isa in scalar avx2 avxvnni avx512 amx; do
        KVQ_ISA=$isa python3 -c 'import ctypes, sys
isa = ctypes.CDLL(sys.argv[1]).kvq_isa
isa.restype = ctypes.c_char_p
print(isa().decode())' "$target/release/libkvq.so"
    done | grep . | tee "$logs/isas"
}

c_tests() {
    local variant=$1
    shift
    cmake -S c_tests -B "$cmake_dir/$variant" -G Ninja "-DKVQ_LIB_DIR=$target/release" "$@" &&
        cmake --build "$cmake_dir/$variant" --parallel "$jobs"
}

need cmake=cmake ninja=ninja-build ccache=ccache g++=g++ valgrind=valgrind python3=python3
if ! python3 -m pip --version >/dev/null 2>&1; then need pip3=python3-pip; fi
need_rust
if command -v rustup >/dev/null; then
    { cargo fmt --version && cargo clippy --version; } >/dev/null 2>&1 || rustup component add rustfmt clippy
fi

# Names of tests in which codes are multiplied.
products=(codec:: simd:: tests::weights tests::vectors)

# Two lanes beside each other, as rustc compiles the library on one core: one has target/debug to itself, the other all else.
release_lane() {
    local isa best
    step "clippy" cargo clippy --release --all-targets -- -D warnings
    step "cargo build" cargo build --release
    # Tests of all instruction sets pass over those that this processor lacks; the library says which.
    rm -f "$logs/isas"
    step "instruction sets of this processor" list_isas
    best=$(tail -n 1 "$logs/isas")
    for isa in scalar avx2 avxvnni avx512 amx; do
        if grep -q -x "$isa" "$logs/isas"; then
            # Scalar code and the best set run every test, those between them what multiplies codes, and AVX2, whose loops are its own, attention.
            case $isa in
                scalar | "$best") step "cargo test, $isa" env KVQ_ISA="$isa" cargo test --release ;;
                avx2) step "cargo test, $isa: codecs and attention" env KVQ_ISA="$isa" cargo test --release --lib -- "${products[@]}" attention:: ;;
                *) step "cargo test, $isa: codecs" env KVQ_ISA="$isa" cargo test --release --lib -- "${products[@]}" ;;
            esac
        else
            skip "$isa in every test" "this processor does not have all of it"
        fi
    done
}

debug_lane() {
    step "cargo doc" env RUSTDOCFLAGS="-D warnings" cargo doc --no-deps
    # With kernels for GPUs that run on the CPU: more tests, and the others as they are.
    step "cargo test, debug assertions, overflow checks, kernels emulated" cargo test --lib --features cuda-emulation
    step "cargo package" cargo package --allow-dirty
}

# Kernels, compiled for all GPUs that there are, or for KVQ_CUDA_ARCHS="75 90". Nothing here is timed or runs for long, so the library
# around them is not optimised.
cuda_lane() {
    local rc=0 nvcc
    nvcc=$(patches/nvcc.sh 2>"$logs/nvcc.log") || rc=$?
    if ((rc == 3)); then
        skip "kernels for GPUs" "$(tail -n 1 "$logs/nvcc.log")"
        return
    fi
    step "kernels for GPUs" env NVCC="$nvcc" CARGO_TARGET_DIR="$target/cuda" cargo build --features cuda
    step "the library with CUDA, where there may be no GPU" c_tests cuda "-DKVQ_LIB_DIR=$target/cuda/debug"
    # GPU tests say that they were skipped where there is none.
    step "C tests with CUDA" ctest --test-dir "$cmake_dir/cuda" --output-on-failure -LE valgrind -R 'device|abi|boundary'
}

step "rustfmt" cargo fmt --check
step "imports of src/" c_tests/floors.py
# In a process group of its own, so that it ends when this does.
set -m
debug_lane &
set +m
lane=$!
trap 'kill -- -"$lane" 2>/dev/null || true' EXIT
release_lane
cuda_lane

step "C tests: build" c_tests plain
step "C tests" ctest --test-dir "$cmake_dir/plain" --output-on-failure -LE valgrind
step "C tests: valgrind" ctest --test-dir "$cmake_dir/plain" --output-on-failure -L valgrind --no-tests=error --parallel "$jobs"
step "C tests: build with sanitizers" c_tests asan -DKVQ_SANITIZE=ON
step "C tests: sanitizers" ctest --test-dir "$cmake_dir/asan" --output-on-failure -LE valgrind

step "installed, found by CMake and pkg-config" c_tests/install.sh
wait "$lane"
trap - EXIT

step "patch budget" patch_budget
step "scripts of patches/" python3 -B patches/tests/test_scripts.py
step "tables of the docs" patches/tables.py --check
step "patched and unpatched llama.cpp: build" patches/build.sh --tests --stock
step "seams of the pinned llama.cpp" patches/check.sh build/stock/llama.cpp
step "llama.cpp integration" patches/integration.sh
step "llama.cpp's own tests and programs" patches/programs.py --check docs/results/programs.csv
rc=0
patches/tests/binding.py --fetch >"$logs/binding.log" 2>&1 || rc=$?
if ((rc == 3)); then
    skip "llama-cpp-python" "$(tail -n 1 "$logs/binding.log")"
else
    step "llama-cpp-python on the patched library" patches/tests/binding.py
fi
# A newer llama.cpp: that the patches apply there, and that what they touch compiles.
rc=0
patches/build.sh --newer --stock --tree >"$logs/newer.log" 2>&1 || rc=$?
if ((rc == 3)); then
    skip "a newer llama.cpp" "$(tail -n 1 "$logs/newer.log")"
else
    step "seams of a newer llama.cpp" patches/check.sh build/newer/stock/llama.cpp
    step "a newer llama.cpp: what patches and glue touch compiles" patches/build.sh --newer --objects
fi

# Real models, a short form: stock's runs take most of the time, so there is one chunk of prose.
rc=0
say "fetching smollm2 and qwen05 (590 MB, unless they are there)"
patches/models.py smollm2 qwen05 >"$logs/models.log" 2>&1 || rc=$?
if ((rc == 3)); then
    skip "quality on real models" "$(tail -n 1 "$logs/models.log")"
else
    step "quality on real models" patches/eval.py -m smollm2 -m qwen05 --stock q4_0 -f models/amazon-excerpt.txt -c 1024 --chunks 1 \
        -o build/eval/check-real --below .02,,.05,.05 --at-most .25,.4,.5,.7 on 2 skvq qaq
    step "guard on a real model" warned build/models/qwen05.gguf skvq:paper
fi

eval_model=../shared/models/eval-105m-q8_0.gguf
eval_text=../shared/text/amazon.txt
if [ -f "$eval_model" ] && [ -f "$eval_text" ]; then
    step "quality on the evaluation model" patches/eval.py -m "$eval_model" --stock q4_0 -f "$eval_text" \
        --chunks 1 -o build/eval/check --at-most 0.4,0.7,0.7 \
        skvq:k=3,v=3 kivi:k=2.25 qaq:bits=2.25
    step "pass-key retrieval" patches/passkey.py -m "$eval_model" -f "$eval_text" -n 8 --max 1200 --at-least 0.85 \
        -o build/eval/check-passkey skvq:k=4,v=4 skvq:k=3,v=3
else
    skip "quality on the evaluation model" "no $eval_model, or no text beside it"
    skip "pass-key retrieval" "no $eval_model"
fi

count() { grep -c "^$1" "$results" || true; }
skipped_names=$(sed -n 's/^skipped //p' "$results" | paste -sd ,)
echo "$(count passed) passed, $(count failed) failed, $(count skipped) skipped${skipped_names:+: ${skipped_names//,/, }}"
(($(count failed) == 0))
