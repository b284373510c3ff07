#!/usr/bin/env bash
# Integration tests of patched llama.cpp on the small model: kvq off changes nothing, programs run, what is unsupported
# is refused with one line, saved states are checked, quality stays within its bars. Ends with
# "N passed, N failed, N skipped".
#
#   patches/integration.sh [--check-stock DIR]     DIR: programs of the same llama.cpp without patches
#                                                  (default: build/stock/llama/bin, made by patches/build.sh --stock)
#   KVQ_BIN=DIR    programs under test (default: build/llama/bin)
#   KVQ_TEST_ALL=1 the long forms of all tests of llama.cpp's API: half an hour more
set -euo pipefail
# shellcheck source=patches/lib.sh
. "$(dirname "$0")/lib.sh"

bin=${KVQ_BIN:-$root/build/llama/bin}
stock=$root/build/stock/llama/bin
if [ "${1:-}" = --check-stock ]; then stock=${2:?--check-stock needs a folder}; fi
model=$root/models/tiny-12m-q8_0.gguf
text=$root/models/amazon-excerpt.txt
work=$root/build/integration
[ -x "$bin/llama-completion" ] || die "no programs in $bin: run patches/build.sh --tests first"
rm -rf "$work"
mkdir -p "$work"
cd "$work"
unset LLAMA_ARG_KVQ
# An assertion is a failure here, not a case for the debugger that ggml starts.
export GGML_NO_BACKTRACE=1

# long COMMAND...: a test in its long form where that was asked for
long() { if [ -n "${KVQ_TEST_ALL:-}" ]; then "$@"; else KVQ_TEST_QUICK=1 "$@"; fi; }
mutations=${KVQ_TEST_ALL:+4000}

passed=0 failed=0 skipped=0
pass() { passed=$((passed + 1)); echo "ok      $1"; }
fail() { failed=$((failed + 1)); echo "FAILED  $1"; sed 's/^/        /' "$2" | tail -n "${3:-12}"; }
skip() { skipped=$((skipped + 1)); echo "SKIP    $1"; }

# check NAME COMMAND...: the command succeeds.
check() {
    local name=$1 rc=0
    shift
    "$@" >out.log 2>&1 </dev/null || rc=$?
    if ((rc == 0)); then pass "$name"; else echo "status $rc" >>out.log; fail "$name" out.log; fi
}

# refused NAME PATTERN COMMAND...: the command fails by itself (no signal, no assertion) and says PATTERN in one line.
refused() {
    local name=$1 pattern=$2 rc=0 lines
    shift 2
    "$@" >out.log 2>&1 </dev/null || rc=$?
    lines=$(grep -c -E -- "$pattern" out.log || true)
    echo "status $rc; $lines lines with: $pattern; expected one" >>out.log
    if ((rc < 1 || rc >= 124 || lines != 1)) ||
        grep -q -E 'GGML_ASSERT|GGML_ABORT|terminate called|panicked' out.log; then
        fail "$name" out.log
    else
        pass "$name"
    fi
}

completion() { timeout 300 "$bin/llama-completion" -m "$model" -t 2 --temp 0 -no-cnv --no-warmup -lv 4 "$@"; }
# Token probabilities as 16-bit numbers, of 511 positions of each of two contexts: what "the same output" means below.
probabilities() {
    local programs=$1 file=$2
    shift 2
    "$programs/llama-perplexity" -m "$model" -f "$text" -t 2 -fa on -c 1024 -b 1024 -ub 64 --chunks 2 "$@" \
        --kl-divergence-base "$file"
}
checks() { python3 -B "$root/patches/checks.py" "$@"; }
prompt=$(head -c 2600 "$text")

echo "== kvq off"
probabilities "$bin" plain.dat >plain.log 2>&1 </dev/null || fail "llama-perplexity without kvq" plain.log
same_when_off() {
    "$@" >off.log 2>&1 && cmp plain.dat off.dat && ! grep 'kvq: ' off.log
}
for off in off none 0; do
    check "--kvq $off gives the output of no option, and no line on kvq" same_when_off \
        probabilities "$bin" off.dat --kvq "$off" -lv 4
done
by_variable() { LLAMA_ARG_KVQ=$1 probabilities "$bin" off.dat -lv 4; }
for off in off none 0 ''; do
    check "LLAMA_ARG_KVQ='$off' gives the output of no option, and no line on kvq" same_when_off by_variable "$off"
