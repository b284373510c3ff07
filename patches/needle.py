#!/usr/bin/env -S python3 -B
"""Retrieval from a long context of a real model: facts planted in prose, asked for at its end through the chat template.

    patches/needle.py -m smollm2 [--tokens 6000] [--texts 4] [--facts 5] [-f PROSE] [-o build/eval/needle] RECIPE...

Every cache (f16 and the recipes) gets the same seeded texts and questions: in each text as many facts, spread evenly, and a
question for each. Greedy, ubatches of 64 tokens. The questions of a text share its rows in the cache, which are packed
by then but for the window: what answers them is what a long conversation reads. A model is a file or a name of
patches/models.py; it must answer such questions with f16.
"""

import argparse
import bisect
import csv
import itertools
import pathlib
import random
import re
import sys

import texts
from models import find_model
from passkey import server
from runs import ROOT, RunError, markdown, note

PLACES = ["Athens", "Boston", "Cairo", "Dublin", "Edinburgh", "Florence", "Geneva", "Havana", "Istanbul", "Jakarta", "Kyoto",
          "Lisbon", "Madrid", "Nairobi", "Oslo", "Prague", "Quito", "Rome", "Sydney", "Toronto"]
# Said twice, and the answer begun: with less, models of 135 M parameters fail at 6 000 tokens whatever their cache is.
FACT = "The pass key of {place} is {key}. Remember it. {key} is the pass key of {place}."
TASK = "Here is a text.\n\n{text}\n\nWhat is the pass key of {place}?"
ANSWER = "The pass key of {place} is"


def plant(paragraphs, facts, rng):
    """The paragraphs with the facts between their sentences, spread evenly but not regularly."""
    sentences = re.split(r"(?<=[.!?”]\s)", "\n\n".join(paragraphs))
    ends = list(itertools.accumulate(map(len, sentences)))
    for i, (place, key) in reversed(list(enumerate(facts))):
        depth = ends[-1] * (i + rng.uniform(0.2, 0.8)) / len(facts)
        sentences.insert(bisect.bisect(ends, depth), FACT.format(place=place, key=key) + " ")
    return "".join(sentences)


def make_texts(n_texts, n_facts, n_tokens, filler, count):
    """[(text, [(place, key)])]; count(text) is the number of its tokens, of which each text has about n_tokens."""
    paragraphs = [p for p in filler.split("\n") if p.strip()]
    per_character = count(filler[:200000]) / len(filler[:200000])
    made = []
    for i in range(n_texts):
        rng = random.Random(f"needle {i}")
        facts = [(place, str(rng.randrange(10000, 100000))) for place in rng.sample(PLACES, n_facts)]
        room = n_tokens / per_character - sum(len(FACT.format(place=place, key=key)) for place, key in facts)
        at, chosen = rng.randrange(len(paragraphs)), []
        while (room := room - len(paragraphs[at % len(paragraphs)]) - 2) >= 0:
            chosen.append(paragraphs[at % len(paragraphs)])
            at += 1
        made.append((plant(chosen, facts, rng), facts))
    return made


def ask(one, text, place):
    """The first number of the answer."""
    body = {"messages": [{"role": "user", "content": TASK.format(text=text, place=place)}]}
    prompt = one.post("/apply-template", body)["prompt"] + ANSWER.format(place=place)
    answer = one.post("/completion", {"prompt": prompt, "n_predict": 8, "temperature": 0, "cache_prompt": True})["content"]
    found = re.search(r"\d+", answer)
    return found.group() if found else ""


def answers(one, kv, planted):
    """[text, place, key, answer] of every question."""
    rows = []
    for i, (text, facts) in enumerate(planted):
        rows += [[i, place, key, ask(one, text, place)] for place, key in facts]
        note(f"{kv}: {right(rows)} of {len(rows)} right")
    return rows


def right(rows):
    return sum(key == answer for _, _, key, answer in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-f", "--file", default=texts.PROSE, type=pathlib.Path, help="prose that hides the facts")
    parser.add_argument("--tokens", type=int, default=6000, help="length of a text")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--facts", type=int, default=5, help="facts in each text, and questions about it")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--bin", default=ROOT / "build/llama/bin", help="folder of llama-server")
    parser.add_argument("-o", "--output", default=ROOT / "build/eval/needle", type=pathlib.Path,
                        help="path without suffix")
    parser.add_argument("--at-least", type=float, default=0,
                        help="fail if a recipe has less than this share of f16's right answers")
    parser.add_argument("recipes", nargs="*", help="kvq recipes, as after --kvq")
    args = parser.parse_args()
    if not 1 <= args.facts <= len(PLACES):
        raise RunError(f"--facts {args.facts}: 1 to {len(PLACES)}")

    model = find_model(args.model)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # Lengths are estimated from characters, hence the margin.
    n_ctx = -(-(args.tokens * 11 // 10 + 256) // 256) * 256
    planted, results = None, {}
    for kv in ["f16", *args.recipes]:
        with server(args.bin, model, kv, n_ctx, args.output.with_suffix(".log"), args.threads) as one:
            # Texts depend on the vocabulary only, so the first server's count serves all.
            planted = planted or make_texts(args.texts, args.facts, args.tokens, args.file.read_text(), one.n_tokens)
            note(f"{kv}: texts of {', '.join(str(one.n_tokens(text)) for text, _ in planted)} tokens")
            results[kv] = answers(one, kv, planted)

    table = markdown(["cache", "right"], [[kv, f"{right(rows)} of {len(rows)}"] for kv, rows in results.items()])
    args.output.with_suffix(".md").write_text(table + "\n")
    with open(args.output.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cache", "text", "place", "key", "answer"])
        for kv, rows in results.items():
            writer.writerows([kv, *row] for row in rows)
    print(table)
    poor = [kv for kv in args.recipes if right(results[kv]) < args.at_least * right(results["f16"])]
    if poor:
        raise RunError(f"less than {args.at_least:.0%} of f16's right answers: {' '.join(poor)}")


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"needle.py: error: {error}")
