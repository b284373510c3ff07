#!/usr/bin/env -S python3 -B
"""Pass-key retrieval: five digits hidden in a long text, asked for at its end, answered out of each KV cache.

    patches/passkey.py -m MODEL.gguf -f FILLER.txt [-n 60] [--min 500] [--max 3500] [-o build/eval/passkey] RECIPE...

Every cache (f16, q4_0 and the recipes) gets the same seeded prompts: lengths spread evenly over min..max tokens, the
key at depths 5 % to 95 %. Greedy, ubatches of 64 tokens, no prompt cache. Needs a model that answers such prompts with
f16.
"""

import argparse
import collections
import contextlib
import csv
import json
import pathlib
import random
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from models import find_model
from runs import ROOT, UBATCH, RunError, kv_args, markdown, note

HEAD = ("There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there. ")
KEY = " The pass key is {key}. Remember it. {key} is the pass key. "
TAIL = " What is the pass key? The pass key is"
DEPTHS = [0.05, 0.25, 0.5, 0.75, 0.95]

Prompt = collections.namedtuple("Prompt", "text key n_tokens depth")


class RefusedError(RunError):
    """llama-server answered that it will not."""


class Server:
    """One llama-server with one cache configuration."""

    def __init__(self, port, process):
        self.url = f"http://127.0.0.1:{port}"
        self.process = process

    def post(self, path, body):
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), head)
        try:
            # Half an hour: thousands of tokens on a busy machine.
            with urllib.request.urlopen(request, timeout=1800) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise RefusedError(f"llama-server {path}: {error} {error.read().decode('utf-8', 'replace')}") from None
        except OSError as error:
            raise RunError(f"llama-server {path}: {error}") from None

    def wait_ready(self, seconds=120):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, OSError):
                with urllib.request.urlopen(self.url + "/health", timeout=5):
                    return
            time.sleep(0.2)
        raise RunError(f"llama-server did not become ready (status {self.process.poll()})")

    def n_tokens(self, text):
        return len(self.post("/tokenize", {"content": text})["tokens"])

    def complete(self, prompt, n_predict):
        body = {"prompt": prompt, "n_predict": n_predict, "temperature": 0, "cache_prompt": False}
        return self.post("/completion", body)["content"]


@contextlib.contextmanager
def server(bin_dir, model, kv, n_ctx, log, threads=None, n_parallel=1, extra=()):
    """A llama-server for the length of a with block; its output goes to the file `log`. `extra` arguments win."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [pathlib.Path(bin_dir) / "llama-server", "-m", model, "--host", "127.0.0.1", "--port", str(port),
               "-c", str(n_ctx), "-np", str(n_parallel), "-cram", "0", "-ctxcp", "0", "--no-ui", *UBATCH, *kv_args(kv)]
    command += ["-t", str(threads)] if threads else []
    command += map(str, extra)
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        try:
            one = Server(port, process)
            try:
                one.wait_ready()
            except RunError as error:
                raise RunError(f"{error}; the end of {log}:\n" + "\n".join(log.read_text().splitlines()[-6:])) from None
            yield one
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def make_prompts(count, shortest, longest, filler, n_tokens):
    """Deterministic prompts of about the lengths asked for; n_tokens(text) counts with the model's own vocabulary."""
    paragraphs = [p for p in filler.split("\n") if p.strip()]
    sample = filler[:20000]
    per_character = n_tokens(sample) / len(sample)
    prompts = []
    for i in range(count):
        rng = random.Random(f"passkey {i}")
        key = str(rng.randrange(10000, 100000))
        wanted = shortest + (longest - shortest) * i // max(1, count - 1)
        depth = DEPTHS[i % len(DEPTHS)]
        budget = wanted - n_tokens(HEAD + KEY.format(key=key) + TAIL)
        at, chosen = rng.randrange(len(paragraphs)), []
        while True:
            paragraph = paragraphs[at % len(paragraphs)]
            budget -= len(paragraph) * per_character
            if budget < 0:
                break
            chosen.append(paragraph)
            at += 1
        split = round(depth * len(chosen))
        text = HEAD + "\n".join(chosen[:split]) + KEY.format(key=key) + "\n".join(chosen[split:]) + TAIL
        prompts.append(Prompt(text, key, n_tokens(text), depth))
    return prompts


def right_answers(one, kv, prompts):
    right = []
    for i, prompt in enumerate(prompts):
        digits = re.search(r"\d+", one.complete(prompt.text, 8))
        right.append(bool(digits) and digits.group().startswith(prompt.key))
        if (i + 1) % 10 == 0:
            note(f"{kv}: {sum(right)} of {i + 1} right")
    return right


def share(right, prompts, wanted):
    picked = [r for r, p in zip(right, prompts) if wanted(p)]
    return f"{sum(picked)}/{len(picked)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-f", "--file", required=True, type=pathlib.Path, help="text that hides the key")
    parser.add_argument("-n", "--count", type=int, default=60)
    parser.add_argument("--min", type=int, default=500)
    parser.add_argument("--max", type=int, default=3500)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--bin", default=ROOT / "build/llama/bin", help="folder of llama-server")
    parser.add_argument("-o", "--output", default=ROOT / "build/eval/passkey", type=pathlib.Path,
                        help="path without suffix")
    parser.add_argument("--at-least", type=float, default=0,
                        help="fail if a recipe has less than this share of f16's right answers")
    parser.add_argument("recipes", nargs="*", help="kvq recipes, as after --kvq")
    args = parser.parse_args()

    args.output.parent.mkdir(parents=True, exist_ok=True)
    # Lengths are estimated from characters, hence the margin.
    n_ctx = -(-(args.max * 11 // 10 + 64) // 256) * 256
    model = find_model(args.model)
    prompts, results = None, {}
    for kv in ["f16", "q4_0", *args.recipes]:
        with server(args.bin, model, kv, n_ctx, args.output.with_suffix(".log"), args.threads) as one:
            # Prompts depend on the vocabulary only, so the first server's count serves all.
            prompts = prompts or make_prompts(args.count, args.min, args.max, args.file.read_text(), one.n_tokens)
            note(f"{kv}: {len(prompts)} prompts of {prompts[0].n_tokens} to {prompts[-1].n_tokens} tokens")
            results[kv] = right_answers(one, kv, prompts)

    edges = [args.min + (args.max - args.min) * i // 3 for i in range(4)]
    thirds = [f"{low}-{high}" for low, high in zip(edges, edges[1:])]
    third_of = {id(p): min(2, i * 3 // len(prompts)) for i, p in enumerate(prompts)}
    rows = [[kv, share(right, prompts, lambda p: True)]
            + [share(right, prompts, lambda p, t=t: third_of[id(p)] == t) for t in range(3)]
            + [share(right, prompts, lambda p, d=d: p.depth == d) for d in DEPTHS] for kv, right in results.items()]
    table = markdown(["cache", "right", *[f"{t} tokens" for t in thirds], *[f"depth {d:.0%}" for d in DEPTHS]], rows)
    args.output.with_suffix(".md").write_text(table + "\n")
    with open(args.output.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cache", "n_tokens", "depth", "key", "right"])
        for kv, right in results.items():
            writer.writerows([kv, p.n_tokens, p.depth, p.key, int(r)] for p, r in zip(prompts, right))
    print(table)
    poor = [kv for kv in args.recipes if sum(results[kv]) < args.at_least * sum(results["f16"])]
    if poor:
        raise RunError(f"less than {args.at_least:.0%} of f16's right answers: {' '.join(poor)}")


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"passkey.py: error: {error}")