done
if [ -x "$stock/llama-perplexity" ]; then
    same_as_stock() {
        probabilities "$stock" stock.dat "$@" && probabilities "$bin" off.dat --kvq off "$@" && cmp stock.dat off.dat
    }
    check "--kvq off gives the bits of unpatched llama.cpp, f16" same_as_stock
    check "--kvq off gives the bits of unpatched llama.cpp, q8_0" same_as_stock -ctk q8_0 -ctv q8_0
else
    skip "comparison with unpatched llama.cpp: no $stock/llama-perplexity (patches/build.sh --stock)"
fi
differs_when_on() { probabilities "$bin" on.dat --kvq skvq:k=2,v=2 && ! cmp -s plain.dat on.dat; }
check "--kvq on gives another output" differs_when_on

echo "== programs"
says_kvq() { "$@" >said.log 2>&1; grep -E 'kvq: skvq.* bits per value of K' said.log || { cat said.log; return 1; }; }
check "llama-completion --kvq skvq, and its line on bits and MiB" says_kvq \
    completion --kvq skvq -c 1024 -n 16 -p "$prompt"
by_variable() { LLAMA_ARG_KVQ=skvq says_kvq completion -c 1024 -n 4 -p "$prompt"; }
check "llama-completion with LLAMA_ARG_KVQ=skvq" by_variable
repeats() {
    completion --kvq skvq:k=3,v=3 -c 1024 -n 48 -p "$prompt" 2>/dev/null >first.txt
    completion --kvq skvq:k=3,v=3 -c 1024 -n 48 -p "$prompt" 2>/dev/null >second.txt
    cmp first.txt second.txt && [ "$(wc -c <first.txt)" -gt 2650 ]
}
check "llama-completion gives the same text twice" repeats
check "llama-completion beyond its context (K-shift)" \
    completion --kvq skvq -c 512 -n 600 --context-shift --ignore-eos -p "The river"
check "llama-perplexity, eight sequences at once" probabilities "$bin" many.dat --kvq skvq -c 256 -b 2048
check "llama-bench -kvq off,skvq,skvq:k=3,v=2" checks bench "$bin" "$model"
check "llama-server, two requests at once" checks completions "$bin" "$model" skvq server.log
check "llama-server says once what it got" [ "$(grep -c 'kvq: skvq: .* bits per value of K' server.log)" = 1 ]
for widths in k=2,v=2 k=3,v=2 k=3,v=3 k=4,v=4 k=8,v=8; do
    check "skvq:$widths makes a cache" says_kvq completion --kvq "skvq:$widths" -c 512 -n 2 -p x
done

# Two contexts are one recipe: one warning. Without rotation or factors two bits spoil this model.
warned() {
    probabilities "$bin" guard.dat --kvq "$1" >guard.log 2>&1 && [ "$(grep -c 'does not fit this model' guard.log)" = "$2" ]
}
check "a recipe that does not fit the model is told once" warned skvq:paper 1
check "one that fits is not" warned kivi:k=3,v=3 0
fit_is_listed() { completion --kvq skvq -c 1024 -n 2 -p "$prompt" 2>&1 | grep -c 'packed keys add noise of' | grep -x 4; }
check "-lv 4 lists how far the keys of each layer are off" fit_is_listed

echo "== names and help"
names="on 2 3 4 skvq kivi ott qaq aqua"
# Every name has a line of its own, on standard output; there is no model to load.
lists_names() {
    local name
    "$@" >help.txt 2>help.err </dev/null || return
    cat help.txt
    [ ! -s help.err ] || { cat help.err; return 1; }
    for name in $names; do
        grep -q -E "^  $name +[0-9.]+ / [0-9.]+ " help.txt || { echo "no line for $name"; return 1; }
    done
    grep -q 'off, none, 0' help.txt
}
for program in llama-completion llama-cli llama-server llama-perplexity; do
    check "$program --kvq help" lists_names "$bin/$program" --kvq help -m nosuch.gguf
done
check "llama-bench -kvq help" lists_names "$bin/llama-bench" -m nosuch.gguf -kvq help
check "LLAMA_ARG_KVQ=help" lists_names env LLAMA_ARG_KVQ=help "$bin/llama-completion" -m nosuch.gguf
refused "LLAMA_ARG_KVQ=help where it is no option" "kvq.*unknown recipe 'help'; known: on, .*--kvq help" \
    env LLAMA_ARG_KVQ=help "$bin/llama-bench" -m "$model" -p 8 -n 0 -r 1
