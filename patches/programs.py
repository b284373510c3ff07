#!/usr/bin/env -S python3 -B
"""Runs llama.cpp's own tests and programs on the small model with a kvq cache, and writes the table of what was asked of them.

    patches/programs.py                                       all of them, beside an f16 cache: a minute
    patches/programs.py --only llama-lookup                   those whose names contain that
    patches/programs.py --check docs/results/programs.csv     fails as well if that table is not what ran
    patches/programs.py -o FILE.csv                           writes the table
    patches/programs.py --targets                             what patches/build.sh --tests has to build, no more

Programs get the cache through LLAMA_ARG_KVQ, so that it makes no difference whether they know --kvq. Each must end with
status 0, say once in its log what the cache is, and give what is asked; refused ones say why in one line.
"""

import argparse
import collections
import csv
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time

import programs_server
from results import head_and_lines, provenance
from runs import ROOT, RunError, find

# The preset of the most bits: at 4 the small model says what it says with f16.
KV = "4"
# Where the small model is of two minds, as after the short questions of llama-parallel.
KV_8_BITS = "skvq:k=8,v=8"
# With its weights as F32: with weights of 8 bits llama.cpp rounds activations to 8 bits as well, which makes of sums in another order
# (flash attention or not; rows in other slots) other answers, with f16 too.
SMALL = ROOT / "models/tiny-12m-q8_0.gguf"
TEXT = ROOT / "models/amazon-excerpt.txt"
FIELDS = ["program", "run", "asked", "found"]

Case = collections.namedtuple("Case", "program run asked check")
CASES = []


def case(program, run, asked):
    """Registers a check. It returns nothing and raises RunError, or returns "refused"."""
    def register(check):
        CASES.append(Case(program, run, asked, check))
        return check
    return register


