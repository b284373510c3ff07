#!/usr/bin/env -S python3 -B
"""Soaks llama-server with a kvq cache: four clients at once ask, go on, cancel, overrun the context, save, restore and
erase slots, with texts that share beginnings. Every answer's first and last token are compared with what a second
server with an f16 cache says after the same text.

    patches/soak.py [--minutes 60] [--seed 1] [--kv skvq] [-m MODEL.gguf] [-f TEXT] [-o FOLDER]

Two thirds of the time the slots share one cache, as llama-server's do by default, first with requests that name a slot,
then with its prompt cache; in the last third each has a part of its own, and long answers shift it. Ends with a line for
each; status 1 if a bound was broken: the mean and the largest divergence, answers refused, memory that grows, a server
that dies.

llama-server takes the cells away from a slot that is still answering when a request names it and the prompt cache is on
(get_available_slot), with an f16 cache as well, so no part has both.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import http.client
import json
import math
import pathlib
import random
import statistics
import sys
import threading
import time

from passkey import RefusedError, server
from runs import ROOT, RunError, note

N_CTX = 4096
N_CLIENTS = 4
TOP = 40
# KL divergence of one token's distribution over the TOP tokens of f16.
MEAN_BOUND, WORST_BOUND = 0.005, 0.5
# Growth of resident memory over the second half of a phase. In the first minutes prompt cache and allocator still fill.
WARM_SECONDS, GROWTH_BOUND_MIB, COLD_GROWTH_BOUND_MIB = 300, 16, 96
# Arguments of both servers, MiB of the prompt cache, and what clients do besides: only a slot with a part of its own can
# be overrun.
NAMED = {"save": 2, "restore": 2, "erase": 0.5}
MODES = {
    "shared": (["-kvu"], 0, NAMED),
    "prompt cache": (["-kvu"], 32, {}),
    "split": (["-no-kvu", "--context-shift"], 0, {**NAMED, "overrun": 1}),
}
# How often a client does what.
KINDS = {"ask": 8, "go on": 6, "cancel": 3}


def divergence(exact, packed):
    """KL of two lists of the likeliest tokens; what the second lacks counts as its unlikeliest."""
    found = {t["id"]: t["logprob"] for t in packed}
    rest = min(found.values())
    return sum(math.exp(t["logprob"]) * (t["logprob"] - found.get(t["id"], rest)) for t in exact)


def resident_mib(process):
    for line in pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RunError("llama-server has gone")


class Phase:
    """One pair of servers, and what the clients found out."""

    def __init__(self, tokens, packed, exact, until, kinds):
        self.tokens, self.packed, self.exact, self.until, self.kinds = tokens, packed, exact, until, kinds
        self.named = "save" in kinds
        self.counts = collections.Counter()
        self.found = []
        self.errors = []
        self.lock = threading.Lock()

    def count(self, what):
        with self.lock:
            self.counts[what] += 1

    def post(self, path, body):
        """The answer, or None if the server refuses: what has no room, or a slot that holds nothing."""
        try:
            return self.packed.post(path, body)
        except RefusedError:
            self.count("refused")
            return None

    def act(self, slot, what):
        done = self.post(f"/slots/{slot}?action={what}", {"filename": f"{slot}.bin"}) is not None
        if done:
            self.count(what)
        return done

    def client(self, number, seed):
        rng = random.Random(seed)
        history, saved = [], []
        while time.monotonic() < self.until:
            slot = {"id_slot": number} if self.named and rng.random() < 0.5 else {}
            kind = rng.choices(list(self.kinds), self.kinds.values())[0]
            if kind == "ask" or not history:
                # One of three beginnings, which clients share, and an ending of its own.
                begin = 5000 * rng.randrange(3)
                at = rng.randrange(20000, len(self.tokens) - 400)
                prompt = self.tokens[begin:begin + 20 * rng.randrange(1, 20)]
                prompt += self.tokens[at:at + rng.randrange(5, 200)]
                history = self.ask(prompt, rng.randrange(2, 40), slot, kind)
            elif kind == "go on":
                at = rng.randrange(20000, len(self.tokens) - 400)
                prompt = history[-700:] + self.tokens[at:at + rng.randrange(2, 60)]
                history = self.ask(prompt, rng.randrange(2, 40), slot, kind)
            elif kind == "cancel":
                self.cancel(history, rng.randrange(1, 12), slot)
            elif kind == "overrun":
                history = self.ask(history + self.tokens[:max(0, 900 - len(history))], 200, slot, kind)[-700:]
            elif kind == "restore" and not saved:
                continue
            elif kind == "save":
                history = self.ask(history, 2, {"id_slot": number}, kind)
                saved = history if self.act(number, kind) else []
            elif self.act(number, kind) and kind == "restore":
                history = self.ask(saved + self.tokens[:20], 8, {"id_slot": number}, kind)

    def ask(self, prompt, n, slot, kind):
        """Text and answer as tokens."""
        body = {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True, "n_probs": TOP,
                "return_tokens": True, "cache_prompt": True, **slot}
        answer = self.post("/completion", body)
        if answer is None:
            return []
        said = answer["completion_probabilities"]
        self.count("shifted" if answer["truncated"] else "answers")
        self.compare(prompt, said[0], f"{kind}, first token, {answer['timings']['cache_n']} reused")
        # After a shift the context is no text any more that could be given to the other server.
        if not answer["truncated"] and len(said) > 1:
            self.compare(prompt + answer["tokens"][:len(said) - 1], said[-1], f"{kind}, token {len(said)}")
        return prompt + answer["tokens"]

    def compare(self, prompt, said, where):
        body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "ignore_eos": True, "n_probs": TOP}
        exact = self.exact.post("/completion", body)["completion_probabilities"][0]
        value = divergence(exact["top_logprobs"], said["top_logprobs"])
        if not math.isfinite(value):
            raise RunError(f"probabilities that are none: {said}")
        with self.lock:
            self.found.append((value, f"{where}, after {len(prompt)} tokens"))

    def cancel(self, prompt, n_chunks, slot):
        """Reads a few tokens of a long answer and hangs up."""
        link = http.client.HTTPConnection(self.packed.url.split("//")[1], timeout=120)
        link.request("POST", "/completion", json.dumps({"prompt": prompt, "n_predict": 300, "stream": True, **slot}),
                     {"Content-Type": "application/json"})
        reply = link.getresponse()
        for _ in range(n_chunks):
            reply.readline()
        link.close()
        self.count("cancelled")

    def run(self, seed):
        """Runs the clients to the end; resident memory at half time and at the end."""
        begin, half = time.monotonic(), None
        with concurrent.futures.ThreadPoolExecutor(N_CLIENTS) as pool:
            clients = [pool.submit(self.client, i, f"{seed} {i}") for i in range(N_CLIENTS)]
            while concurrent.futures.wait(clients, 1).not_done:
                if half is None and time.monotonic() > (begin + self.until) / 2:
                    half = resident_mib(self.packed.process)
        for client in clients:
            if client.exception():
                self.errors.append(repr(client.exception()))
        if self.packed.process.poll() is not None:
            self.errors.append(f"llama-server ended with status {self.packed.process.poll()}")
            return half or 0, 0
        return half or 0, resident_mib(self.packed.process)


def soak(args, mode, seconds):
    flags, prompt_cache_mib, kinds = MODES[mode]
    folder = args.output / mode.replace(" ", "-")
    (folder / "slots").mkdir(parents=True, exist_ok=True)
    common = [*flags, "-ctxcp", 8]
    packed_args = [*common, "-cram", prompt_cache_mib, "--slot-save-path", folder / "slots"]
    with contextlib.ExitStack() as stack:
        packed, exact = (
            stack.enter_context(server(args.bin, args.model, kv, n_ctx, folder / log, args.threads, N_CLIENTS, extra))
            for kv, n_ctx, log, extra in
            ((args.kv, N_CTX, "kvq.log", packed_args), ("f16", 2 * N_CTX, "f16.log", common)))
        tokens = packed.post("/tokenize", {"content": args.file.read_text(errors="replace")[:400000]})["tokens"]
        phase = Phase(tokens, packed, exact, time.monotonic() + seconds, {**KINDS, **kinds})
        note(f"{mode}: {seconds:.0f} s, {args.kv}, seed {args.seed}")
        half, end = phase.run(args.seed)
    mean = statistics.fmean(value for value, _ in phase.found) if phase.found else math.inf
    worst, where = max(phase.found, default=(math.inf, "nowhere"))
    broken = list(phase.errors)
    if not mean <= MEAN_BOUND:
        broken.append(f"mean divergence above {MEAN_BOUND}")
    if not worst <= WORST_BOUND:
        broken.append(f"a divergence above {WORST_BOUND}")
    growth_bound = GROWTH_BOUND_MIB if seconds >= WARM_SECONDS else COLD_GROWTH_BOUND_MIB
    if end - half > growth_bound:
        broken.append(f"memory grew by more than {growth_bound} MiB")
    if phase.counts["refused"] > 0.05 * sum(phase.counts.values()):
        broken.append("more than 5 % refused")
    said = ", ".join(f"{n} {what}" for what, n in sorted(phase.counts.items()))
    print(f"{mode}: {said}; {len(phase.found)} tokens compared, divergence {mean:.4f} (largest {worst:.3f}: {where}); "
          f"memory {half:.0f} -> {end:.0f} MiB; {'; '.join(broken) or 'clean'}", flush=True)
    return not broken


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kv", default="skvq")
    parser.add_argument("-m", "--model", default=ROOT / "models/tiny-12m-q8_0.gguf", type=pathlib.Path)
    parser.add_argument("-f", "--file", default=ROOT / "models/amazon-excerpt.txt", type=pathlib.Path)
    parser.add_argument("-t", "--threads", type=int, default=1, help="of each server")
    parser.add_argument("--bin", default=ROOT / "build/llama/bin", type=pathlib.Path, help="folder of llama-server")
    parser.add_argument("-o", "--output", default=ROOT / "build/soak", type=pathlib.Path,
                        help="folder for logs and slots")
    args = parser.parse_args()
    args.output = args.output.resolve()
    clean = [soak(args, mode, args.minutes * 60 / len(MODES)) for mode in MODES]
    sys.exit(0 if all(clean) else 1)


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"error: {error}")