refused "a wrong name: names and where they are explained" \
    "kvq: --kvq turbo: unknown recipe 'turbo'; known: on, 2, 3, 4, skvq, kivi, ott, qaq, aqua .*--kvq help" \
    completion -c 512 -n 1 -p x --kvq turbo

# says_once PATTERN COMMAND...: at the program's default verbosity, PATTERN stands in one line of standard error, no
# other line is kvq's, none is on standard output, and no line says that the cache is f16.
kvq_lines=1
says_once() {
    local pattern=$1 rc=0
    shift
    "$@" >said.out 2>said.err </dev/null || rc=$?
    grep 'kvq' said.out said.err || true
    ((rc == 0)) || { echo "status $rc"; tail -n 5 said.err; return 1; }
    [ "$(grep -c -E -- "kvq: $pattern" said.err)" = 1 ] && [ "$(grep -c 'kvq: ' said.err)" = "$kvq_lines" ] &&
        ! grep -q 'kvq: ' said.out && ! grep -q 'K (f16)' said.err
}
size='[0-9.]+ bits per value of K, [0-9.]+ of V; [0-9.]+ MiB with the exact rows'
smaller="$size, [0-9.]+x smaller than f16\$"
plain_completion() { timeout 300 "$bin/llama-completion" -m "$model" -t 2 --temp 0 -no-cnv --no-warmup "$@"; }
for name in on 2 3 4; do
    check "llama-completion --kvq $name says what it stands for" says_once "$name = [a-z]+:[^ ]*: $smaller" \
        plain_completion --kvq "$name" -c 2048 -n 1 -p x
done
check "changes after a name" says_once "2:window=64 = [a-z]+:[^ ]*window=64: $smaller" \
    plain_completion --kvq 2:window=64 -c 2048 -n 1 -p x
# With packed pages, so that figures of the layers could be listed: they are for -lv 4.
check "a method stands for itself" says_once "skvq:k=4: $smaller" \
    plain_completion --kvq skvq:k=4 -c 1024 -n 2 -p "$prompt"
check "the fitting step adds no line" says_once "on = .*$smaller" plain_completion --kvq on -fit on -n 1 -p x
quiet() { says_once "$@" || return; ! grep -q 'llama_kv_cache' said.err; }
check "llama-cli shows it among errors only" quiet "on = .*$smaller" \
    timeout 60 "$bin/llama-cli" -m "$model" -t 2 --kvq on -c 2048 -n 1 -p x -st --simple-io
check "llama-perplexity" says_once "on = .*$smaller" probabilities "$bin" on.dat --kvq on
bench_json() {
    says_once "on = .*$smaller" "$bin/llama-bench" -m "$model" -t 2 -p 1024 -n 0 -r 1 -kvq on -o json && python3 -m json.tool said.out
}
check "llama-bench, and its JSON stays JSON" bench_json
check "llama-bench that fits parameters" says_once "on = .*$smaller" \
    "$bin/llama-bench" -m "$model" -t 2 -p 1024 -n 0 -r 1 -kvq on -fitt 100
says_nothing() { "$@" >said.log 2>&1 && ! grep 'kvq' said.log; }
check "-lv 0 shows nothing" says_nothing plain_completion --kvq on -c 2048 -n 1 -p x -lv 0
stock_line() { completion --kvq on -c 2048 -n 1 -p x 2>&1 | grep -E 'llama_kv_cache: size = .*K \(kvq\).*V \(kvq\)'; }
check "llama.cpp's own line does not call it f16" stock_line
small_cache() {
    kvq_lines=2 says_once '256 cells have room for window=64 instead of 256, page=64 instead of 256$' "$@" &&
        grep -E "kvq: skvq.*$smaller" said.err
}
check "a small cache has less, says so, and is smaller than f16" small_cache \
    plain_completion --kvq skvq:window=256,page=256 -c 256 -n 1 -p x

