"""The table of patches/demo.sh: size, quality and speed of llama.cpp's KV caches beside kvq's."""

import argparse
import sys

from models import find_model
from runs import RunError, Runs, STOCK_BITS, markdown


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--model", required=True, help="a GGUF file or a name of models.py")
    parser.add_argument("--text", required=True)
    parser.add_argument("--chunks", type=int, required=True)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("caches", nargs="+")
    args = parser.parse_args()

    runs = Runs(args.bin, args.store)
    model = find_model(args.model)
    n_ctx = min(2048, runs.cache_size(model, "f16", 512)["n_ctx_train"])
    rows = []
    for kv in args.caches:
        here = runs.cache_size(model, kv, n_ctx)
        far = runs.cache_size(model, kv, 32768)
        quality = runs.divergence(model, args.text, kv, n_ctx, args.chunks)
        speed = runs.speed(model, kv, args.depth)
        rows.append([kv if kv not in STOCK_BITS else "stock " + kv, f"{here['bits']:.2f}", f"{here['mib']:.2f}",
                     f"{far['mib']:.1f}", f"{quality['ppl']:.2f}", f"{quality['mean']:.5f}", f"{quality['p999']:.4f}",
                     f"{quality['same_top']:.1f} %", f"{speed['prompt']:.0f}", f"{speed['decode']:.0f}"])
    runs.drop_base_logits()

    print(f"\nQuality: context {n_ctx}, {args.chunks} chunks, ubatches of 64, divergence (KLD) against f16.")
    print(f"Speed: tokens/s behind {args.depth} tokens, a prompt of 512 and decode; on a busy machine it means little.")
    print("Bits: of a packed value, with all metadata. MiB: everything. f16/no-fa: the floor of what KLD can show.\n")
    print(markdown(["KV cache", "bits", f"MiB at {n_ctx}", "MiB at 32768", "PPL", "mean KLD", "99.9 % KLD", "same top",
                    "prompt t/s", "decode t/s"], rows))


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"demo.sh: error: {error}")
