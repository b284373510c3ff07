#!/usr/bin/env python3
"""Writes a model of llama's architecture with random 4-bit weights and no vocabulary, for measurements of speed and memory,
which do not depend on what a model says. The defaults are the shape of Llama 3 8B.

    patches/random_model.py build/random-8b.gguf
    patches/random_model.py build/random-7b-mha.gguf --kv-heads 32 --ff 11008
"""

import argparse
import pathlib
import random
import struct

F32, Q4_0 = 0, 2
BLOCK = 18  # bytes of 32 weights in Q4_0
ALIGN = 32


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def entry(key, value):
    kind, form = {int: (4, "<I"), float: (6, "<f")}.get(type(value), (8, None))
    return string(key) + struct.pack("<I", kind) + (struct.pack(form, value) if form else string(value))


def tensors(shape, weights):
    """(name, dimensions, type) of all tensors."""
    s = shape
    yield "token_embd", (s.embd, s.vocab), weights
    yield "output_norm", (s.embd,), F32
    yield "output", (s.embd, s.vocab), weights
    for i in range(s.layers):
        yield f"blk.{i}.attn_norm", (s.embd,), F32
        yield f"blk.{i}.ffn_norm", (s.embd,), F32
        yield f"blk.{i}.attn_q", (s.embd, s.heads * s.head_dim), weights
        yield f"blk.{i}.attn_k", (s.embd, s.kv_heads * s.head_dim), weights
        yield f"blk.{i}.attn_v", (s.embd, s.kv_heads * s.head_dim), weights
        yield f"blk.{i}.attn_output", (s.heads * s.head_dim, s.embd), weights
        yield f"blk.{i}.ffn_gate", (s.embd, s.ff), weights
        yield f"blk.{i}.ffn_up", (s.embd, s.ff), weights
        yield f"blk.{i}.ffn_down", (s.ff, s.embd), weights


def n_bytes(dims, kind):
    n = 1
    for dim in dims:
        n *= dim
    return n * 4 if kind == F32 else n // 32 * BLOCK


def random_blocks(n):
    """n blocks of Q4_0 with a deviation of about 0.02, as trained weights have."""
    blocks = bytearray(random.Random(1).randbytes(n * BLOCK))
    for i, byte in enumerate(struct.pack("<e", 0.02 / 4.6)):
        blocks[i::BLOCK] = bytes([byte]) * n
    return bytes(blocks)


def write(path, shape, weights=Q4_0):
    """Writes the model; with weights=F32 all of them, norms included, are zero."""
    metadata = {"general.architecture": "llama", "tokenizer.ggml.model": "none", "llama.vocab_size": shape.vocab,
                "llama.context_length": shape.ctx, "llama.embedding_length": shape.embd,
                "llama.block_count": shape.layers, "llama.feed_forward_length": shape.ff,
                "llama.attention.head_count": shape.heads, "llama.attention.head_count_kv": shape.kv_heads,
                "llama.rope.dimension_count": shape.head_dim, "llama.rope.freq_base": 500000.0,
                "llama.attention.layer_norm_rms_epsilon": 1e-5,
                "llama.attention.key_length": shape.head_dim, "llama.attention.value_length": shape.head_dim}
    all_tensors = list(tensors(shape, weights))
    head = b"GGUF" + struct.pack("<IQQ", 3, len(all_tensors), len(metadata))
    head += b"".join(entry(key, value) for key, value in metadata.items())
    offset = 0
    for name, dims, kind in all_tensors:
        head += string(name + ".weight") + struct.pack(f"<I{len(dims)}Q", len(dims), *dims) + struct.pack("<IQ", kind, offset)
        offset += -(-n_bytes(dims, kind) // ALIGN) * ALIGN
    pool = random_blocks(1 << 20) if weights == Q4_0 else b""
    norm = struct.pack("<f", 1.0 if weights == Q4_0 else 0.0)
    with open(path, "wb") as file:
        file.write(head + bytes(-len(head) % ALIGN))
        for i, (_, dims, kind) in enumerate(all_tensors):
            source = norm if kind == F32 else pool[i * 7919 % 4096 * BLOCK:]  # so that tensors differ
            left = size = n_bytes(dims, kind)
            while left > 0:
                left -= file.write(source[:left] if len(source) > 4 else norm * (left // 4))
            file.write(bytes(-size % ALIGN))


def shape(**changes):
    sizes = {"layers": 32, "embd": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "ff": 14336, "vocab": 32000,
             "ctx": 1 << 20}
    return argparse.Namespace(**{**sizes, **changes})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=pathlib.Path)
    for name, value in vars(shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    write(args.path, args)


if __name__ == "__main__":
    main()