echo "== refusals"
refused "an unknown recipe" 'kvq.*nosuch' completion -c 512 -n 1 -p x --kvq nosuch
refused "an unknown key" 'kvq.*colour' completion -c 512 -n 1 -p x --kvq skvq:colour=3
refused "a width out of range" 'kvq.*\bk\b' completion -c 512 -n 1 -p x --kvq skvq:k=99
refused "an empty value" 'kvq.*\bk\b' completion -c 512 -n 1 -p x --kvq skvq:k=
refused "a bad recipe in LLAMA_ARG_KVQ" 'kvq.*nosuch' \
    env LLAMA_ARG_KVQ=nosuch "$bin/llama-completion" -m "$model" -n 1 -p x
refused "a bad recipe in llama-bench" 'kvq.*nosuch' "$bin/llama-bench" -m "$model" -p 8 -n 0 -r 1 -kvq nosuch
refused "a bad recipe in llama-server" 'kvq.*nosuch' timeout 60 "$bin/llama-server" -m "$model" --port 0 --kvq nosuch
refused "-ctk q8_0 beside --kvq" 'kvq.*(cache types|-ctk)' completion -c 512 -n 1 -p x --kvq skvq -fa on -ctk q8_0
refused "-ctv q4_0 beside --kvq" 'kvq.*(cache types|-ctv)' completion -c 512 -n 1 -p x --kvq skvq -fa on -ctv q4_0
echo 'extern "C" unsigned kvq_abi_version() { return 999; }' | g++ -shared -fPIC -x c++ - -o other_abi.so
refused "a library of another ABI" 'kvq.*ABI 999' \
    env LD_PRELOAD="$work/other_abi.so" "$bin/llama-completion" -m "$model" -n 1 -p x --kvq skvq
checks odd_model odd.gguf
check "a model with heads of 40 runs without kvq" "$bin/llama-bench" -m odd.gguf -p 8 -n 0 -r 1 -t 2
refused "heads of 40" 'kvq.*40' "$bin/llama-bench" -m odd.gguf -p 8 -n 0 -r 1 -t 2 -kvq skvq

# shellcheck source=patches/tests/auto.sh
. "$root/patches/tests/auto.sh"

echo "== saved states"
save() { completion --kvq "$1" -c 1024 -n 1 -p "$prompt" --prompt-cache "$2"; }
continued() { completion --kvq "$1" -c 1024 -n 48 -p "$prompt" --prompt-cache "$2" --prompt-cache-ro; }
check "saving" save skvq:k=3,v=3 state.bin
restores() {
    continued skvq:k=3,v=3 state.bin >restored.txt 2>restored.log || return
    cmp first.txt restored.txt && grep 'exact match' restored.log
}
check "a restored state continues as the run that made it" restores
# A damaged state may be found out by llama.cpp's own checks or by kvq's; each says so in one line.
for how in "cut 0.2" "cut 0.5" "cut 0.99" "flip 0.0" "flip 0.05" "flip 0.3" "flip 0.5" "flip 0.7" "flip 0.95" \
    "flip 0.999"; do
    checks damage state.bin damaged.bin "$how"
    refused "a damaged state: $how" 'failed to load session file' continued skvq:k=3,v=3 damaged.bin
done
refused "a state of another recipe" 'failed to load session file' continued skvq:k=2,v=2 state.bin
refused "a kvq state without kvq" 'failed to load session file' continued off state.bin
saved_and_continued() { save 4 four.bin && continued auto:mem=1GiB four.bin 2>&1 | grep 'exact match'; }
check "a state of the recipe that auto chooses" saved_and_continued
check "saving without kvq" save off plain.bin
refused "a state without kvq" 'failed to load session file' continued skvq:k=3,v=3 plain.bin

