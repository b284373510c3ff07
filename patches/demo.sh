#!/usr/bin/env bash
# What kvq does to a model, in one table: builds what is needed, then measures stock f16, q8_0, q4_0 and kvq recipes.
#
#   patches/demo.sh [MODEL [TEXT]]     MODEL: a GGUF file, or smollm2, gemma3, qwen05, qwen15, which are fetched
#                                      (patches/models.py); default: the small model and text in models/
#
#   KVQ_RECIPES="on 2 skvq:k=4,v=4"   recipes, separated by blanks
#   KVQ_CHUNKS=6                     chunks of text that are scored; 2 for a model that is fetched
#   KVQ_DEPTH=4096                   tokens in the cache when speed is measured
#
# Finished results are kept in build/demo, so that a second run takes seconds.
set -euo pipefail
# shellcheck source=patches/lib.sh
. "$(dirname "$0")/lib.sh"

model=${1:-$root/models/tiny-12m-q8_0.gguf}
chunks=${KVQ_CHUNKS:-6}
text=${2:-$root/models/amazon-excerpt.txt}
read -r -a recipes <<<"${KVQ_RECIPES:-on 2 4 skvq kivi:k=2.25 ott:k=2.25 qaq:bits=2.25}"
# named MODEL: it is one of the table in models.py.
named() { grep -q -F "    \"$1\": Model(" "$root/patches/models.py"; }
if [ ! -f "$model" ]; then
    named "$model" || die "no such model: $model (a GGUF file, or smollm2, gemma3, qwen05, qwen15)"
    chunks=${KVQ_CHUNKS:-2}
fi
[ -f "$text" ] || die "no such text: $text"

"$root/patches/build.sh"
exec python3 -B "$root/patches/demo.py" --bin "$root/build/llama/bin" --store "$root/build/demo" \
    --model "$model" --text "$text" --chunks "$chunks" --depth "${KVQ_DEPTH:-4096}" \
    f16 f16/no-fa q8_0 q4_0 "${recipes[@]}"
