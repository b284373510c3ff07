"""The parts of patches/integration.sh that are no one-liner in a shell. Each prints what it found."""

import json
import os
import pathlib
import random
import subprocess
import sys
import threading

import random_model
from passkey import server
from runs import RunError, Runs, markdown

# Mean KLD of a recipe, at most this share of stock q4_0's on the small model.
BARS = {"skvq:k=4,v=4": 0.15, "skvq:k=3,v=3": 0.3, "skvq:k=3,v=2": 0.5, "skvq:k=2,v=2": 0.8}


def odd_model(path, head_dim=40):
    """A llama model of one layer, zero weights, no vocabulary, and a head size that kvq has no page for."""
    shape = random_model.shape(layers=1, embd=2 * head_dim, heads=2, kv_heads=2, head_dim=head_dim, ff=64, vocab=32, ctx=512)
    random_model.write(path, shape, random_model.F32)


def completions(bin_dir, model, kv, log):
    """Two requests at once through llama-server, with two slots: both must answer, with text."""
    answers = {}
    extra = ["-ngl", os.environ.get("KVQ_TEST_NGL", "0")]
    with server(bin_dir, model, kv, 2048, pathlib.Path(log), 2, n_parallel=2, extra=extra) as one:
        def ask(prompt):
            answers[prompt] = one.complete(prompt, 24)
        threads = [threading.Thread(target=ask, args=[p]) for p in ("The river " * 150, "Once upon a time")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(answers)
    if len(answers) != 2 or not all(answer.strip() for answer in answers.values()):
        raise RunError("an answer is empty")


def repeated(bin_dir, model, kv, text, log):
    """Requests A, A, B, A to one slot without a prompt cache: A's texts and probabilities must be the same to the bit."""
    text = pathlib.Path(text).read_text(errors="replace")
    with server(bin_dir, model, kv, 2048, pathlib.Path(log), 2) as one:
        def ask(prompt):
            body = {"prompt": prompt, "n_predict": 48, "temperature": 0, "cache_prompt": False, "ignore_eos": True, "n_probs": 5}
            answer = one.post("/completion", body)
            return answer["content"], [token["logprob"] for token in answer["completion_probabilities"]]
        first = ask(text[:2500])
        answers = [ask(text[:2500]), ask(text[4000:8000]), ask(text[:2500])]
    print(first[0])
    if answers[0] != first or answers[2] != first:
        raise RunError(f"answers differ: {answers}")
    if answers[1] == first or len(set(first[1])) < 20:
        raise RunError(f"answers that say too little: {first}, {answers[1]}")


def swa_server(bin_dir, model, kv):
    """A sliding-window model, two slots in one cache. While slot 1 has filled it, slot 0 goes back to a context
    checkpoint, and is restored from a file: each must be as with f16, the tokens taken from the cache included."""
    rng = random.Random(1)
    first, other, ending = ([rng.randrange(128) for _ in range(n)] for n in (220, 700, 20))
    seen = {}
    for cache in ("f16", kv):
        extra = ["-kvu", "-ctxcp", 32, "-cms", 0, "--slot-save-path", pathlib.Path.cwd(), "-lv", 5, "--override-kv",
                 "gemma3.context_length=int:4096"]
        log = pathlib.Path(f"swa-{cache.split(':')[0]}.log")
        with server(bin_dir, model, cache, 2048, log, 2, n_parallel=2, extra=extra) as one:
            def ask(prompt, slot):
                body = {"prompt": prompt, "n_predict": 2, "temperature": 0, "ignore_eos": True, "id_slot": slot}
                return one.post("/completion", body)["timings"]["cache_n"]
            steps = [ask(first[:100], 0), ask(first, 0)]
            steps.append(one.post("/slots/0?action=save", {"filename": f"{log.stem}.bin"})["n_saved"])
            steps += [ask(other, 1), ask(first[:130] + ending, 0)]
            steps.append(ask(other + ending, 1))
            steps.append(one.post("/slots/0?action=restore", {"filename": f"{log.stem}.bin"})["n_restored"])
            steps += [ask(first + ending, 0), ask(other[:600], 1)]
        seen[cache] = steps, log.read_text(errors="replace").count("restored context checkpoint")
    print(seen)
    if seen["f16"] != seen[kv] or seen[kv][1] == 0:
        raise RunError("other steps than with f16, or no checkpoint was restored")


def bars(bin_dir, store, model, text):
    """Mean KLD of the recipes against stock q4_0 in the same run, and the order of the recipes among themselves."""
    runs = Runs(bin_dir, store)
    found = {kv: runs.divergence(model, text, kv, 1024, 4) for kv in ["q4_0", *BARS]}
    share = {kv: found[kv]["mean"] / found["q4_0"]["mean"] for kv in found}
    print(markdown(["cache", "mean KLD", "99.9 %", "/ q4_0", "at most"], [
        [kv, f"{r['mean']:.6f}", f"{r['p999']:.4f}", f"{share[kv]:.3f}", BARS.get(kv, "")] for kv, r in found.items()]))
    runs.drop_base_logits()
    over = [kv for kv, bar in BARS.items() if not share[kv] <= bar]
    if over:
        raise RunError(f"over the bar: {' '.join(over)}")
    order = [found[kv]["mean"] for kv in BARS]
    if order != sorted(order):
        raise RunError("fewer bits gave a smaller divergence: something is not as named")


def bench(bin_dir, model, threads="2"):
    """llama-bench with a list of caches, one with a comma in it, behind tokens whose state it saves and restores."""
    command = [pathlib.Path(bin_dir) / "llama-bench", "-m", model, "-t", threads, "-p", "64", "-n", "8", "-d", "300",
               "-r", "2", "-o", "json", "-kvq", "off,skvq,skvq:k=3,v=2"]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=True)
    said = run.stderr.decode()
    print(said)
    if "damaged" in said:
        raise RunError("llama-bench could not restore the state that it had saved")
    tests = json.loads(run.stdout)
    caches = sorted({t["kvq"] for t in tests})
    print(caches, [round(t["avg_ts"]) for t in tests])
    if len(tests) != 6 or caches != ["off", "skvq", "skvq:k=3,v=2"] or not all(t["avg_ts"] > 0 for t in tests):
        raise RunError("expected 2 results for each of 3 caches")


def damage(source, target, how):
    """A copy of a saved state: cut to a share (`cut 0.5`) or one bit changed at a share of its length (`flip 0.5`)."""
    kind, share = how.split()
    data = bytearray(pathlib.Path(source).read_bytes())
    at = int(len(data) * float(share))
    if kind == "cut":
        del data[at:]
    else:
        data[at] ^= 0x10
    pathlib.Path(target).write_bytes(data)


if __name__ == "__main__":
    try:
        {f.__name__: f for f in (odd_model, completions, repeated, swa_server, bars, bench, damage)}[sys.argv[1]](*sys.argv[2:])
    except (RunError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
