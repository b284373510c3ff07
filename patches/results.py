"""Results as CSV files whose first lines say where they come from: `# commit: ...`, `# machine: ...`, `# command: ...`."""

import csv
import os
import pathlib
import shlex
import subprocess
import sys

from runs import ROOT, RunError, find

TEXT_FIELDS = ("model", "text", "context", "cache", "recipe", "backend")


def head_and_lines(path):
    """(what the head of a CSV says of it, the other lines)."""
    if not (ROOT / path).is_file():
        raise RunError(f"no {path}")
    lines = (ROOT / path).read_text().splitlines()
    head = dict(line[1:].strip().split(": ", 1) for line in lines if line.startswith("#"))
    return head, [line for line in lines if not line.startswith("#")]


def read(path):
    """Rows of a CSV, numbers as numbers."""
    return [{field: value if field in TEXT_FIELDS else float(value) for field, value in row.items()}
            for row in csv.DictReader(head_and_lines(path)[1])]


def machine():
    """The processor and its number of cores."""
    try:
        cpu = find(r"^model name\s*: (.*)$", pathlib.Path("/proc/cpuinfo").read_text(), str)
    except OSError:
        cpu = None
    return f"{(cpu or 'unknown processor').strip()}, {os.cpu_count()} cores"


def provenance():
    """What the head of a CSV says: commit of this project (with + if files differ from it), machine, command."""
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty=+", "--exclude=*"], stdout=subprocess.PIPE,
                         stderr=subprocess.DEVNULL, text=True)
    words = [os.path.relpath(sys.argv[0], ROOT), *(os.path.relpath(w, ROOT) if os.path.exists(w) else w for w in sys.argv[1:])]
    return {"commit": git.stdout.strip() or "unknown", "machine": machine(), "command": shlex.join(words)}