echo "== profiles"
# Made from the end of the text, of whose beginning everything else here makes use.
tail -c 48000 "$text" >calibration.txt
calibrate() { timeout 300 "$bin/llama-kvq-calibrate" -m "${3:-$model}" -f "$2" -o "$1" -c 1024 --chunks 8 -t 2; }
check "llama-kvq-calibrate" calibrate tiny.kvq.gguf calibration.txt
the_same_twice() { calibrate again.kvq.gguf calibration.txt && cmp tiny.kvq.gguf again.kvq.gguf; }
check "the same text gives the same bytes" the_same_twice
another_text() { calibrate other.kvq.gguf "$text" && ! cmp -s tiny.kvq.gguf other.kvq.gguf; }
check "another text does not" another_text
aqua=aqua:profile=tiny.kvq.gguf
check "llama-completion with a profile" says_once "$aqua: $smaller" plain_completion --kvq $aqua -c 1024 -n 8 -p "$prompt"
repeats_with_profile() {
    completion --kvq $aqua -c 1024 -n 48 -p "$prompt" 2>/dev/null >profile_1.txt
    completion --kvq $aqua -c 1024 -n 48 -p "$prompt" 2>/dev/null >profile_2.txt
    cmp profile_1.txt profile_2.txt && [ "$(wc -c <profile_1.txt)" -gt 2650 ]
}
check "the same text twice" repeats_with_profile
# With as many bytes.
divergence() {
    "$bin/llama-perplexity" -m "$model" -t 2 -c 1024 -b 1024 -ub 64 --kvq "$1" --kl-divergence-base plain.dat --kl-divergence 2>&1 |
        sed -n 's/^Mean  *KLD: *\([0-9.]*\).*/\1/p'
}
less_than_kivi() {
    local ours kivi
    ours=$(divergence $aqua) kivi=$(divergence kivi:k=2.25)
    echo "mean KLD $ours, kivi:k=2.25 $kivi"
    [ -n "$ours" ] && [ -n "$kivi" ] && awk "BEGIN { exit !($ours < 0.8 * $kivi) }"
}
check "less divergence than kivi:k=2.25" less_than_kivi
check "saving with a profile" save $aqua profile.bin
restores_with_profile() {
    continued $aqua profile.bin >restored.txt 2>restored.log && grep 'exact match' restored.log &&
        [ "$(wc -c <restored.txt)" -gt 2650 ]
}
check "a restored state goes on" restores_with_profile
swapped() { cp tiny.kvq.gguf kept.kvq.gguf && cp other.kvq.gguf tiny.kvq.gguf; }
check "a state where the profile has another name" continued aqua:profile=again.kvq.gguf profile.bin
check "putting another profile in its place" swapped
refused "a state of another profile" 'failed to load session file' continued $aqua profile.bin
mv kept.kvq.gguf tiny.kvq.gguf
with_profile() { completion -c 512 -n 1 -p x --kvq "$1"; }
refused "no profile" 'kvq: --kvq aqua: aqua needs profile=FILE: llama-kvq-calibrate -m' with_profile aqua
refused "no file" 'kvq: profile nosuch: No such file' with_profile aqua:profile=nosuch
refused "no GGUF" 'kvq: profile calibration.txt: it is no GGUF file, or cut short' with_profile aqua:profile=calibration.txt
refused "no profile but a model" 'kvq: profile .*: it is not what llama-kvq-calibrate writes' with_profile "aqua:profile=$model"
head -c 60000 tiny.kvq.gguf >cut.kvq.gguf
refused "a profile that is cut short" 'kvq: profile cut.kvq.gguf: .*cut short' with_profile aqua:profile=cut.kvq.gguf
checks damage tiny.kvq.gguf flipped.kvq.gguf "flip 0.7"
refused "a damaged profile" 'kvq: profile flipped.kvq.gguf: it is damaged' with_profile aqua:profile=flipped.kvq.gguf
refused "a profile of another model" 'kvq: profile tiny.kvq.gguf: it is of a llama model of 4 layers, this one is llama of 1' \
    "$bin/llama-bench" -m odd.gguf -p 8 -n 0 -r 1 -t 2 -kvq $aqua
refused "other RoPE settings" 'kvq: the profile was made with other RoPE settings' \
    completion -c 512 -n 1 -p x --kvq $aqua --rope-freq-base 77777
refused "a text that is too short" 'calibrate: short.txt has [0-9]+ tokens, fewer than a piece' \
    sh -c "head -c 200 calibration.txt >short.txt; '$bin/llama-kvq-calibrate' -m '$model' -f short.txt -o x.gguf"
refused "an option that is none" 'calibrate: --nosuch is no option' "$bin/llama-kvq-calibrate" --nosuch 1
refused "heads of 40 to be calibrated" 'kvq.*40' calibrate x.gguf calibration.txt odd.gguf

