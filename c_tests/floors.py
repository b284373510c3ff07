#!/usr/bin/env -S python3 -B
"""Imports in src/ run one way: no circle of files but a parent and its own children.

    c_tests/floors.py             names every other circle, status 1 if there is one
    c_tests/floors.py --list      every file and what it imports

A file imports another if it names anything by a path that begins with `crate::` or `super::`; tests are left out.
"""

import pathlib
import re
import sys

SRC = pathlib.Path(__file__).resolve().parent.parent / "src"


def module_of(path):
    """crate::a::b as a tuple."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return parts[:-1] if parts[-1] in ("mod", "lib") else parts


def without_tests_and_comments(text):
    text = re.sub(r"//[^\n]*", "", text)
    # Test modules stand at the end of their file.
    return re.split(r"#\[cfg\((?:test|all\(test)[^\]]*\]\s*(?:pub(?:\([^)]*\))? )?mod \w+ \{", text)[0]


def flatten(tree):
    """The paths of `a::{b, c::{d, e}}`."""
    match = re.match(r"^([\w:]*?)(?:::)?\{(.*)\}$", tree.strip(), re.DOTALL)
    if not match:
        return [re.sub(r"\s+as\s+\w+", "", tree.strip())]
    prefix, body = match.groups()
    parts, depth, start = [], 0, 0
    for i, c in enumerate(body):
        depth += {"{": 1, "}": -1}.get(c, 0)
        if c == "," and depth == 0:
            parts.append(body[start:i])
            start = i + 1
    parts.append(body[start:])
    return [f"{prefix}::{path}" for part in parts if part.strip() for path in flatten(part)]


def paths_in(text):
    """Every path of the crate that a file names."""
    uses = re.findall(r"\buse\s+((?:crate|super)\b[^;]*);", text)
    rest = re.sub(r"\buse\s+[^;]*;", "", text)
    named = re.findall(r"\b(?:crate|super)(?:::\w+)+", rest)
    return [path for use in uses for path in flatten(use)] + named


def imports(files):
    """{file: files it imports}."""
    by_module = {module_of(path): path for path in files}
    graph = {}
    for path in files:
        here = module_of(path)
        found = set()
        for name in paths_in(without_tests_and_comments(path.read_text())):
            words = name.split("::")
            base = ()
            while words and words[0] in ("crate", "super", "self"):
                word = words.pop(0)
                base = () if word == "crate" else (base or here)[:-1] if word == "super" else here
            target = (*base, *words)
            # What a module names is in the longest module that is a file.
            while target and target not in by_module:
                target = target[:-1]
            if target and by_module[target] != path:
                found.add(by_module[target])
        # A parent knows its children.
        for child in re.findall(r"^\s*(?:pub(?:\([^)]*\))? )?mod (\w+);", without_tests_and_comments(path.read_text()), re.M):
            if (*here, child) in by_module and here:
                found.add(by_module[(*here, child)])
        graph[path] = found
    return graph


def circles(graph):
    """Strongly connected files (Tarjan), those of more than one file."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            circle = []
            while not circle or circle[-1] != node:
                circle.append(stack.pop())
            if len(circle) > 1:
                found.append(circle)
    for node in graph:
        if node not in index:
            visit(node)
    return found


def is_family(circle):
    """Whether one file is the parent of all others."""
    modules = [module_of(path) for path in circle]
    parent = min(modules, key=len)
    return all(module == parent or module[:-1] == parent for module in modules)


def main():
    # lib.rs names everything; tests may.
    files = [path for path in sorted(SRC.rglob("*.rs"))
             if path.name not in ("lib.rs", "tests.rs") and not path.stem.endswith("_tests")
             and "tests" not in path.parts and "bench" not in path.relative_to(SRC).parts]
    graph = imports(files)
    if "--list" in sys.argv:
        for path, found in graph.items():
            print(path.relative_to(SRC), "->", *sorted(str(p.relative_to(SRC)) for p in found))
    found = circles(graph)
    bad = [circle for circle in found if not is_family(circle)]
    for circle in bad:
        print(f"a circle of {len(circle)} files:", *sorted(str(p.relative_to(SRC)) for p in circle))
    print(f"{len(files)} files, largest circle {max(map(len, found), default=0)}, circles beside families: {len(bad)}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
