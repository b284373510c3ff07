"""Runs the programs of a patched llama.cpp and reads their output; demo.py, eval.py, passkey.py and checks.py use it.

A KV cache is named by one word: `f16`, `q8_0`, `q4_0` (llama.cpp's own types, flash attention on), `f16/no-fa`, else a
kvq recipe. `f16/no-fa` shows the floor of every divergence: the same exact cache, summed in another order. That is not
zero, since llama.cpp rounds activations to 8 bits before it multiplies them with quantized weights: 0.0002 to 0.0003
with Q8_0 weights, 0.00001 with F32 ones.

Finished runs are kept by what decides their output (programs, model, text, arguments): a second call is instant.
llama.cpp's own caches are measured with the unpatched programs of patches/build.sh --stock where they are there, so that
those runs, the slowest of all, outlive a change of kvq.
"""

import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLOOR = "f16/no-fa"
STOCK_BITS = {"f16": 16.0, FLOOR: 16.0, "q8_0": 8.5, "q4_0": 4.5}
# Small ubatches: a token must meet packed rows, not the exact rows of its own large ubatch.
UBATCH = ["-b", "2048", "-ub", "64"]


class RunError(Exception):
    """A program failed; the text is what a user needs to see."""


def kv_args(kv):
    """Command line of llama-perplexity, llama-completion and llama-server for this cache."""
    if kv == FLOOR:
        return ["-fa", "off"]
    return ["-fa", "on", "-ctk", kv, "-ctv", kv] if kv in STOCK_BITS else ["--kvq", kv]


def note(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def markdown(header, rows):
    """A table that is also readable as plain text."""
    table = [header] + [[str(cell) for cell in row] for row in rows]
    width = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width[i]) if i == 0 else cell.rjust(width[i]) for i, cell in enumerate(row))
             + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(width)) + "|")
    return "\n".join(lines)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find(pattern, text, cast=float):
    match = re.search(pattern, text, re.MULTILINE)
    return cast(match.group(1)) if match else None


