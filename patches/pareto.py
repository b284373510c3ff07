#!/usr/bin/env -S python3 -B
"""Draws what patches/eval.py has measured: divergence against total bits per value, as SVG, without any library.

    patches/pareto.py build/eval/pareto.csv docs/pareto.svg

A column of panels per text; above the mean, below the 99.9 % divergence. With several models these stand side by side,
a row of panels per text, and the mean alone is drawn. Filled marks count everything that a context of
32 768 tokens holds (windows, sink tokens, pools), hollow ones a context of 4 096.
"""

import argparse
import math
import pathlib
import sys
from xml.sax.saxutils import escape

from results import read
from runs import FLOOR, STOCK_BITS, RunError

PANEL_W, PANEL_H, LEFT, TOP, GAP = 470, 300, 70, 60, 70
# "kvq" stands for recipes that go by a number or by `on`.
COLOURS = {"stock": "#555555", "kvq": "#b02a3f", "skvq": "#1f6fb4", "kivi": "#2c9a4b", "ott": "#d9792b", "qaq": "#8a4fbf"}
# Published settings lie close together: where each one's label goes.
LABEL_DY = {"stock": -6, "kvq": 14, "skvq": 18, "kivi": 5, "ott": -10, "qaq": -8}
METRICS = [("mean", "mean KLD"), ("p999", "99.9 % KLD")]
MIN_BITS = 1.75


def family(cache):
    if cache in STOCK_BITS:
        return "stock"
    return cache.split(":")[0] if cache.split(":")[0] in COLOURS else "kvq"


class Panel:
    def __init__(self, x, y, max_bits, low, high):
        self.x, self.y, self.max_bits = x, y, max_bits
        self.low, self.high = math.log10(low), math.log10(high)

    def at(self, bits, value):
        across = math.log2(bits / MIN_BITS) / math.log2(self.max_bits / MIN_BITS)
        up = (math.log10(value) - self.low) / (self.high - self.low)
        return self.x + across * PANEL_W, self.y + (1 - up) * PANEL_H

    def frame(self, title):
        out = [f'<rect x="{self.x}" y="{self.y}" width="{PANEL_W}" height="{PANEL_H}" fill="none" stroke="#999"/>',
               text(self.x + PANEL_W / 2, self.y - 8, title, "middle")]
        for bits in (1.75, 2, 2.5, 3, 4, 5, 6, 8, 10):
            if MIN_BITS <= bits <= self.max_bits:
                x, _ = self.at(bits, 10 ** self.low)
                out += [line(x, self.y, x, self.y + PANEL_H), text(x, self.y + PANEL_H + 15, f"{bits:g}", "middle")]
        for exponent in range(math.ceil(self.low), math.floor(self.high) + 1):
            for digit in (1, 2, 5):
                value = digit * 10.0 ** exponent
                if math.log10(value) <= self.high:
                    _, y = self.at(MIN_BITS, value)
                    out += [line(self.x, y, self.x + PANEL_W, y), text(self.x - 6, y + 4, f"{value:g}", "end")]
        return out


def line(x1, y1, x2, y2, colour="#e4e4e4", width=1):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def text(x, y, what, anchor="start", colour="#222", size=12):
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}">'
            f'{escape(what)}</text>')


def grid(rows):
    """Panels, row by row, as (metric, title, rows): texts across and metrics down; with several models these across,
    texts down, and the mean alone."""
    models, texts = (list(dict.fromkeys(row[field] for row in rows)) for field in ("model", "text"))
    if len(models) == 1:
        return [[(metric, f"{title}, {name}", [row for row in rows if row["text"] == name]) for name in texts]
                for metric, title in METRICS]
    return [[("mean", f"mean KLD, {model}, {name}", [row for row in rows if (row["model"], row["text"]) == (model, name)])
             for model in models] for name in texts]


def draw(rows):
    rows = [row for row in rows if row["cache"] != FLOOR]
    panels = grid(rows)
    max_bits = 1.06 * max(row["bits_4k"] for row in rows)
    out = []
    for j, across in enumerate(panels):
        for i, (metric, title, mine) in enumerate(across):
            # One scale for all panels of a metric.
            values = [row[metric] for row in rows]
            panel = Panel(LEFT + i * (PANEL_W + GAP), TOP + j * (PANEL_H + GAP), max_bits, min(values) / 1.5,
                          max(values) * 1.5)
            out += panel.frame(title)
            out += curves(panel, mine, metric) + [mark for row in mine for mark in marks(panel, row, metric)]
    width, height = LEFT + len(panels[0]) * (PANEL_W + GAP), TOP + len(panels) * (PANEL_H + GAP)
    legend = [text(LEFT + 120 * i, 22, name, colour=colour, size=14) for i, (name, colour) in enumerate(COLOURS.items())]
    legend.append(text(LEFT + 740, 22, "filled: total bits at 32 768 tokens, hollow: at 4 096"))
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                      'font-family="sans-serif">', f'<rect width="{width}" height="{height}" fill="white"/>',
                      *legend, *out, "</svg>", ""])


def curves(panel, rows, metric):
    """A line through each method's own settings; published settings stand alone."""
    out = []
    for name, colour in COLOURS.items():
        points = sorted(panel.at(row["bits_32k"], row[metric]) for row in rows
                        if family(row["cache"]) == name and "paper" not in row["cache"])
        out += [line(*a, *b, colour, 1.5) for a, b in zip(points, points[1:])]
    return out


def marks(panel, row, metric):
    colour = COLOURS[family(row["cache"])]
    for bits, fill in ((row["bits_4k"], "white"), (row["bits_32k"], colour)):
        x, y = panel.at(bits, row[metric])
        tip = f"<title>{escape(row['cache'])}: {row[metric]:.5f} at {bits:.2f} bits</title>"
        if "paper" in row["cache"]:
            yield f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{fill}" stroke="{colour}">{tip}</rect>'
        else:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}">{tip}</circle>'
    if "paper" in row["cache"] or family(row["cache"]) == "stock":
        yield text(x + 9, y + LABEL_DY[family(row["cache"])], row["cache"], colour=colour, size=11)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=pathlib.Path, help="written by patches/eval.py")
    parser.add_argument("svg", type=pathlib.Path)
    args = parser.parse_args()
    try:
        rows = read(args.csv.absolute())
    except RunError as error:
        sys.exit(f"pareto.py: error: {error}")
    if not rows:
        sys.exit(f"pareto.py: error: no rows in {args.csv}")
    args.svg.parent.mkdir(parents=True, exist_ok=True)
    args.svg.write_text(draw(rows))


if __name__ == "__main__":
    main()
