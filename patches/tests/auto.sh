# The part of patches/integration.sh on --kvq auto; sourced there, where model, programs and checks are known.
# shellcheck shell=bash disable=SC2154

echo "== auto"
# The memory of a recipe in a context, as the log says it.
of_one() { plain_completion -c 8192 -n 1 -p x "$@" 2>&1; }
# Two sequences; the text is too short to be read, which llama-perplexity finds once it has a context.
of_two_streams() { "$bin/llama-perplexity" -m "$model" -f few.txt -t 2 -c 4096 -b 8192 "$@" 2>&1 || true; }
head -c 300 "$text" >few.txt
lines_of_kvq() { sed -n 's/.*kvq: /kvq: /p'; }
mib_of() { lines_of_kvq | sed -n 's/.* of V; \([0-9.]*\) MiB .*/\1/p'; }
# Where as much memory may be taken as a recipe takes, it is chosen, and takes that; the log rounds to .01 MiB.
each_fits() {
    local name mib said
    for name in 4 on 3 2; do
        mib=$("$1" --kvq $name | mib_of)
        said=$("$1" --kvq "auto:mem=$(awk "BEGIN { print $mib + 0.01 }")MiB" | lines_of_kvq) || return
        echo "$said"
        [[ $said == "kvq: auto:mem="*" = $name = "*" $mib MiB with the exact rows"*" would take "*" MiB" ]] || return
        [ "$(wc -l <<<"$said")" = 1 ] || return
    done
}
check "each recipe where it is the best that fits" each_fits of_one
check "the same where sequences have streams of their own" each_fits of_two_streams
f16_fits='f16 would fit as well, with 16.00 MiB$'
auto_smaller="$size, [0-9.]+x smaller than f16; $f16_fits"
check "no more bits than 4, and f16 is named" says_once "auto:mem=1GiB = 4 = [a-z]+:[^ ]*: $auto_smaller" \
    plain_completion --kvq auto:mem=1GiB -c 8192 -n 1 -p x
check "LLAMA_ARG_KVQ, and a key" says_once "auto:mem=1GiB,window=64 = 4:window=64 = [a-z]+:[^ ]*window=64: $auto_smaller" \
    env LLAMA_ARG_KVQ=auto:mem=1GiB,window=64 "$bin/llama-completion" -m "$model" -t 2 -no-cnv --no-warmup -c 8192 -n 1 -p x
bench_rows() {
    "$bin/llama-bench" -m "$model" -p 64 -n 0 -r 1 -t 2 -kvq off,auto:mem=1GiB,window=64,on >said.out 2>said.err || return
    cat said.out said.err
    grep -q ' auto:mem=1GiB,window=64 ' said.out && grep -q '^kvq: auto:mem=1GiB,window=64 = 4:window=64 = ' said.err
}
check "llama-bench -kvq auto" bench_rows
with_auto() { completion -c 8192 -n 1 -p x --kvq "$@"; }
says_kvq_of_auto() { with_auto "auto:$1" 2>&1 | grep "kvq: auto:$1 = "; }
refused "nothing fits" 'kvq: --kvq auto:mem=1MiB: no recipe fits into 1MiB: the smallest for this context, 2, takes [0-9.]+ MiB; use mem=[0-9]+MiB, a smaller context \(-c\)' \
    with_auto auto:mem=1MiB
check "the size that a refusal names is enough" \
    says_kvq_of_auto "mem=$(with_auto auto:mem=1MiB 2>&1 </dev/null | sed -n 's/.*use mem=\([0-9]*MiB\).*/\1/p' | head -n 1)"
for size_of in 0 0GiB abc 4 1e999GiB -1GiB 4GB; do
    refused "auto:mem=$size_of" "kvq: --kvq auto:mem=$size_of: mem=$size_of: use a size such as 512MiB" with_auto auto:mem=$size_of
done
refused "auto without a size" 'kvq: --kvq auto: auto needs the memory .* such as auto:mem=4GiB' with_auto auto
refused "auto with a key that no recipe has" "kvq: --kvq auto:mem=4GiB,colour=3: ott has no key 'colour'" with_auto auto:mem=4GiB,colour=3
refused "auto beside -ctk q8_0" 'kvq.*(cache types|-ctk)' with_auto auto:mem=4GiB -fa on -ctk q8_0
refused "heads of 40, with auto" 'kvq.*40' "$bin/llama-bench" -m odd.gguf -p 8 -n 0 -r 1 -t 2 -kvq auto:mem=4GiB
refused "auto in llama-bench" 'kvq.*no recipe fits into 1KiB' "$bin/llama-bench" -m "$model" -p 8 -n 0 -r 1 -kvq auto:mem=1KiB

# For a model with two caches, later on.
auto_counts_both() {
    local bench=("$bin/llama-bench" -m "$1" -t 2 -p 4096 -n 0 -r 1) mib
    mib=$("${bench[@]}" -kvq on 2>&1 | mib_of)
    says_once "auto:mem=.* = on = .*; $mib MiB with the exact rows \(full attention .*sliding window .*\).*; 4 would take [0-9.]+ MiB\$" \
        "${bench[@]}" -kvq "auto:mem=$(awk "BEGIN { print $mib + 0.01 }")MiB"
}