echo "== GPUs"
# A CUDA backend that is none: its memory is the host's, locked while it does not compute.
on_fake() { env LD_PRELOAD="$bin/fake_cuda.so" "$@"; }
fake_completion() { on_fake "$bin/llama-completion" -m "$model" -t 2 --temp 0 -no-cnv --no-warmup -lv 4 -fit off "$@"; }
if [ -e "$bin/fake_cuda.so" ]; then
    elsewhere='--no-kv-offload or -ngl 0$'
    refused "a GPU backend that is not CUDA" "kvq: .* layer 0 would be in ROCm0 memory, where kvq cannot attend: use $elsewhere" \
        env KVQ_FAKE_NAME=ROCm LD_PRELOAD="$bin/fake_cuda.so" "$bin/llama-completion" -m "$model" -fit off -n 1 -p x --kvq skvq
    refused "a CUDA backend without the patch" "kvq: .* in CUDA0 memory, whose backend was built without .*: rebuild it, or use $elsewhere" \
        env KVQ_FAKE_UNPATCHED=1 LD_PRELOAD="$bin/fake_cuda.so" "$bin/llama-completion" -m "$model" -fit off -n 1 -p x --kvq skvq
    refused "a library that cannot open the GPU" "kvq: .* in CUDA0 memory: .*; or use $elsewhere" \
        env KVQ_FAKE_DEVICE=own LD_PRELOAD="$bin/fake_cuda.so" "$bin/llama-completion" -m "$model" -fit off -n 1 -p x --kvq skvq
    for mode in row tensor; do
        refused "-sm $mode" 'kvq: layers cannot be split .*: use -sm layer$' fake_completion -n 1 -p x --kvq skvq -sm $mode
    done
    check "--no-kv-offload where a GPU would be refused" \
        env KVQ_FAKE_UNPATCHED=1 LD_PRELOAD="$bin/fake_cuda.so" "$bin/llama-completion" -m "$model" -fit off -no-cnv -n 4 -p x \
        --kvq skvq --no-kv-offload
    # What each device holds adds up to what the cache takes, to .01 MiB a figure.
    each_device() {
        fake_completion -c 8192 -n 1 -p x -ngl 3 --kvq on >devices.log 2>&1 && grep -E ' (CPU|CUDA0|with the exact rows).* MiB' devices.log || return
        awk '/kvq: on = / { sub(/.* of V; /, ""); total = $1 }
            / (CPU|CUDA0): 2 layers, pages / { n++; gsub(/[^0-9.]+/, " "); for (i = NF - 2; i <= NF; i++) sum += $i }
            END { exit !(n == 2 && total > 1 && (sum - total) ^ 2 <= 0.04 ^ 2) }' devices.log
    }
    check "-lv 4 lists pages, exact rows and outlier tokens of each device" each_device
    each_layer() {
        fake_completion -c 8192 -n 1 -p x -ngl 3 --kvq on -lv 5 2>&1 | grep 'attended to and stored by' | tee layers.log
        [ "$(grep -c -E 'layer [01]: attended to and stored by (scalar|avx2|avxvnni|avx512|amx): ' layers.log)" = 2 ] &&
            [ "$(grep -c -E 'layer [23]: attended to and stored by CUDA0: ' layers.log)" = 2 ]
    }
    check "-lv 5 lists who attends to each layer" each_layer
    # fake_text GPUS OPTION...: what the model says, with this many GPUs, in gpu.txt
    fake_text() {
        local n=$1
        shift
        KVQ_FAKE_GPUS=$n KVQ_FAKE_LOG=1 fake_completion --kvq skvq:k=3,v=3 -c 1024 -n 48 -p "$prompt" "$@" >gpu.txt 2>gpu.log ||
            { tail -n 20 gpu.log; return 1; }
        grep 'fake_cuda:' gpu.log
    }
    same_text() { fake_text "$@" && cmp first.txt gpu.txt; }
    check "all layers on one GPU give the text of the CPU" same_text 1 -ngl 99
    check "graphs are launched again" grep -q -E 'fake_cuda: [0-9]+ graphs, [1-9][0-9]+ of them again' gpu.log
    check "some layers on a GPU" same_text 1 -ngl 2
    check "layers split over two GPUs" same_text 2 -ngl 99
    check "all but the cache on a GPU" same_text 1 -ngl 99 --no-kv-offload
    check "a state saved without a GPU goes on with one" same_text 1 -ngl 99 --prompt-cache state.bin --prompt-cache-ro
    save_on_fake() { fake_completion --kvq skvq:k=3,v=3 -c 1024 -n 1 -p "$prompt" -ngl 99 --prompt-cache gpu.bin; }
    restores_from_gpu() {
        save_on_fake >/dev/null && continued skvq:k=3,v=3 gpu.bin >restored.txt 2>restored.log || return
        cmp first.txt restored.txt && grep 'exact match' restored.log
    }
    check "a state saved with a GPU goes on without one" restores_from_gpu
    profile_text() {
        KVQ_FAKE_GPUS=$1 fake_completion --kvq $aqua -c 1024 -n 48 -p "$prompt" "${@:2}" >gpu.txt 2>gpu.log ||
            { tail -n 20 gpu.log; return 1; }
        cmp profile_1.txt gpu.txt
    }
    check "a profile lies on each GPU" profile_text 2 -ngl 99
    check "a state saved with a profile goes on on a GPU" profile_text 1 -ngl 99 --prompt-cache profile.bin --prompt-cache-ro
    # The workspace is counted as well.
    in_breakdown() { fake_completion --kvq skvq -c 4096 -n 1 -p x -ngl 99 2>&1 | grep -E 'memory breakdown|CUDA0'; }
    check "memory breakdown" in_breakdown
    if [ -x "$bin/test_llama" ]; then
        for ngl in 99 2; do
            check "sequences, copies, shift, saved states, aborted graphs; $ngl layers on a GPU" \
                long on_fake env KVQ_TEST_NGL=$ngl "$bin/test_llama" "$model" skvq:k=8,v=8
        done
        check "aborted graphs that have given work to a GPU" on_fake env KVQ_TEST_NGL=99 KVQ_TEST_ON_CPU='blk\..*\.ffn_.*' \
            KVQ_TEST_QUICK=abort "$bin/test_llama" "$model" skvq:k=8,v=8
        check "the same with outlier tokens" long on_fake env KVQ_TEST_NGL=99 "$bin/test_llama" "$model" ott:k=4,v=8,skip-layers=0 0.01
        check "the same with a profile" long on_fake env KVQ_TEST_NGL=99 "$bin/test_llama" "$model" $aqua,k=4,v=8 0.01
        check "what is in saved states" on_fake env KVQ_TEST_NGL=99 "$bin/test_state" "$model" "${mutations:-300}"
        [ -z "${KVQ_TEST_ALL:-}" ] || check "K-shifts lose nothing" on_fake env KVQ_TEST_NGL=99 "$bin/test_shift" "$model" "$text" skvq:k=2,v=2
    fi
    check "llama-server on a GPU, two requests at once" on_fake env KVQ_TEST_NGL=99 \
        python3 -B "$root/patches/checks.py" completions "$bin" "$model" skvq gpu_server.log