class Bench:
    """The programs and the folder in which they run."""

    def __init__(self, folder, work):
        self.folder, self.work, self.kv, self.model = folder, work, KV, work / "f32.gguf"
        self.text = TEXT.read_text(errors="replace")
        self.prompt = self.text[:2600]

    def run(self, kv, program, *args, status=0, model=""):
        """Standard output and the log of one run. With a kvq cache the log must say so, with f16 it must not."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
        # An assertion is a failure here, not a case for the debugger that ggml starts.
        env["GGML_NO_BACKTRACE"] = "1"
        if kv != "f16":
            env["LLAMA_ARG_KVQ"] = kv
        model = self.model if model == "" else model
        command = [self.folder / program, *(["-m", model] if model else []), *map(str, args)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=self.work,
                              text=True, errors="replace", timeout=300)
        out = re.sub("\x1b\\[[0-9;]*m", "", done.stdout)
        log = out + done.stderr
        (self.work / f"{program}-{kv.split(':')[0]}.log").write_text(log)
        tail = "\n".join(log.splitlines()[-12:])
        if (done.returncode != 0) != (status != 0) or done.returncode < 0:
            raise RunError(f"status {done.returncode} with {kv}:\n{tail}")
        if status == 0 and model and ("bits per value of K" in log) != (kv != "f16"):
            raise RunError(f"with {kv} the log says the wrong thing on kvq:\n{tail}")
        return out, log

    def same(self, program, *args, kv=KV, at_least=20):
        """Asks for the standard output of f16, and that there is one."""
        exact, packed = [self.run(one, program, *args)[0] for one in ("f16", kv)]
        if exact != packed or len(exact) < at_least:
            raise RunError(f"f16 says {exact[-300:]!r}, {kv} says {packed[-300:]!r}")

    def file(self, name, content):
        path = self.work / name
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
        return path


def close(what, exact, packed, share):
    print(f"  {what}: f16 {exact}, {KV} {packed}")
    if exact is None or packed is None or not abs(packed - exact) <= share * abs(exact):
        raise RunError(f"{what}: f16 {exact}, {KV} {packed}")


# The small model is faster so, and on a busy machine many times.
THREADS = ["-t", "1"]
GREEDY = [*THREADS, "--temp", "0"]


@case("test-save-load-state", "all nine tests on 592 tokens", "All tests passed")
def save_load_state(on):
    _, log = on.run(KV, "test-save-load-state", *THREADS, "-f", on.file("prompt.txt", on.prompt), "-c", 2048, "-b", 1024,
                    "-ub", 64)
    if "All tests passed." not in log:
        raise RunError(log[-600:])


@case("test-state-restore-fragmented", "as upstream runs it", "SUCCESS")
def state_restore_fragmented(on):
    _, log = on.run(KV, "test-state-restore-fragmented", *THREADS)
    if "SUCCESS - state restore works" not in log:
        raise RunError(log[-600:])


@case("test-thread-safety", "two models of two contexts, as many threads", "all threads give the text that f16 gives")
def thread_safety(on):
    def texts(kv):
        _, log = on.run(kv, "test-thread-safety", "-t", 1, "-c", 1024, "-np", 2, "-n", 32, "--temp", 0, "-p", on.prompt[:1500])
        if "All threads finished without errors." not in log:
            raise RunError(log[-600:])
        return sorted(text[:1600] for text in re.findall(r"Model \d/\d, Context \d/\d: (.*?)\n\n", log, re.DOTALL))
    exact, packed = texts("f16"), texts(KV)
    if exact != packed or len(packed) != 4:
        raise RunError(f"{exact} {packed}")


@case("test-recurrent-state-rollback", "hybrid models: LFM2, Nemotron-H, Qwen 3.5", "both tests pass")
def recurrent_state_rollback(on):
    for arch in ("lfm2", "nemotron_h", "qwen35"):
        _, log = on.run(KV, "test-recurrent-state-rollback", *THREADS, model=on.work / f"archs/{arch}-dense.gguf")
        # Both are done once more with other bytes in the cache.
        if log.count("restored successfully") != 2 or log.count("independent of seq 0") != 2:
            raise RunError(f"{arch}: {log[-600:]}")


@case("test-batch-alloc", "needs no cache", "status 0")
def batch_alloc(on):
    on.run(KV, "test-batch-alloc", model=None)


@case("llama-simple", "700 tokens, 32 more", "the text of f16")
def simple(on):
    on.same("llama-simple", "-n", 32, on.prompt)


@case("llama-batched", "four sequences after a shared beginning", "the text of f16")
def batched(on):
    on.same("llama-batched", *GREEDY, "-p", on.prompt[:1500], "-n", 420, "-np", 4, "-kvu")


@case("llama-batched-bench", "1 and 4 sequences, beginnings shared and not", "every line of its table")
def batched_bench(on):
    for shared in ([], ["-pps"]):
        out, _ = on.run(KV, "llama-batched-bench", *THREADS, "-c", 2048, "-npp", 256, "-ntg", 8, "-npl", "1,4", *shared, "-kvu")
        rows = [[int(word) for word in row] for row in re.findall(r"^\| *(256) \| *(8) \| *(\d) \| *(\d+) \|", out, re.MULTILINE)]
        if rows != [[256, 8, 1, 264], [256, 8, 4, 288 if shared else 1056]]:
            raise RunError(out[-600:])


@case("llama-parallel", "8 requests of 4 clients behind a shared system prompt; `skvq:k=8,v=8`", "the answers of f16")
def parallel(on):
    def answers(kv):
        _, log = on.run(kv, "llama-parallel", *GREEDY, "-np", 4, "-ns", 8, "-n", 24, "-c", 4096, "-pps", "--junk", 6, "-kvu")
        return re.findall(r"Client +(\d), seq +(\d+)/ .*?Response: (.*?)\n\n", log, re.DOTALL)
    exact, packed = answers("f16"), answers(KV_8_BITS)
    if exact != packed or len(packed) != 8:
        raise RunError(f"f16 {exact}\n{KV_8_BITS} {packed}")


@case("llama-passkey", "more tokens than the context has cells, so that it shifts; `skvq:k=8,v=8`", "the answer of f16")
def passkey(on):
    on.same("llama-passkey", *THREADS, "-b", 568, "--junk", 100, kv=KV_8_BITS, at_least=8)


@case("llama-passkey --grp-attn-n 2", "positions that are divided (self-extend)", "the answer of f16")
def passkey_divided(on):
    on.same("llama-passkey", *THREADS, "-b", 512, "--junk", 60, "--grp-attn-n", 2, at_least=8)


@case("llama-lookahead", "31 sequences that are kept, copied and removed", "the text of f16")
def lookahead(on):
    on.same("llama-lookahead", *GREEDY, "-c", 2048, "-n", 32, "-p", on.prompt[:1500])


@case("llama-lookup", "drafts from n-grams, refused ones removed", "the text of f16, drafts accepted")
def lookup(on):
    exact, packed = [on.run(kv, "llama-lookup", *GREEDY, "-c", 2048, "-n", 48, "--spec-draft-n-max", 4, "-lcd", f"{kv}.lcd", "-p", on.prompt)
                     for kv in ("f16", KV)]
    if exact[0] != packed[0] or not find(r"n_accept += (\d+)", packed[1], int):
        raise RunError(packed[1][-800:])


@case("llama-speculative-simple", "the same model drafts", "the text of f16, drafts accepted")
def speculative_simple(on):
    def said(kv):
        out, log = on.run(kv, "llama-speculative-simple", *GREEDY, "-md", on.model, "--spec-type", "draft-simple", "-c", 2048, "-n", 32, "-p", on.prompt)
        if (find(r"n_accept += (\d+)", log, int) or 0) < 10:
            raise RunError(log[-800:])
        return out
    exact, packed = said("f16"), said(KV)
    if exact != packed:
        raise RunError(f"f16 says {exact[-300:]!r}, {KV} says {packed[-300:]!r}")


@case("llama-embedding", "three texts, mean of all tokens", "cosine to f16's above .999")
def embedding(on):
    texts = "\n".join(on.text[at:at + 1500].replace("\n", " ") for at in (0, 5000, 9000))
    def vectors(kv):
        out, _ = on.run(kv, "llama-embedding", *THREADS, "-c", 2048, "-ub", 64, "--pooling", "mean", "--embd-output-format", "array",
                        "-p", texts)
        return json.loads(re.search(r"^\[\[.*?\]\]", out, re.MULTILINE | re.DOTALL).group())
    for a, b in zip(vectors("f16"), vectors(KV), strict=True):
        cosine = sum(map(lambda x, y: x * y, a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
        print(f"  cosine {cosine:.6f}")
        if not 0.999 < cosine < 1.0001 or a == b:
            raise RunError(f"cosine {cosine}")


def choices(on, n):
    """n tasks from the text: a beginning, what follows it, and three other pieces."""
    words = on.text.split()
    piece = lambda at, n_words: " ".join(words[at:at + n_words])
    return [(piece(700 * i, 110), [piece(700 * i + 110, 12), *(piece(700 * i + 110 + 131 * j, 12) for j in (1, 2, 3))]) for i in range(n)]


def perplexity_mode(on, pattern, *args):
    found = [find(pattern, on.run(kv, "llama-perplexity", *THREADS, "-c", 512, "-b", 512, "-ub", 64, *args)[1]) for kv in ("f16", KV)]
    return found


@case("llama-perplexity --hellaswag", "10 tasks made of the text", "the score of f16")
def hellaswag(on):
    lines = [line for context, ends in choices(on, 10) for line in (context, "0", *ends)]
    file = on.file("hellaswag.txt", "\n".join(lines) + "\n")
    exact, packed = perplexity_mode(on, r"^10\s+([\d.]+)", "--hellaswag", "--hellaswag-tasks", 10, "-f", file)
    close("score", exact, packed, 0)


@case("llama-perplexity --winogrande", "10 tasks made of the text", "the score of f16")
def winogrande(on):
    rows = [f'{i},"{context.replace(chr(34), "")} _ {ends[0].replace(chr(34), "")}",the river,nothing,1' for i, (context, ends) in enumerate(choices(on, 10))]
    file = on.file("winogrande.csv", "\n".join(rows) + "\n\n")
    exact, packed = perplexity_mode(on, r"^10\s+([\d.]+)", "--winogrande", "-f", file)
    close("score", exact, packed, 0)


@case("llama-perplexity --multiple-choice", "10 tasks made of the text", "the score of f16")
def multiple_choice(on):
    def string(text):
        return len(text.encode()).to_bytes(4, "little") + text.encode()
    tasks = []
    for context, ends in choices(on, 10):
        one = len(ends).to_bytes(4, "little") + b"".join(map(string, ends)) + b"".join(int(i == 0).to_bytes(4, "little") for i in range(4))
        tasks.append(string(context) + one + (0).to_bytes(4, "little"))
    at, starts = 0, []
    for task in tasks:
        starts.append(at.to_bytes(4, "little"))
        at += len(task)
    file = on.file("choices.bin", len(tasks).to_bytes(4, "little") + b"".join(starts) + b"".join(tasks))
    exact, packed = perplexity_mode(on, r"^10\s+([\d.]+)", "--multiple-choice", "-bf", file)
    close("score", exact, packed, 0)


@case("llama-perplexity --ppl-stride", "strided perplexity", "within 1 % of f16's")
def strided(on):
    file = on.file("short.txt", on.text[:12000])
    pattern = r"\[1\]([\d.]+)"
    close("PPL", *perplexity_mode(on, pattern, "--ppl-stride", 128, "-f", file, "--chunks", 1), 0.01)


@case("llama-imatrix", "two pieces of text", "perplexity within 1 % of f16's, a file of the same size")
def imatrix(on):
    found = []
    for kv in ("f16", KV):
        log = on.run(kv, "llama-imatrix", *THREADS, "-f", TEXT, "-c", 512, "-ub", 64, "--chunks", 2, "-o", f"{kv}.imatrix.gguf")[1]
        found.append((find(r"Final estimate: PPL = ([\d.]+)", log), (on.work / f"{kv}.imatrix.gguf").stat().st_size))
    close("PPL", found[0][0], found[1][0], 0.01)
    if found[0][1] != found[1][1] or found[0] == found[1]:
        raise RunError(f"{found}")


@case("llama-results", "the logits of 700 tokens, twice", "NMSE 0")
def results(on):
    file = on.work / "results.gguf"
    args = ["llama-results", *THREADS, "-c", 1024, "-ub", 64, "-f", on.file("prompt.txt", on.prompt), "-o", file]
    on.run(KV, *args)
    if (nmse := find(r"NMSE=(\S+)", on.run(KV, *args, "--check")[1])) != 0:
        raise RunError(f"NMSE {nmse}")


@case("llama-eval-callback", "every node of a graph shown to a callback", "attend and store nodes of every layer")
def eval_callback(on):
    _, log = on.run(KV, "llama-eval-callback", *THREADS, "-p", "The river", "-n", 1, "-c", 512)
    nodes = {found for found in re.findall(r"kvq_(attend|store)-(\d)", log)}
    if len(nodes) != 8 or "result_output" not in log:
        raise RunError(f"{nodes}")


@case("llama-finetune", "training", "one line that says why not")
def finetune(on):
    _, log = on.run(KV, "llama-finetune", *THREADS, "-f", on.file("short.txt", on.text[:6000]), "-c", 512, "-b", 512, "-ub", 512, status=1)
    lines = [line for line in log.splitlines() if "kvq: " in line]
    if len(lines) != 1 or "GGML_ASSERT" in log:
        raise RunError("\n".join(lines or log.splitlines()[-8:]))
    print(f"  {lines[0]}")
    return "refused"


for name, asked, check in programs_server.CASES:
    case("llama-server", name, asked)(lambda on, check=check: check(on))

TARGETS = sorted({c.program.split()[0] for c in CASES} | {"test-llama-archs", "llama-quantize"})


def make_models(on):
    """The small model with F32 weights, and small random models, of which a few are used."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}
    folder = on.work / "archs"
    if not (folder / "gemma3-dense.gguf").exists():
        folder.mkdir(exist_ok=True)
        subprocess.run([on.folder / "test-llama-archs", "-o", folder], **quiet)
        subprocess.run([on.folder / "llama-quantize", "--allow-requantize", SMALL, on.model, "F32"], **quiet)


