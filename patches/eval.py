#!/usr/bin/env -S python3 -B
"""Quality of KV caches: KL divergence against f16 on given texts and contexts, as CSV and markdown.

    patches/eval.py -m MODEL.gguf -f TEXT [-f TEXT ...] [-c 2048,4096] [--chunks 6] [-o build/eval/NAME] RECIPE...

Stock q8_0 and q4_0 are always measured beside the recipes, and f16 without flash attention, which is the floor: nothing
can be seen below it. `bits` is what a packed value costs; the totals count the exact rows of a full context of 4 096 and of
32 768 tokens too. `/ q4_0` is the divergence as a share of stock q4_0's in the same run. --exact-weights turns the
model's weights into F32 first, which takes the floor away (see runs.py) and costs disk and time. Everything runs with
ubatches of 64 tokens, so that most of what is attended comes from packed rows.
Finished runs are kept in the folder of -o: a second call, or one with a further recipe, runs only what is new.
"""

import argparse
import csv
import pathlib
import sys

from runs import FLOOR, ROOT, RunError, Runs, markdown

FIELDS = ["text", "context", "cache", "bits", "bits_4k", "bits_32k", "mib", "ppl", "mean", "mean_error", "median", "p999",
          "same_top", "mean_ratio", "p999_ratio"]
TITLES = ["text", "context", "cache", "bits", "total at 4k", "at 32k", "MiB", "PPL", "mean KLD", "±", "median", "99.9 %", "same top %",
          "mean / q4_0", "99.9 % / q4_0"]
FORMATS = ["", "", "", ".2f", ".2f", ".2f", ".2f", ".3f", ".6f", ".6f", ".6f", ".4f", ".2f", ".3f", ".3f"]


def total_bits(runs, model, kv, n_ctx):
    """Bits per value of a full context of this length, exact rows and everything else counted."""
    return 16.0 * runs.cache_size(model, kv, n_ctx)["mib"] / runs.cache_size(model, "f16", n_ctx)["mib"]


def measure(runs, model, texts, contexts, chunks, caches):
    rows = []
    for text in texts:
        for n_ctx in contexts:
            group = []
            for kv in caches:
                size = runs.cache_size(model, kv, n_ctx)
                if n_ctx > size["n_ctx_train"]:
                    raise RunError(f"context {n_ctx}: the model was trained for {size['n_ctx_train']}")
                group.append({"text": text.name, "context": n_ctx, "cache": kv, **size,
                              "bits_4k": total_bits(runs, model, kv, 4096),
                              "bits_32k": total_bits(runs, model, kv, 32768),
                              **runs.divergence(model, text, kv, n_ctx, chunks)})
            stock = next(row for row in group if row["cache"] == "q4_0")
            for row in group:
                row["mean_ratio"] = row["mean"] / stock["mean"]
                row["p999_ratio"] = row["p999"] / stock["p999"]
            rows += group
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True, type=pathlib.Path)
    parser.add_argument("-f", "--file", required=True, action="append", type=pathlib.Path, help="may be given again")
    parser.add_argument("-c", "--contexts", default="2048", help="comma separated")
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--bin", default=ROOT / "build/llama/bin", help="folder of llama-perplexity")
    parser.add_argument("-o", "--output", default=ROOT / "build/eval/quality", type=pathlib.Path,
                        help="path without suffix")
    parser.add_argument("--exact-weights", action="store_true", help="measure with the weights as F32")
    parser.add_argument("--keep-base", action="store_true", help="keep the f16 probabilities (large) for later recipes")
    parser.add_argument("--at-most", default="", help="comma separated, for each recipe: fail if mean / q4_0 is above")
    parser.add_argument("recipes", nargs="*", help="kvq recipes, as after --kvq")
    args = parser.parse_args()

    runs = Runs(args.bin, args.output.parent, args.threads)
    contexts = [int(c) for c in args.contexts.split(",")]
    caches = [FLOOR, "q8_0", "q4_0", *args.recipes]
    model = runs.exact_weights(args.model) if args.exact_weights else args.model
    rows = measure(runs, model, args.file, contexts, args.chunks, caches)
    if not args.keep_base:
        runs.drop_base_logits()

    table = markdown(TITLES, [[format(row[f], spec) if row[f] is not None else "?" for f, spec in zip(FIELDS, FORMATS)]
                              for row in rows])
    args.output.with_suffix(".md").write_text(table + "\n")
    with open(args.output.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    print(table)
    for recipe, bar in zip(args.recipes, filter(None, args.at_most.split(","))):
        worst = max(row["mean_ratio"] for row in rows if row["cache"] == recipe)
        if not worst <= float(bar):
            raise RunError(f"{recipe}: {worst:.3f} of q4_0's divergence, at most {bar} allowed")


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"eval.py: error: {error}")
