#!/usr/bin/env -S python3 -B
"""Writes the tables of README.md and docs/, and their picture, from what patches/eval.py, patches/bench.sh and
patches/programs.py have written.

    patches/tables.py             renews every block
    patches/tables.py --check     changes nothing and fails if one is not what its CSV says

A CSV begins with lines `# commit: ...`, `# machine: ...`, `# command: ...`, which are said below its table.

A block lies between two comments, of which the first says what it shows; a picture's is followed by the picture:

    <!-- table: docs/results/a.csv docs/results/b.csv columns=bits,total cells=mean,ratio models=a,b texts=c,d
         caches=q4_0|kivi:k=2.5 -->
    <!-- end of table -->
    <!-- bench: docs/results/bench.csv -->
    <!-- end of table -->
    <!-- programs: docs/results/programs.csv -->
    <!-- end of table -->
    <!-- picture: docs/pareto.svg docs/results/a.csv -->

Rows are caches. Each model, text and context has the columns of `cells`; `columns` stand before them once, with the
range over all of those. Without models, texts or caches all are shown. Where two files have the same row, the later one counts.
"""

import argparse
import csv
import pathlib
import re
import sys

import pareto
from results import head_and_lines, read
from runs import FLOOR, ROOT, STOCK_BITS, RunError


def short(value, decimals):
    """.0042, .13, 1.36: without the zero before the point, and no more digits than mean something."""
    if value >= 0.1:
        decimals = min(decimals, 2 if value >= 1 else 3)
    return re.sub(r"^0\.", ".", f"{value:.{decimals}f}")