def run_all(on, only):
    rows, failed = [], 0
    for one in (c for c in CASES if only in f"{c.program} {c.run}"):
        start = time.monotonic()
        try:
            found = one.check(on) or "passed"
        except (RunError, subprocess.SubprocessError, OSError, AttributeError, KeyError, ValueError) as error:
            found = "FAILED"
            failed += 1
            print(f"  {type(error).__name__}: {error}")
        print(f"{found:8} {one.program}: {one.run} ({time.monotonic() - start:.1f} s)", flush=True)
        rows.append([one.program, one.run, one.asked, found])
    return rows, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=ROOT / "build/llama/bin", help="where the programs are")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "build/programs", help="where they run")
    parser.add_argument("--only", default="")
    parser.add_argument("--targets", action="store_true")
    parser.add_argument("--check", type=pathlib.Path)
    parser.add_argument("-o", "--output", type=pathlib.Path)
    args = parser.parse_args()
    if args.targets:
        print("\n".join(TARGETS))
        return
    missing = [t for t in TARGETS if not (args.bin / t).exists()]
    if missing:
        raise RunError(f"not in {args.bin}: {' '.join(missing)}; run patches/build.sh --tests")
    args.work.mkdir(parents=True, exist_ok=True)
    on = Bench(args.bin.resolve(), args.work.resolve())
    args.output, args.check = [path and path.resolve() for path in (args.output, args.check)]
    source = provenance()
    os.chdir(on.work)
    make_models(on)
    rows, failed = run_all(on, args.only)
    if args.output:
        with open(args.output, "w", newline="") as file:
            file.writelines(f"# {key}: {value}\n" for key, value in source.items())
            csv.writer(file, lineterminator="\n").writerows([FIELDS, *rows])
    print(f"{len(rows) - failed} passed, {failed} failed")
    if args.check and list(csv.reader(head_and_lines(args.check)[1])) != [FIELDS, *rows]:
        raise RunError(f"{args.check} is not what ran; patches/programs.py -o {args.check}")
    if failed:
        raise RunError(f"{failed} failed")


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"programs.py: error: {error}")
