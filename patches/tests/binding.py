#!/usr/bin/env -S python3 -B
"""llama-cpp-python on the patched libllama: a text is read and continued, a state saved and restored, with an f16 cache and with one
that LLAMA_ARG_KVQ names.

    patches/tests/binding.py [--bin build/llama/bin]
    patches/tests/binding.py --fetch        only makes it ready, in build/binding

The binding is that of the source distribution that patches/UPSTREAM pins, so its structs are those of the library; what it
imports comes from the Python package index. Status 3: that cannot be reached.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tarfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from runs import ROOT, RunError

KV = "4"
NEEDS = ["numpy", "typing-extensions", "diskcache", "jinja2"]
PROGRAM = """
import sys
from llama_cpp import Llama
model, text = sys.argv[1:]
llama = Llama(model, n_ctx=1024, n_ubatch=64, n_threads=2)
prompt = open(text, encoding="utf-8", errors="replace").read()[:2600]
say = lambda n: llama(prompt, max_tokens=n, temperature=0)["choices"][0]["text"]
first = say(32)
state = llama.save_state()
llama.reset()
llama.load_state(state)
if say(32) != first:
    sys.exit("another text after the state was restored")
print(first)
"""


def unpack(folder):
    """The binding without its library, and what it imports, in `folder`."""
    package = (ROOT / "patches/UPSTREAM").read_text().split()[0]
    archive = ROOT / "build/sdist" / f"{package.replace('-', '_').replace('==', '-')}.tar.gz"
    if not archive.exists():
        raise RunError(f"no {archive}: run patches/build.sh first")
    if not (folder / "llama_cpp").exists():
        with tarfile.open(archive) as tar:
            for member in tar:
                path = pathlib.PurePath(*pathlib.PurePath(member.name).parts[1:])
                if path.parts[:1] == ("llama_cpp",) and member.isfile():
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    (folder / path).write_bytes(tar.extractfile(member).read())
    if not (folder / "numpy").exists():
        pip = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, *NEEDS], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if pip.returncode != 0:
            print(pip.stdout)
            print(f"binding.py: {' '.join(NEEDS)} cannot be installed")
            sys.exit(3)


def said(folder, programs, kv):
    env = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
    env.update(PYTHONPATH=str(folder), LLAMA_CPP_LIB_PATH=str(programs), **({"LLAMA_ARG_KVQ": kv} if kv else {}))
    command = [sys.executable, "-c", PROGRAM, ROOT / "models/tiny-12m-q8_0.gguf", ROOT / "models/amazon-excerpt.txt"]
    run = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", timeout=300)
    if run.returncode != 0 or ("bits per value of K" in run.stderr) != bool(kv):
        raise RunError(f"status {run.returncode} with {kv or 'f16'}:\n" + "\n".join(run.stderr.splitlines()[-12:]))
    return run.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=ROOT / "build/llama/bin")
    parser.add_argument("--fetch", action="store_true")
    args = parser.parse_args()
    programs, folder = args.bin.resolve(), ROOT / "build/binding"
    folder.mkdir(parents=True, exist_ok=True)
    unpack(folder)
    if args.fetch:
        return
    exact, packed = said(folder, programs, ""), said(folder, programs, KV)
    print(packed)
    if exact != packed or len(packed) < 40:
        raise RunError(f"f16 says {exact!r}")
    print("ok")


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"binding.py: error: {error}")