def span(values):
    low, high = (f"{edge:.2f}" for edge in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


# Columns that stand once: title, and the cell from all rows of a cache.
COLUMNS = {
    "bits": ("bits", lambda rows: span([row["bits"] for row in rows])),
    "total": ("total", lambda rows: " / ".join(span([row[f] for row in rows]) for f in ("bits_4k", "bits_32k"))),
}
# Columns of each model, text and context.
CELLS = {
    "ppl": ("PPL", lambda row: f"{row['ppl']:.2f}"),
    "mean": ("mean KLD", lambda row: short(row["mean"], 5)),
    "ratio": ("/ q4_0", lambda row: short(row["mean_ratio"], 2)),
    "both": ("mean KLD (/ q4_0)", lambda row: f"{short(row['mean'], 4)} ({short(row['mean_ratio'], 2)})"),
    "p999": ("99.9 %", lambda row: short(row["p999"], 3)),
    "same_top": ("same top", lambda row: f"{row['same_top']:.1f} %"),
}


def sources(paths):
    """What stands below a table: where its numbers come from."""
    said = []
    for path in paths:
        head, _ = head_and_lines(path)
        missing = {"commit", "machine", "command"} - set(head)
        if missing:
            raise RunError(f"{path} does not say its {', '.join(sorted(missing))}")
        said.append(f"[{pathlib.Path(path).name}](/{path}): commit {head['commit']}, {head['machine']}; `{head['command']}`")
    return "\n" + "\n".join(said) + "\n"


def read_all(paths):
    if not paths:
        raise RunError("a block that names no CSV")
    return list({(row["model"], row["text"], row["context"], row["cache"]): row
                 for path in paths for row in read(path)}.values())


def place(row):
    """Where a row belongs: a model, a text and a context."""
    return row["model"], row["text"], row["context"]


def titles(places):
    """What tells one place from another, in words."""
    varying = [len(set(part)) > 1 for part in zip(*places)] if len(places) > 1 else [False, True, False]
    return {one: ", ".join(re.sub(r"\.(txt|raw)$", "", part) for part, show in zip(one, varying) if show)
            for one in places}


def cache_title(cache):
    if cache == FLOOR:
        return "f16 without flash attention (the floor)"
    return f"stock {cache}" if cache in STOCK_BITS else cache


def cache_order(rows):
    """Stock first, ours by falling bits, published settings after them, the floor last."""
    first = rows[0]["cache"]
    kind = 3 if first == FLOOR else 0 if first in STOCK_BITS else 2 if "paper" in first else 1
    return kind, -max(row["bits"] for row in rows)


def chosen(rows, options):
    """Rows that the block asks for; a name that no row has is an error."""
    for key, field, separator in (("models", "model", ","), ("texts", "text", ","), ("caches", "cache", "|")):
        if key in options:
            wanted = options[key].split(separator)
            missing = set(wanted) - {row[field] for row in rows}
            if missing:
                raise RunError(f"no results of {' '.join(sorted(missing))}")
            rows = sorted((row for row in rows if row[field] in wanted), key=lambda row: wanted.index(row[field]))
    return rows


def table(paths, options):
    unknown = set(options) - {"columns", "cells", "models", "texts", "caches"}
    if unknown:
        raise RunError(f"no such key: {' '.join(sorted(unknown))}")
    rows = chosen(read_all(paths), options)
    columns = options.get("columns", "bits").split(",")
    cells = options.get("cells", "mean").split(",")
    unknown = (set(columns) - set(COLUMNS)) | (set(cells) - set(CELLS))
    if unknown:
        raise RunError(f"no such column: {' '.join(sorted(unknown))}")
    places = list(dict.fromkeys(map(place, rows)))
    of_place = titles(places)
    head = ["cache", *(COLUMNS[c][0] for c in columns)]
    for one in places:
        head += [f"{of_place[one]}: {CELLS[c][0]}" if i == 0 else CELLS[c][0] for i, c in enumerate(cells)]
    lines = []
    caches = [[row for row in rows if row["cache"] == cache] for cache in dict.fromkeys(row["cache"] for row in rows)]
    for mine in caches if "caches" in options else sorted(caches, key=cache_order):
        here = {place(row): row for row in mine}
        lines.append([cache_title(mine[0]["cache"]), *(COLUMNS[c][1](mine) for c in columns),
                      *(CELLS[c][1](here[one]) if one in here else "-" for one in places for c in cells)])
    written = ["| " + " | ".join(line) + " |\n" for line in [head, *lines]]
    written.insert(1, "|" + "---|" * len(head) + "\n")
    return "".join(written) + sources(paths)


def milliseconds(us):
    return f"{us / 1e6:.1f} s" if us >= 1e7 else f"{us / 1e3:.0f}" if us >= 1e4 else f"{us / 1e3:.2f}"


def bench_table(paths, options):
    """Rows of patches/bench.sh, cold caches only."""
    if options:
        raise RunError(f"no such key: {' '.join(sorted(options))}")
    lines = ["| recipe | cells | queries | head size | GQA | threads | kvq ms | stock f16 | q8_0 | q4_0 | x f16 | x q4_0 | "
             "floor | over floor | store us |", "|" + "---|" * 15]
    for row in (row for path in paths for row in read(path)):
        if row["cache"] == "cold":
            shape = " | ".join(f"{row[f]:,.0f}".replace(",", " ") for f in ("n_kv", "n_q", "head_dim", "gqa", "threads"))
            times = " | ".join(milliseconds(row[f]) for f in ("us_kvq", "us_f16", "us_q8_0", "us_q4_0"))
            lines.append(f"| `{row['recipe']}` | {shape} | {times} | {row['ratio_f16']:.0f} | {row['ratio_q4_0']:.0f} | "
                         f"{row['floor_us'] / 1e3:.2f} | {row['us_kvq'] / row['floor_us']:.1f} | "
                         f"{row['seal_us_per_token']:.0f} |")
    return "\n".join(lines) + "\n" + sources(paths)


def programs_table(paths, options):
    """Rows of patches/programs.py, as they are."""
    if options:
        raise RunError(f"no such key: {' '.join(sorted(options))}")
    rows = [row for path in paths for row in csv.reader(head_and_lines(path)[1])]
    if failed := [row[0] for row in rows if "FAILED" in row]:
        raise RunError(f"failed when the table was written: {' '.join(failed)}")
    written = ["| " + " | ".join([f"`{row[0]}`" if at else row[0], *row[1:]]) + " |\n" for at, row in enumerate(rows)]
    written.insert(1, "|" + "---|" * len(rows[0]) + "\n")
    return "".join(written) + sources(paths)


MAKERS = {"table": table, "bench": bench_table, "programs": programs_table}
BLOCK = re.compile(r"(<!-- (table|bench|programs): ([^>]*?) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
PICTURE = re.compile(r"<!-- picture: (\S+) ([^>]*?) -->")


def render(document):
    """{path: text} of the document with its tables renewed, and of its pictures."""
    text = document.read_text()
    if len(re.findall("<!-- (?:table:|bench:|programs:|end of)", text)) != 2 * len(BLOCK.findall(text)):
        raise RunError(f"{document.name}: a table without its end, or an end without its table")

    def renew(block):
        words = block.group(3).split()
        try:
            made = MAKERS[block.group(2)]([w for w in words if w.endswith(".csv")],
                         dict(w.split("=", 1) for w in words if not w.endswith(".csv")))
        except (RunError, ValueError) as error:
            raise RunError(f"{document.name}: {block.group(2)} {' '.join(words)}: {error}") from None
        return block.group(1) + made + block.group(5)
    made = {document: BLOCK.sub(renew, text)}
    for svg, paths in PICTURE.findall(text):
        made[ROOT / svg] = pareto.draw(read_all(paths.split()))
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if something would change")
    parser.add_argument("documents", nargs="*", type=pathlib.Path, help="instead of README.md and those in docs/")
    args = parser.parse_args()
    made = {}
    for document in args.documents or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        made.update(render(document))
    stale = {path: text for path, text in made.items() if not path.exists() or path.read_text() != text}
    if args.check and stale:
        raise RunError(f"not what docs/results says: {' '.join(p.name for p in stale)}; run patches/tables.py")
    for path, text in stale.items():
        path.write_text(text)


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"tables.py: error: {error}")
