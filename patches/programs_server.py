"""The part of programs.py that asks llama-server over HTTP. Each check asks a server with an f16 cache and one with a kvq cache the
same things, and wants the same answers."""

import http.client
import json
import math
import urllib.parse

import checks
from passkey import server
from runs import RunError

CASES = []


def case(run, asked):
    def register(check):
        CASES.append((run, asked, check))
        return check
    return register


def same(on, name, ask, *extra, packed=None):
    """What `ask` gets of both servers, which has to be the same, and must be something."""
    found, packed = {}, packed or on.kv
    for kv in ("f16", packed):
        log = on.work / f"server-{name}-{kv.split(':')[0]}.log"
        with server(on.folder, on.model, kv, 4096, log, 1, n_parallel=2, extra=["-kvu", *extra]) as one:
            found[kv] = ask(one)
        if ("bits per value of K" in log.read_text(errors="replace")) != (kv != "f16"):
            raise RunError(f"{log.name} says the wrong thing on kvq")
    if found["f16"] != found[packed] or not found[packed]:
        raise RunError(f"{found}")
    return found[packed]


def complete(one, prompt, n=24, **more):
    answer = one.post("/completion", {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True, **more})
    return answer["content"], answer["timings"]["cache_n"]


def chat_body(on, **more):
    return {"messages": [{"role": "system", "content": on.text[:1500]}, {"role": "user", "content": "Go on."}],
            "temperature": 0, "max_tokens": 24, **more}


@case("chat", "the text of f16")
def chat(on):
    same(on, "chat", lambda one: one.post("/v1/chat/completions", chat_body(on))["choices"][0]["message"]["content"])


# A template without special tokens, which the small model's tokenizer lacks. The model calls no tool of its own accord.
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@case("tools offered; an answer that a JSON schema forces", "the text of f16, which the schema allows")
def tools(on):
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]}
    tool = {"type": "function", "function": {"name": "paint", "description": "paints", "parameters": schema}}
    forced = {"type": "json_schema", "json_schema": {"schema": schema}}

    def ask(one):
        bodies = [chat_body(on, tools=[tool], parallel_tool_calls=True), chat_body(on, response_format=forced, max_tokens=200)]
        return [one.post("/v1/chat/completions", body)["choices"][0]["message"]["content"] for body in bodies]
    if json.loads(same(on, "tools", ask, "--jinja", "--chat-template", TEMPLATE)[1])["colour"] not in ("red", "green"):
        raise RunError("the schema does not allow that")


@case("n = 2", "two answers, each the text of f16")
def several(on):
    def ask(one):
        return [choice["message"]["content"] for choice in one.post("/v1/chat/completions", chat_body(on, n=2))["choices"]]
    if len(same(on, "several", ask)) != 2:
        raise RunError("expected two answers")


@case("embeddings", "cosine to f16's above .999")
def embeddings(on):
    found = []
    for kv in ("f16", on.kv):
        extra = ["--embeddings", "--pooling", "mean", "-ub", 2048]
        with server(on.folder, on.model, kv, 4096, on.work / f"server-embeddings-{kv}.log", 1, extra=extra) as one:
            found.append(one.post("/v1/embeddings", {"input": on.prompt[:1500]})["data"][0]["embedding"])
    cosine = sum(x * y for x, y in zip(*found)) / math.prod(math.hypot(*one) for one in found)
    if not 0.999 < cosine < 1.0001 or found[0] == found[1]:
        raise RunError(f"cosine {cosine}")


@case("slots: saved, erased, restored", "tokens and text of f16, the same before and after")
def slots(on):
    def ask(one):
        said = complete(one, on.prompt, id_slot=0, cache_prompt=True)[0]
        n = [one.post("/slots/0?action=save", {"filename": "slot.bin"})["n_saved"]]
        n.append(one.post("/slots/0?action=erase", {})["n_erased"])
        n.append(one.post("/slots/0?action=restore", {"filename": "slot.bin"})["n_restored"])
        again, cached = complete(one, on.prompt, id_slot=0, cache_prompt=True)
        if again != said or cached < 200:
            raise RunError(f"{said!r}, after restoring {cached} tokens {again!r}")
        return said, n, cached
    same(on, "slots", ask, "--slot-save-path", on.work)


# What has left the window of the longer prompt is packed when the shorter one takes it over: 4 bits would say something else.
@case("an answer that is cancelled; `skvq:k=8,v=8`", "the next answers, of which one takes over a part of its prompt, are those of f16")
def cancelled(on):
    def ask(one):
        address = urllib.parse.urlsplit(one.url)
        client = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
        body = {"prompt": on.prompt, "n_predict": 1500, "stream": True, "temperature": 0, "ignore_eos": True, "id_slot": 0}
        client.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        client.getresponse().read(400)
        client.close()
        return complete(one, on.prompt[:1200], id_slot=0)[0], complete(one, on.prompt, id_slot=0)[0]
    same(on, "cancelled", ask, packed="skvq:k=8,v=8")


@case("--cache-reuse", "as many tokens as with f16, the text of f16")
def reuse(on):
    def ask(one):
        complete(one, on.prompt, id_slot=0)
        answer, cached = complete(one, on.prompt[:600] + on.prompt[1200:], id_slot=0)
        if cached < 100:
            raise RunError(f"{cached} tokens were reused")
        return answer, cached
    same(on, "reuse", ask, "--cache-reuse", 32)


@case("context checkpoints of a sliding-window model", "the tokens that f16 takes from its cache")
def checkpoints(on):
    checks.swa_server(on.folder, on.work / "archs/gemma3-dense.gguf", on.kv)
