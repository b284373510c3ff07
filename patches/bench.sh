#!/usr/bin/env bash
# Times attention over a compressed cache beside stock ggml's f16, q8_0 and q4_0 caches, in one process, on the CPU.
#
#   patches/bench.sh             the whole table (minutes; most of them go to stock q4_0 with 512 queries)
#   patches/bench.sh --quick     decoding at three sizes with 2 bits, under a minute
#   patches/bench.sh --check     fails if a speed-up is below its bar; the bars are a table in patches/bench/cases.cpp
#   patches/bench.sh --cpu-time  on one thread, counting CPU time: for machines that are busy with other things
#   patches/bench.sh --help      all options of the program
#
# Writes build/bench.csv, and builds what patches/build.sh builds, with the same variables (LLAMA_CPP_DIR, JOBS).
set -euo pipefail
# shellcheck source=patches/lib.sh
. "$(dirname "$0")/lib.sh"

build=$root/build
"$root/patches/build.sh"

commit=$(git -C "$root" describe --always --dirty 2>/dev/null || echo unknown)
# Paths in the program are relative to itself, so that a moved clone still works.
run_logged "$build/bench.log" "compiling patches/bench/" g++ -std=c++17 -O3 -march=native -pthread -Wall -Wextra \
    "-DKVQ_COMMIT=\"$commit\"" -I "$root/include" -I "$build/llama.cpp/ggml/include" "$root"/patches/bench/*.cpp \
    -o "$build/bench" "${CARGO_TARGET_DIR:-$root/target}/release/libkvq.a" \
    -L "$build/llama/bin" -lggml -lggml-cpu -lggml-base "-Wl,-rpath,\$ORIGIN/llama/bin" -ldl -lm

exec "$build/bench" --csv "$build/bench.csv" "$@"
