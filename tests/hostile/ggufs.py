"""Hostile GGUF files. They have no digests: what a flipped bit of a tensor changes, nobody can see."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf_file import F32, Q4_0, floats, header, tensor, text, whole
from hostile.case import Case, Expect
from hostile.containers import patched

GOLDEN = Path(__file__).parents[1] / "golden" / "gguf" / "llama.gguf"
NAME = "m.gguf"
DATA = 2464
"""Where the tensors of the golden file begin: its header is what the tests are about."""
HUGE = (2**31, 2**32, 2**62, 2**63, 2**64 - 1)
ARCH = ("general.architecture", "llama")
FIELDS: dict[str, Any] = {
    "general.architecture": "llama", "llama.embedding_length": 8, "llama.attention.head_count": 2,
    "llama.block_count": 1, "llama.context_length": 16, "llama.feed_forward_length": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
EMBED = {"token_embd.weight": floats((3, 8))}


def case(what: str, content: bytes, expect: Expect = "refused", **more: Any) -> Case:
    return Case(f"gguf: {what}", {NAME: content}, expect, "gguf", NAME, **more)


def head(fields: list[tuple[str | bytes, Any]], tensors: list[bytes], **more: Any) -> bytes:
    return header([ARCH, *fields], tensors, **more) + bytes(256)


def flips(count: int, seed: int = 0) -> Iterator[Case]:
    """Single bits of the header turned over."""
    content, generator = GOLDEN.read_bytes(), random.Random(seed)
    for _ in range(count):
        bit = generator.randrange(DATA * 8)
        damaged = patched(content, bit // 8, bytes([content[bit // 8] ^ 1 << bit % 8]))
        yield case(f"bit {bit}", damaged, "any", good=str(GOLDEN))


def truncations(step: int) -> Iterator[Case]:
    """The file ends within the header, or within the tensors."""
    content = GOLDEN.read_bytes()
    ends = {*range(0, DATA, step), *range(DATA, len(content), step * 16)}
    for end in sorted(ends | {len(content) - 1}):
        yield case(f"ends at {end}", content[:end])


def numbers() -> Iterator[Case]:
    """Each aligned or unaligned number of 8 bytes in the header says 2^62, or nothing."""
    content, generator = GOLDEN.read_bytes(), random.Random(2)
    for _ in range(200):
        at = generator.randrange(8, DATA - 8)
        for lie in (2**62, 0):
            yield case(f"{lie} at {at}", patched(content, at, struct.pack("<Q", lie)), "any", good=str(GOLDEN))


def headers() -> Iterator[Case]:
    """Headers that lie."""
    embed = tensor("token_embd.weight", (3, 8), F32, 0)
    for lie in HUGE:
        yield case(f"{lie} tensors", head([], [embed], counts=(lie, 1)))
        yield case(f"{lie} fields", head([], [embed], counts=(1, lie)))
        yield case(f"a key of {lie} bytes", head([], [], counts=(0, 2)) + struct.pack("<Q", lie))
        yield case(f"text of {lie} bytes", head([("a", struct.pack("<IQ", 8, lie))], [embed]))
        yield case(f"an array of {lie} numbers", head([("a", struct.pack("<IIQ", 9, 4, lie))], [embed]))
        yield case(f"an array of {lie} texts", head([("a", struct.pack("<IIQ", 9, 8, lie))], [embed]))
        yield case(f"an array of a text of {lie} bytes", head([("a", struct.pack("<IIQQ", 9, 8, 1, lie))], [embed]))
        yield case(f"{lie} rows", head([], [tensor("token_embd.weight", (lie, 8), F32, 0)]))
        yield case(f"{lie} columns", head([], [tensor("token_embd.weight", (3, lie), F32, 0)]))
        yield case(f"an offset of {lie}", head([], [tensor("token_embd.weight", (3, 8), F32, lie)]))
        yield case(f"an empty axis that hides {lie}", head([], [tensor("token_embd.weight", (0, lie, lie), F32, 0)]))
        yield case(f"an alignment of {lie}", head([("general.alignment", struct.pack("<IQ", 10, lie))], [embed]))
    for lie in (0, 3, -1, 1.5, True, "32", [32, 32]):
        kind = struct.pack("<Ii", 5, lie) if lie == -1 else lie
        yield case(f"an alignment of {lie!r}", head([("general.alignment", kind)], [embed]))
    for version in (0, 1, 4, 2**24 * 3, 2**32 - 1):
        yield case(f"version {version}", whole(FIELDS, EMBED, version))
    wrong: dict[str, list[bytes]] = {
        "a name twice": [embed, tensor("token_embd.weight", (3, 8), F32, 96)],
        "an offset that overlaps": [embed, tensor("output_norm.weight", (8,), F32, 0)],
        "an offset that leaves a hole": [embed, tensor("output_norm.weight", (8,), F32, 128)],
        "an offset that is not aligned": [embed, tensor("output_norm.weight", (8,), F32, 97)],
        "no name": [tensor("", (3, 8), F32, 0)],
        "a name of 64 bytes": [tensor("x" * 64, (3, 8), F32, 0)],
        "a name that is no UTF-8": [tensor(b"\xff.weight", (3, 8), F32, 0)],
        "a name that is a path": [tensor("../../x.weight", (3, 8), F32, 0)],
        "5 axes": [tensor("token_embd.weight", (1, 1, 1, 3, 8), F32, 0)],
        "2^32 - 1 axes": [text("token_embd.weight") + struct.pack("<I", 2**32 - 1)],
        "a product that wraps": [tensor("token_embd.weight", (2**32, 2**32, 2), F32, 0)],
        "a product that wraps to 0": [tensor("token_embd.weight", (2**32, 2**32), F32, 0)],
        "a type that is not known": [tensor("token_embd.weight", (3, 8), 4, 0)],
        "a type of 2^32 - 1": [tensor("token_embd.weight", (3, 8), 2**32 - 1, 0)],
        "half a block": [tensor("token_embd.weight", (3, 16), Q4_0, 0)],
        "a block without axes": [tensor("token_embd.weight", (), Q4_0, 0)],
        "a type that no table holds": [tensor("token_embd.weight", (1, 256), 16, 0)],
        "past the end": [tensor("token_embd.weight", (2**20, 2**10), F32, 0)],
    }
    for what, tensors in wrong.items():
        yield case(what, head([], tensors))
    fields: dict[str, tuple[str | bytes, Any]] = {
        "a key twice": ARCH,
        "a key that is no UTF-8": (b"\xff", 1),
        "a key of 65,536 bytes": ("x" * 65536, 1),
        "a type of fields that is not known": ("a", struct.pack("<I", 13)),
        "an array of arrays": ("a", struct.pack("<IIQIQ", 9, 9, 1, 4, 0)),
        "a boolean of 2": ("a", struct.pack("<IB", 7, 2)),
        "text that is no UTF-8": ("a", struct.pack("<I", 8) + text(b"\xff")),
    }
    for what, one in fields.items():
        yield case(what, head([one], [embed]))
    yield case("another magic", b"GGML" + bytes(100))
    yield case("no tensors", whole(FIELDS, {}))
    yield case("nothing", b"")
    yield case("only a magic", b"GGUF")


def said() -> Iterator[Case]:
    """Fields that a model cannot have."""
    lies: dict[str, dict[str, Any]] = {
        "no width": {"llama.embedding_length": 0},
        "a width of text": {"llama.embedding_length": "8"},
        "2^32 - 1 layers": {"llama.block_count": 2**32 - 1},
        "no heads": {"llama.attention.head_count": 0},
        "an epsilon of NaN": {"llama.attention.layer_norm_rms_epsilon": float("nan")},
        "a base of infinity": {"llama.rope.freq_base": float("inf")},
        "a scaling that is not known": {"llama.rope.scaling.type": "x" * 10**6},
        "scalings": {"llama.rope.scaling.type": [1, 2]},
        "whether it is causal, twice": {"general.architecture": "bert", "bert.attention.causal": [True, False]},
        "an architecture of a million characters": {"general.architecture": "x" * 10**6},
        "an architecture that is a number": {"general.architecture": 1},
        "architectures": {"general.architecture": ["llama", "bert"]},
        "widths": {"llama.embedding_length": [8, 8]},
        "a temperature of NaN": {"general.sampling.temp": float("nan")},
        "a top-k of text": {"general.sampling.top_k": "x" * 10**6},
        "temperatures": {"general.sampling.temp": [0.5, 0.5]},
        "2^32 - 1 parts": {"split.count": 2**32 - 1},
        "two parts": {"split.count": 2},
    }
    for what, fields in lies.items():
        yield case(what, whole(FIELDS | fields, EMBED))
    tokens = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
    }
    words: dict[str, dict[str, Any]] = {
        "tokens that are numbers": {"tokenizer.ggml.tokens": [1, 2, 3]},
        "tokens that are text": {"tokenizer.ggml.tokens": "abc"},
        "a token that is no UTF-8": {"tokenizer.ggml.tokens": struct.pack("<IIQ", 9, 8, 3) + text(b"\xff") * 3},
        "one type for three tokens": {"tokenizer.ggml.token_type": [1]},
        "types that are no whole numbers": {"tokenizer.ggml.token_type": [1.0, float("nan"), 1.0]},
        "a begin that is there, twice": {"tokenizer.ggml.add_bos_token": [True, True]},
        "a merge of nothing": {"tokenizer.ggml.merges": ["ab"]},
        "a merge of what is no token": {"tokenizer.ggml.merges": ["a x"]},
        "a begin that is no token": {"tokenizer.ggml.bos_token_id": 3},
        "a begin that is text": {"tokenizer.ggml.bos_token_id": "a"},
        "an end that is no token": {"tokenizer.ggml.eom_token_id": 3},
        "separators that are there, twice": {"tokenizer.ggml.add_sep_token": [True, True]},
        "a template that is a number": {"tokenizer.chat_template": 1},
        "a named template that is a number": {"tokenizer.chat_template": "", "tokenizer.chat_template.x": 1},
        "scores that are NaN": {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0, float("nan"), 0.0]},
        "no scores": {"tokenizer.ggml.model": "llama"},
    }
    for what, fields in words.items():
        yield case(what, whole(FIELDS | tokens | fields, EMBED))
    for kind in ("", "t5", "x" * 10**6):
        yield case(
            f"a tokenizer of {kind[:8]!r}", whole(FIELDS | tokens | {"tokenizer.ggml.model": kind}, EMBED), "any"
        )


def bombs() -> Iterator[Case]:
    """Sparse files whose headers are long."""
    for size in (1 << 30, 16 << 30):
        for what, counts in (("tensors", (2**16, 1)), ("fields", (1, 2**16))):
            content = header([ARCH], [], counts=counts)
            yield case(f"{size >> 30} GiB of {what} of nothing", content, sparse={NAME: size})
        texts = header([ARCH, ("a", struct.pack("<IIQ", 9, 8, 2**27))], [], counts=(0, 2))
        yield case(f"{size >> 30} GiB of empty texts", texts, sparse={NAME: size})
        numbers = header([ARCH, ("a", struct.pack("<IIQ", 9, 10, size // 8 - 64))], [], counts=(0, 2))
        yield case(f"{size >> 30} GiB of numbers", numbers, sparse={NAME: size})
    long = ["a" * 2**20, "a"]
    words = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": long, "tokenizer.ggml.scores": [0.0, 0.0]}
    yield case("a token of a million characters", whole(FIELDS | words, EMBED), "any")


def long_headers() -> Iterator[Case]:
    """Headers that are long, and hold what they say."""
    many = struct.pack("<IIQ", 9, 8, 10**6) + text("") * 10**6
    yield case("a million empty texts", whole(FIELDS | {"tokenizer.ggml.tokens": many}, EMBED), "any")
    fields = {f"{index:x}": 1 for index in range(60_000)}
    yield case("60,000 fields", whole(FIELDS | fields, EMBED), "any")
    tensors = {f"blk.{index}.attn_norm.weight": ((1,), F32, bytes(4)) for index in range(60_000)}
    yield case("60,000 tensors", whole(FIELDS, EMBED | tensors), "any")
    merges = [text("a b")] * 300_000
    words = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": struct.pack("<IIQ", 9, 8, len(merges)) + b"".join(merges),
    }  # fmt: skip
    yield case("300,000 merges", whole(FIELDS | words, EMBED), "any")
