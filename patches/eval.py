#!/usr/bin/env -S python3 -B
"""Quality of KV caches: KL divergence against f16 on models, texts and contexts, as CSV and markdown.

    patches/eval.py -m smollm2 -m qwen05 [--chunks 2] [-o build/eval/NAME] RECIPE...
    patches/eval.py -m MODEL.gguf [-m ...] [-f TEXT ...] [-c 2048,4096] RECIPE...

A model is a GGUF file or a name of patches/models.py, which fetches it. Without -f the texts are prose
(models/amazon-excerpt.txt) and code (sources of this project, written to build/eval/code.txt).

Stock q8_0 and q4_0 are measured beside the recipes, and f16 without flash attention, which is the floor: nothing can be
seen below it (--stock leaves some out). `bits` is what a packed value costs; the totals count the exact rows of a full context of 4 096 and of
32 768 tokens too. `/ q4_0` is the divergence as a share of stock q4_0's in the same run. --exact-weights turns the
models' weights into F32 first, which takes the floor away (see runs.py) and costs disk and time. Everything runs with
ubatches of 64 tokens, so that most of what is attended comes from packed rows.
Finished runs are kept in the folder of -o: a second call, or one with a further recipe, runs only what is new.

A bar is `[MODEL:]BAR[,BAR...]`, one number for all recipes or one for each (none: an empty one); one with a model replaces
those without for that model. Every bar that is passed is named, and the exit status is 1:

    patches/eval.py -m smollm2 -m qwen05 --at-most .25,.4 --below .02 --below smollm2:.012 kivi:k=3,v=3 kivi:k=2.5
"""

import argparse
import csv
import pathlib
import sys

import texts
from models import MODELS, find_model
from results import provenance
from runs import FLOOR, ROOT, RunError, Runs, markdown

FIELDS = ["model", "text", "context", "cache", "bits", "bits_4k", "bits_32k", "mib", "ppl", "mean", "mean_error", "median",
          "p999", "same_top", "mean_ratio", "p999_ratio"]
TITLES = ["model", "text", "context", "cache", "bits", "total at 4k", "at 32k", "MiB", "PPL", "mean KLD", "±", "median",
          "99.9 %", "same top %", "mean / q4_0", "99.9 % / q4_0"]
FORMATS = ["", "", "", "", ".2f", ".2f", ".2f", ".2f", ".3f", ".6f", ".6f", ".6f", ".4f", ".2f", ".3f", ".3f"]


def name_of(model):
    """What a model is called in results: its name, or its file's."""
    return model if model in MODELS else pathlib.Path(model).stem


def total_bits(runs, model, kv, n_ctx):
    """Bits per value of a full context of this length, exact rows and everything else counted."""
    return 16.0 * runs.cache_size(model, kv, n_ctx)["mib"] / runs.cache_size(model, "f16", n_ctx)["mib"]


def measure(runs, model, text, n_ctx, chunks, caches):
    """A row for each cache."""
    rows = []
    for kv in caches:
        size = runs.cache_size(model, kv, n_ctx)
        if n_ctx > size["n_ctx_train"]:
            raise RunError(f"context {n_ctx}: the model was trained for {size['n_ctx_train']}")
        rows.append({"text": text.name, "context": n_ctx, "cache": kv, **size,
                     "bits_4k": total_bits(runs, model, kv, 4096), "bits_32k": total_bits(runs, model, kv, 32768),
                     **runs.divergence(model, text, kv, n_ctx, chunks)})
    stock = next(row for row in rows if row["cache"] == "q4_0")
    for row in rows:
        row["mean_ratio"] = row["mean"] / stock["mean"]
        row["p999_ratio"] = row["p999"] / stock["p999"]
    return rows


