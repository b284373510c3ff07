"""The texts that quality is measured on where none is given: prose of models/, and code, which is this project's own."""

import itertools

from runs import ROOT

PROSE = ROOT / "models/amazon-excerpt.txt"
# Some 40 000 tokens. A little more than is scored: what the text holds changes with fewer files.
CODE_BYTES = 128 << 10


def code():
    """Path of the code text: Rust and C++ files in turn, each below a comment that names it."""
    rust = sorted(ROOT.glob("src/**/*.rs"))
    glue = sorted(p for p in ROOT.glob("patches/glue/*") if p.suffix in (".cpp", ".h"))
    text = ""
    for path in filter(None, itertools.chain.from_iterable(itertools.zip_longest(rust, glue))):
        if len(text) >= CODE_BYTES:
            break
        text += f"// {path.relative_to(ROOT)}\n\n{path.read_text()}\n"
    target = ROOT / "build/eval/code.txt"
    target.parent.mkdir(parents=True, exist_ok=True)
    # Its time is part of what finished runs are known by, so it changes only with the text.
    if not target.exists() or target.read_text() != text:
        target.write_text(text)
    return target