else
    skip "layers in GPU memory: no fake_cuda.so (patches/build.sh --tests)"
fi

echo "== requests again"
for recipe in kivi ott on; do
    check "A, A, B, A: $recipe" python3 -B "$root/patches/checks.py" repeated "$bin" "$model" $recipe "$text" repeated.log
done

echo "== soak"
check "a minute of everything at once, beside f16" "$root/patches/soak.py" --bin "$bin" --minutes 1 -o soak

echo "== LLAMA_CPP_DIR"
if [ -d "$root/build/stock/llama.cpp" ] && command -v git >/dev/null; then
    as_git() { git -c user.name=test -c user.email=test@example.invalid -C checkout "$@"; }
    make_checkout() {
        cp -r "$root/build/stock/llama.cpp" checkout && rm -rf checkout/.git checkout/.kvq-stamp && as_git init -q &&
            sed -i 's/^\(set(GGML_VERSION_PATCH\) .*/\1 999)/' checkout/ggml/CMakeLists.txt &&
            as_git add -A -f && as_git commit -q -m "llama.cpp"
    }
    tree() { KVQ_BUILD="$work/of_checkout" LLAMA_CPP_DIR="$work/checkout" "$root/patches/build.sh" --tree; }
    patched_copy() {
        tree >said.log 2>&1 || { cat said.log; return 1; }
        cat said.log
        grep -F "WARNING: LLAMA_CPP_DIR is commit $(as_git rev-parse HEAD), ggml" said.log | grep -F .999 &&
            grep -q get_kvq of_checkout/llama.cpp/src/llama-graph.cpp
    }
    unmodified() { local changes; changes=$(as_git status --porcelain --ignored) && [ -z "$changes" ]; }
    check "making a checkout with another commit and version" make_checkout
    check "it is copied, patched and warned of" patched_copy
    check "it is not modified" unmodified
    # As crates carry it.
    library_only() {
        cp -r checkout library && rm -rf library/.git library/tools library/common &&
            KVQ_BUILD="$work/of_library" LLAMA_CPP_DIR="$work/library" "$root/patches/build.sh" --tree >said.log 2>&1 || { cat said.log; return 1; }
        cat said.log
        [ "$(grep -c 'is left out: this tree has none of the files' said.log)" = 2 ] && grep -q get_kvq of_library/llama.cpp/src/llama-graph.cpp
    }
    check "a tree without programs is patched, and told so" library_only
    library_programs() { KVQ_BUILD="$work/of_library" LLAMA_CPP_DIR="$work/library" "$root/patches/build.sh"; }
    refused "programs of a tree that has none" 'error: this llama.cpp has no programs' library_programs
    moved_seam() {
        cp -r checkout moved && rm -rf moved/.git && sed -i 's/v_heads\[s\] = 0;/v_heads[s] = 1;/' moved/src/llama-kv-cache.cpp
        "$root/patches/check.sh" moved
    }
    refused "a seam that has moved is named" 'MOVED +src/llama-kv-cache.cpp: llama_kv_cache::clear: ' moved_seam