def measure_all(runs, args, paths):
    rows = []
    for model in args.model:
        path = runs.exact_weights(paths[model]) if args.exact_weights else paths[model]
        for text in args.file:
            for n_ctx in map(int, args.contexts.split(",")):
                try:
                    group = measure(runs, path, text, n_ctx, args.chunks, [*args.stock.split(","), *args.recipes])
                finally:
                    if not args.keep_base:
                        runs.drop_base_logits()
                rows += [{"model": name_of(model), **row} for row in group]
    return rows


def read_bars(specs, models, recipes):
    """{(model, recipe): bar}, from `[MODEL:]BAR[,BAR...]`; those with a model come last and win."""
    bars = {}
    for spec in sorted(specs, key=lambda s: ":" in s):
        model, numbers = spec.rsplit(":", 1) if ":" in spec else (None, spec)
        numbers = numbers.split(",")
        if model not in [None, *models]:
            raise RunError(f"bar {spec}: no model {model} here, only {', '.join(models)}")
        if len(numbers) == 1:
            numbers *= len(recipes)
        if len(numbers) != len(recipes):
            raise RunError(f"bar {spec}: {len(numbers)} numbers for {len(recipes)} recipes; one, or one for each")
        try:
            here = {recipe: float(number) for recipe, number in zip(recipes, numbers) if number}
        except ValueError:
            raise RunError(f"bar {spec}: not a number") from None
        for name in [model] if model else models:
            bars.update({(name, recipe): bar for recipe, bar in here.items()})
    return bars


def over_bars(rows, bars, field, what):
    """A line for each model and recipe whose worst row is over its bar."""
    lines = []
    for (model, recipe), bar in bars.items():
        worst = max((row for row in rows if row["model"] == model and row["cache"] == recipe), key=lambda row: row[field])
        if not worst[field] <= bar:
            lines.append(f"{model}, {worst['text']}, {recipe}: {worst[field]:.4f} {what}, at most {bar:g} allowed")
    return lines


def write(output, rows):
    """CSV, whose head says where it comes from, and markdown; returns the latter."""
    table = markdown(TITLES, [[format(row[f], spec) for f, spec in zip(FIELDS, FORMATS)] for row in rows])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".md").write_text(table + "\n")
    with open(output.with_suffix(".csv"), "w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in provenance().items())
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return table


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True, action="append", help="a path or a name; may be given again")
    parser.add_argument("-f", "--file", action="append", type=pathlib.Path, help="may be given again")
    parser.add_argument("-c", "--contexts", default="2048", help="comma separated")
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--bin", default=ROOT / "build/llama/bin", help="folder of llama-perplexity")
    parser.add_argument("-o", "--output", default=ROOT / "build/eval/quality", type=pathlib.Path,
                        help="path without suffix")
    parser.add_argument("--stock", default=f"{FLOOR},q8_0,q4_0", help="comma separated, q4_0 among them: what to measure beside")
    parser.add_argument("--exact-weights", action="store_true", help="measure with the weights as F32")
    parser.add_argument("--keep-base", action="store_true", help="keep the f16 probabilities (large) for later recipes")
    parser.add_argument("--at-most", default=[], action="append", help="bars on mean / q4_0")
    parser.add_argument("--below", default=[], action="append", help="bars on the mean KLD")
    parser.add_argument("recipes", nargs="*", help="kvq recipes, as after --kvq")
    return parser.parse_args()


def main():
    args = arguments()
    names = [name_of(model) for model in args.model]
    # Before anything runs: what is wrong with the arguments, or cannot be fetched.
    bars = [(read_bars(args.at_most, names, args.recipes), "mean_ratio", "of q4_0's mean KLD"),
            (read_bars(args.below, names, args.recipes), "mean", "mean KLD")]
    runs = Runs(args.bin, args.output.parent, args.threads)
    paths = {model: find_model(model) for model in args.model}
    args.file = args.file or [texts.PROSE, texts.code()]
    rows = measure_all(runs, args, paths)
    print(write(args.output, rows))
    over = [line for each in bars for line in over_bars(rows, *each)]
    if over:
        raise RunError("over the bar:\n" + "\n".join(over))


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"eval.py: error: {error}")
