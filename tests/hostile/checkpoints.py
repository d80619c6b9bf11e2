"""Hostile folders of safetensors. They have no digests: what a flipped bit of a tensor changes, nobody can see."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from hostile.case import Case, Expect
from hostile.containers import patched

SINGLE, INDEX = "c/model.safetensors", "c/model.safetensors.index.json"


def tensors() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "embed.weight": generator.normal(size=(9, 4)).astype(np.float32),
        "layer.half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "layer.bias": np.arange(5),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 4), np.float32),
    }


def write_good(folder: Path) -> None:
    """single/ and shards/: the same tensors in one file, and in two with an index."""
    (folder / "single").mkdir()
    (folder / "shards").mkdir()
    safetensors.numpy.save_file(tensors(), folder / "single" / "model.safetensors", {"format": "pt"})
    halves = [list(tensors().items())[:2], list(tensors().items())[2:]]
    places = {}
    for number, half in enumerate(halves, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        safetensors.numpy.save_file(dict(half), folder / "shards" / file)
        places |= {name: file for name, _ in half}
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": places})
    (folder / "shards" / "model.safetensors.index.json").write_text(text)


def case(what: str, files: dict[str, bytes], expect: Expect = "refused", good: Path | None = None, **more: Any) -> Case:
    return Case(f"safetensors: {what}", files, expect, "checkpoint", "c", str(good or ""), **more)


def raw(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file without the library, which would not write a wrong one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[Any], start: Any, stop: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def bytes_of(folder: Path) -> Iterator[Case]:
    """Flipped bits, and ends at every boundary, of the single file, of a shard and of the index."""
    single, shards = folder / "single", folder / "shards"
    content = (single / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    generator = random.Random(1)
    for _ in range(400):
        bit = generator.randrange(start * 8)
        damaged = patched(content, bit // 8, bytes([content[bit // 8] ^ 1 << bit % 8]))
        yield case(f"bit {bit} of the header", {SINGLE: damaged}, "any", single)
    header = json.loads(content[8:start])
    header.pop("__metadata__")
    ends = {0, 7, 8, 9, start - 1, start, start + 1, len(content) - 1}
    ends |= {start + offset for each in header.values() for offset in each["data_offsets"]} - {len(content)}
    for end in sorted(ends):
        yield case(f"ends at {end}", {SINGLE: content[:end]})
    yield case("a byte more", {SINGLE: content + b"\0"})
    files = {f"c/{path.name}": path.read_bytes() for path in shards.iterdir()}
    for name, text in files.items():
        for _ in range(100):
            bit = generator.randrange(min(len(text), 600) * 8)
            damaged = patched(text, bit // 8, bytes([text[bit // 8] ^ 1 << bit % 8]))
            yield case(f"bit {bit} of {name}", files | {name: damaged}, "any", shards)
        for end in range(0, len(text), 50):
            yield case(f"{name} ends at {end}", files | {name: text[:end]})
        yield case(f"without {name}", {other: text for other, text in files.items() if other != name})


def quantized(folder: Path, flips: int) -> Iterator[Case]:
    """Flipped bits of the header, of config.json and of the first data, and files cut short, of a quantized folder."""
    files = {name: (folder / name).read_bytes() for name in ("model.safetensors", "config.json")}
    weights = files["model.safetensors"]
    start = 8 + int.from_bytes(weights[:8], "little")
    generator = random.Random(folder.name)

    def changed(what: str, name: str, data: bytes) -> Case:
        packed = {f"c/{file}": data if file == name else old for file, old in files.items()}
        return Case(f"{folder.name}: {what}", packed, "any", "quantized", "c", str(folder))

    for name, first, end in (
        ("model.safetensors", 8, start), ("model.safetensors", start, len(weights)),
        ("config.json", 0, len(files["config.json"])),
    ):  # fmt: skip
        for _ in range(flips):
            bit = generator.randrange(first * 8, end * 8)
            data = files[name]
            flipped = patched(data, bit // 8, bytes([data[bit // 8] ^ 1 << bit % 8]))
            yield changed(f"bit {bit} of {name}", name, flipped)
            cut = generator.randrange(end)
            yield changed(f"{name} ends at {cut}", name, data[:cut])
    text = files["config.json"].decode()
    for old, new in (("32", "-32"), ("32", "4611686018427387904"), ("4", "null"), ('"', "["), ("{", "[{")):
        yield changed(f"{old} becomes {new}", "config.json", text.replace(old, new).encode())


def headers() -> Iterator[Case]:
    """Headers that lie."""
    good = {"a": entry([2], 0, 8)}
    lies: dict[str, dict[str, Any] | bytes] = {
        "2^62 elements": {"a": entry([2**62], 0, 8)},
        "2^62 bytes": {"a": entry([2**60], 0, 2**62)},
        "2^64 elements": {"a": entry([2**64], 0, 8)},
        "a product that wraps": {"a": entry([2**32, 2**32, 2], 0, 8)},
        "a product that wraps to 0": {"a": entry([2**32, 2**32], 0, 0)},
        "an empty axis that hides 2^62": {"a": entry([0, 2**62], 0, 0)},
        "an empty axis that hides 2^63": {"a": entry([2**63, 0], 0, 0)},
        "an empty axis that hides 2^63 - 1": {"a": entry([2**63 - 1, 2**63 - 1, 0], 0, 0)},
        "65 axes": {"a": entry([1] * 64 + [2], 0, 8)},
        "100,000 axes": {"a": entry([1] * 10**5 + [2], 0, 8)},
        "a negative axis": {"a": entry([-2], 0, 8)},
        "half an axis": {"a": entry([2.5], 0, 8)},
        "an axis of text": {"a": entry(["2"], 0, 8)},
        "true as an axis": {"a": entry([True, 2], 0, 8)},
        "offsets backwards": {"a": entry([2], 8, 0)},
        "negative offsets": {"a": entry([2], -8, 0)},
        "offsets past the end": {"a": entry([2], 8, 16)},
        "offsets that overlap": {"a": entry([2], 0, 8), "b": entry([2], 0, 8)},
        "offsets that leave a hole": {"a": entry([1], 4, 8)},
        "offsets of text": {"a": entry([2], "0", "8")},
        "three offsets": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}},
        "a dtype that is unknown": {"a": entry([2], 0, 8, "F99")},
        "a dtype of 4 bits": {"a": entry([16], 0, 8, "F4")},
        "a dtype of a million characters": {"a": entry([2], 0, 8, "F" * 10**6)},
        "a dtype that is a number": {"a": entry([2], 0, 8, 32)},
        "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
        "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
        "no object": {"a": 1},
        "a list": b"[]",
        "null": b"null",
        "no JSON": b"{",
        "a name twice": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        "a key twice": b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "no UTF-8": b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "a lone surrogate": b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "depth": b'{"a":' * 10**5,
        "metadata of numbers": {"__metadata__": {"a": 1}} | good,
        "metadata that is a list": {"__metadata__": []} | good,
        "a number of 10,000 digits": b'{"a":{"dtype":"F32","shape":[' + b"9" * 10**4 + b'],"data_offsets":[0,8]}}',
    }
    for what, header in lies.items():
        empty = (
            isinstance(header, dict)
            and "a" in header
            and header["a"] != 1
            and header["a"].get("data_offsets") == [0, 0]
        )
        yield case(what, {SINGLE: raw(header, b"" if empty else bytes(8))})
    for lie in (0, 1, 10**5, 100_000_001, 2**31, 2**62, 2**63, 2**64 - 1):
        yield case(f"a header of {lie} bytes", {SINGLE: raw(good, bytes(8), lie)})
    yield case("another magic", {SINGLE: b"PAR1" + bytes(100)})


def bombs() -> Iterator[Case]:
    """Headers and files that are long."""
    yield case("16 GiB of nothing", {SINGLE: struct.pack("<Q", 10**6)}, sparse={SINGLE: 16 << 30})
    yield case("a header of 99 MB of spaces", {SINGLE: raw(b"{" + b" " * 99_000_000 + b"}")}, "any")
    yield case("an index of 16 GiB", {INDEX: b"{"}, sparse={INDEX: 16 << 30})
    for shape in ("[]", "[1,1,1,1,1,1]"):
        text, count = bytearray(b"{"), 0
        while len(text) < 60_000_000:
            text += b'"%x":{"dtype":"U8","shape":%s,"data_offsets":[%d,%d]},' % (
                count,
                shape.encode(),
                count,
                count + 1,
            )
            count += 1
        text[-1:] = b"}"
        yield case(f"{count} tensors of shape {shape}", {SINGLE: raw(bytes(text), bytes(count))}, "any")
    weights = ",".join(f'"{index:x}":"a"' for index in range(1_500_000))
    yield case(
        "an index of 1,500,000 names", {INDEX: b'{"weight_map":{' + weights.encode() + b"}}", "c/a": raw({}, b"")}
    )
    files = ",".join(f'"{index:x}":"{index:x}"' for index in range(300_000))
    yield case("an index of 300,000 files", {INDEX: b'{"weight_map":{' + files.encode() + b"}}"})


def indexes(folder: Path) -> Iterator[Case]:
    """Indexes that lead elsewhere."""
    good = (folder / "single" / "model.safetensors").read_bytes()
    for target in (
        "../model.safetensors", "..", ".", "", "/etc/passwd", "sub/../one.safetensors", "sub/one.safetensors", "one\0",
        "one\n", "~", "x" * 300, "x/" * 3000 + "x", "\ud800", ".one.safetensors", "con", "c:\\one", "file:///etc/passwd",
        1, None, True, [], {}, 1e300,
    ):  # fmt: skip
        text = json.dumps({"weight_map": {"embed.weight": target}}).encode()
        files = {INDEX: text, "model.safetensors": good, "c/sub/one.safetensors": good}
        yield case(f"index names {str(target)[:30]!r}", files)
    for text in (b"", b"{", b"[]", b"{}", b"null", b'{"weight_map":1}', b"\xff", b"[" * 10**5, b'{"weight_map":{}}'):
        yield case(f"index {text[:20]!r}", {INDEX: text})
    one = json.dumps({"weight_map": {"embed.weight": "one.safetensors"}}).encode()
    yield case("a shard that is a link to nothing", {INDEX: one}, links={"c/one.safetensors": "nowhere"})
    yield case("a shard that is a link to itself", {INDEX: one}, links={"c/one.safetensors": "one.safetensors"})
    yield case("a shard that is a device", {INDEX: one}, links={"c/one.safetensors": "/dev/zero"})
    yield case("a shard that is a folder", {INDEX: one, "c/one.safetensors/x": b""})
    yield case("an index that is a folder", {INDEX + "/x": b""})
    yield case("a file that is a folder", {SINGLE + "/x": b""})
    yield case("a file that is a device", {}, links={"c": "."})
    yield case("nothing", {"c/x": b""})