else
    skip "LLAMA_CPP_DIR: no build/stock/llama.cpp (patches/build.sh --stock) or no git"
fi

echo "== quality"
check "mean KLD against stock q4_0" checks bars "$bin" "$work/bars" "$model" "$text"
tail -n 8 out.log

echo "== llama.cpp's API, and every architecture of llama.cpp"
if [ -x "$bin/test_llama" ] && [ -x "$bin/test-llama-archs" ]; then
    check "sequences, copies, shift, saved states" "$bin/test_llama" "$model" skvq:k=8,v=8
    # Keys of 4 bits on every layer: ten times the error that 8 bits may have.
    check "the same with outlier tokens" long "$bin/test_llama" "$model" ott:k=4,v=8,skip-layers=0 0.01
    check "the same with widths by attention" long "$bin/test_llama" "$model" qaq:bits=3.5 0.01
    check "the same with a profile" long "$bin/test_llama" "$model" $aqua,k=4,v=8 0.01
    check "saved states: what is in them, and those that nobody saved" "$bin/test_state" "$model"
    check "64 K-shifts lose nothing" "$bin/test_shift" "$model" "$text" skvq:k=2,v=2 ott:k=2.25
    # Small random models, one of each architecture. Status 2: refused, with a reason; that is right for some.
    mkdir -p archs
    check "making the models" "$bin/test-llama-archs" -o archs
    # A cache of the layers with a sliding window and one of the others; the first is small and says so in a second line.
    kvq_lines=2 check "one line for a model with two caches" says_once \
        "on = .*$size \(full attention [0-9.]+ MiB for 4096 cells, sliding window [0-9.]+ MiB for [0-9]+ cells\), " \
        "$bin/llama-bench" -m archs/gemma3-dense.gguf -t 2 -p 4096 -n 0 -r 1 -kvq on
    # Both count: with one of them forgotten, more bits would fit.
    kvq_lines=2 check "auto counts both caches" auto_counts_both archs/gemma3-dense.gguf
    for kv in skvq kivi:k=2.25 qaq; do
        check "llama-server, sliding window, two slots in one cache: $kv" \
            checks swa_server "$bin" archs/gemma3-dense.gguf "$kv"
    done
    test_arch() { KVQ_TEST_QUICK=1 timeout 300 "$bin/test_llama" "$1" "$2" 0.02; }
    refusals=0
    for arch in archs/*.gguf; do
        name=$(basename "$arch" .gguf)
        rc=0
        test_arch "$arch" skvq:k=8,v=8 >out.log 2>&1 || rc=$?
        if ((rc == 0)); then
            pass "$name"
        elif ((rc == 2)); then
            refusals=$((refusals + 1))
            echo "refused $name: $(tail -n 1 out.log)"
        elif ! test_arch "$arch" off >/dev/null 2>&1; then
            # Some random models cannot take the positions of the test, or a shift, whatever their cache is.
            skip "$name: fails in llama.cpp itself, without kvq"
        else
            echo "status $rc" >>out.log
            fail "$name" out.log
        fi
    done
    check "no more than 22 architectures are refused: $refusals" [ "$refusals" -le 22 ]
else
    skip "API and architectures: no test_llama and test-llama-archs (patches/build.sh --tests)"
fi

echo "$passed passed, $failed failed, $skipped skipped"
((failed == 0))