class Programs:
    """A folder of llama.cpp's programs and libraries; `digest` changes when any of them does."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        if not (self.folder / "llama-perplexity").exists():
            raise RunError(f"no llama-perplexity in {self.folder}: run patches/build.sh first")
        parts = sorted(p for p in self.folder.iterdir() if p.is_file() and p.name.startswith(("lib", "llama-")))
        self.digest = hashlib.sha256("".join(sha256(p) for p in parts).encode()).hexdigest()

    def version(self):
        """What llama.cpp says of its commit and compiler."""
        run = subprocess.run([self.folder / "llama-perplexity", "--version"], stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return run.stdout

    def stock(self):
        """The same llama.cpp without patches, as patches/build.sh --stock leaves it; these programs if it is not there
        or of another commit."""
        folder = self.folder.parent.parent / "stock/llama/bin"
        other = Programs(folder) if (folder / "llama-perplexity").exists() else self
        return other if other.version() == self.version() else self


class Runs:
    """`bin_dir`: llama.cpp's programs; `store`: where finished outputs and base logits are kept."""

    def __init__(self, bin_dir, store, threads=None):
        self.patched = Programs(bin_dir)
        self.stock = self.patched.stock()
        self.store = pathlib.Path(store)
        self.store.mkdir(parents=True, exist_ok=True)
        self.threads = ["-t", str(threads or os.cpu_count() or 2)]
        self.large_files = []

    def _kept(self, programs, program, args, inputs):
        """File that holds the output of this run. Inputs are known by size and time: models are large."""
        stats = [(str(p), os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in inputs]
        isa = os.environ.get("KVQ_ISA", "") if programs is self.patched else ""
        key = json.dumps([programs.digest, isa, program, args, stats])
        return self.store / (hashlib.sha256(key.encode()).hexdigest()[:24] + ".log")

    def _execute(self, programs, program, args):
        """Standard output alone for llama-bench, whose output is JSON, and with the messages for the others.

        Settings of llama.cpp in the environment are left out: LLAMA_ARG_KVQ would make stock caches kvq's."""
        apart = program == "llama-bench"
        env = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
        run = subprocess.run([programs.folder / program, *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE if apart else subprocess.STDOUT, env=env)
        text = run.stdout.decode("utf-8", "replace")
        if run.returncode != 0:
            said = run.stderr.decode("utf-8", "replace") if apart else text
            tail = "\n".join(said.splitlines()[-6:])
            raise RunError(f"{program} {' '.join(map(str, args))}\nfailed with status {run.returncode}:\n{tail}")
        return text

    def output(self, programs, program, args, inputs, what, before=None):
        """Output of one run, kept or fresh; `before` is called only when the program has to run."""
        args = [str(a) for a in args]
        kept = self._kept(programs, program, args, inputs)
        if kept.exists():
            return kept.read_text()
        if before:
            before()
        note(what)
        text = self._execute(programs, program, args)
        part = kept.with_suffix(".part")
        part.write_text(text)
        part.rename(kept)
        return text

    def cache_size(self, model, kv, n_ctx):
        """What a context of n_ctx tokens costs, MiB and effective bits per value, and the model's own context."""
        args = ["-m", model, *kv_args(kv), "-c", n_ctx, "-n", 1, "-p", "x", "-no-cnv", "--no-warmup", "-lv", 4]
        text = self.output(self.patched, "llama-completion", [*args, *self.threads], [model], f"{kv}: size at {n_ctx}")
        # One line for each cache: models with sliding windows have two.
        mib = [float(m) for m in re.findall(r"llama_kv_cache: size = +([\d.]+) MiB", text)]
        bits = STOCK_BITS.get(kv)
        if bits is None and (said := re.search(r"kvq: .* ([\d.]+) bits per value of K, ([\d.]+) of V", text)):
            bits = (float(said.group(1)) + float(said.group(2))) / 2
        if not mib or bits is None:
            raise RunError(f"{kv}: the log of llama-completion does not tell the size of its KV cache")
        return {"mib": sum(mib), "bits": bits, "n_ctx_train": find(r"n_ctx_train += (\d+)", text, int)}

    def exact_weights(self, model):
        """The model with its weights as F32. No digest of programs in its name: it is the same whoever makes it, and
        its time decides which runs of it are kept."""
        stat = os.stat(model)
        path = self.store / f"{pathlib.Path(model).stem}-{stat.st_size}-{stat.st_mtime_ns}-f32.gguf"
        if not path.exists():
            note(f"{pathlib.Path(model).name}: weights to F32")
            part = path.with_suffix(".part")
            self._execute(self.patched, "llama-quantize",
                          ["--allow-requantize", str(model), str(part), "F32", *self.threads[1:]])
            part.rename(path)
        return path

    def base_logits(self, model, text, n_ctx, chunks):
        """File with the token probabilities of the f16 cache, which every divergence is measured against."""
        args = ["-m", str(model), "-f", str(text), *UBATCH, *kv_args("f16"), "-c", str(n_ctx), "--chunks", str(chunks)]
        path = self._kept(self.stock, "base", args, [model, text]).with_suffix(".logits")
        part = path.with_suffix(".part")
        self.large_files += [path, part]

        def make():
            if path.exists():
                return
            note(f"f16: token probabilities of {pathlib.Path(text).name}, {chunks} x {n_ctx} tokens")
            self._execute(self.stock, "llama-perplexity", [*args, *self.threads, "--kl-divergence-base", str(part)])
            part.rename(path)
        return path, make

    def divergence(self, model, text, kv, n_ctx, chunks):
        """Perplexity and KL divergence of a cache against f16, over the second half of each chunk.

        Signs are dropped: the stored probabilities are rounded, which gives a few -0.000001."""
        path, make = self.base_logits(model, text, n_ctx, chunks)
        programs = self.stock if kv in STOCK_BITS else self.patched
        args = ["-m", model, *UBATCH, *kv_args(kv), "-c", n_ctx, "--kl-divergence-base", path, "--kl-divergence"]
        what = f"{kv}: KL divergence on {pathlib.Path(text).name}, context {n_ctx}"
        out = self.output(programs, "llama-perplexity", [*args, *self.threads], [model, text], what, before=make)
        result = {}
        for name, pattern in {"ppl": r"^Mean PPL\(Q\) *: +([\d.]+)", "mean": r"^Mean +KLD: +-?([\d.]+)",
                              "mean_error": r"^Mean +KLD: +-?[\d.]+ ± +([\d.]+)",
                              "median": r"^Median +KLD: +-?([\d.]+)", "p999": r"^99\.9% +KLD: +-?([\d.]+)",
                              "same_top": r"^Same top p: +([\d.]+)"}.items():
            result[name] = find(pattern, out)
            if result[name] is None:
                raise RunError(f"{kv}: llama-perplexity printed no '{name}'; is the text shorter than two contexts?")
        return result

    def drop_base_logits(self):
        """Base logits are large: 2 bytes for each word of the vocabulary and scored token, 65 MB for 1 023 tokens of a
        32 000 word vocabulary, half a gigabyte with Gemma's. Only what this object has asked for goes."""
        for path in self.large_files:
            path.unlink(missing_ok=True)
        self.large_files = []

    def speed(self, model, kv, depth, repetitions=3):
        """Median tokens per second behind `depth` tokens: (prompt of 512, decode)."""
        args = ["-m", model, "-p", 512, "-n", 32, "-d", depth, "-r", repetitions, "-o", "json", *self.threads]
        args += kv_args(kv) if kv in STOCK_BITS else ["-kvq", kv]
        out = self.output(self.patched, "llama-bench", args, [model], f"{kv}: speed at depth {depth}")
        tests = json.loads(out)
        median = [sorted(t["samples_ts"])[len(t["samples_ts"]) // 2] for t in tests]
        return {"prompt": median[0], "decode": median[1]}
