"""Writes GGUF files by hand, right ones and wrong ones: github.com/ggml-org/ggml, docs/gguf.md, in a few lines."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8
BYTES = {F32: (1, 4), F16: (1, 2), Q4_0: (32, 18), Q8_0: (32, 34)}

LLAMA: dict[str, Any] = {
    "general.architecture": "llama", "llama.embedding_length": 8, "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1, "llama.block_count": 1, "llama.context_length": 16,
    "llama.feed_forward_length": 4, "llama.attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
"""The fields of a small Llama without a tokenizer."""


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def field(value: Any) -> bytes:
    """A field's type and value: whole numbers are uint32, floats float32, lists arrays of one of these."""
    if isinstance(value, bytes):  # as it is
        return value
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    items = [field(item) for item in value]
    return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)


def tensor(name: str | bytes, shape: Sequence[int], kind: int, offset: int) -> bytes:
    axes = b"".join(struct.pack("<Q", n) for n in reversed(shape))
    return text(name) + struct.pack("<I", len(shape)) + axes + struct.pack("<IQ", kind, offset)


def header(
    fields: Sequence[tuple[str | bytes, Any]], tensors: Sequence[bytes], version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:  # fmt: skip
    told = counts or (len(tensors), len(fields))
    start = b"GGUF" + struct.pack("<IQQ", version, *told)
    return start + b"".join(text(key) + field(value) for key, value in fields) + b"".join(tensors)


def whole(
    fields: Mapping[str, Any], tensors: Mapping[str, tuple[Sequence[int], int, bytes]], version: int = 3,
    alignment: int = 32,
) -> bytes:  # fmt: skip
    """A file of tensors {name: (shape, type, bytes)}."""
    entries, data = [], b""
    for name, (shape, kind, raw) in tensors.items():
        data += bytes(-len(data) % alignment)
        entries.append(tensor(name, shape, kind, len(data)))
        data += raw
    head = header(list(fields.items()), entries, version)
    return head + bytes(-len(head) % alignment) + data


def floats(shape: Sequence[int], seed: int = 0) -> tuple[Sequence[int], int, bytes]:
    return shape, F32, np.random.default_rng(seed).normal(size=shape).astype("<f4").tobytes()
