"""Hostile tables, made of good ones: the golden files, and some that other tools would have written."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hostile import thrift
from hostile.case import Case, Expect
from hostile.containers import PAGE_STORED, PAGE_UNPACKED, Ipc, Parquet, patched

from aq_jax.store import Row, open_table, write_table

GOLDEN = Path(__file__).parents[1] / "golden"
LIES = (-1, 0, 1, 2**31 - 1, 2**62, -(2**63))


@dataclass(frozen=True)
class Good:
    """A good file that hostile ones are made of; `checked` says whether digests cover it."""

    path: Path
    checked: bool = True

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def content(self) -> bytes:
        return self.path.read_bytes()

    @property
    def expect(self) -> Expect:
        return "either" if self.checked else "any"

    def case(self, what: str, content: bytes, expect: Expect | None = None) -> Case:
        name = "m" + self.path.suffix
        return Case(f"{self.name}: {what}", {name: content}, expect or self.expect, good=str(self.path))


def good_files(folder: Path) -> list[Good]:
    """The golden files, one with zstd data, and files without digests: plain, with dictionaries, in several batches."""
    files = [
        Good(GOLDEN / f"{name}.{suffix}")
        for name in ("v1", "v2", "rotated", "grids")
        for suffix in ("parquet", "arrow")
    ]
    with open_table(GOLDEN / "v2.parquet") as table:
        rows = list(table.rows())
        write_table(folder / "zstd.parquet", rows, version=2, compression="zstd", aliases=table.aliases)
    files.append(Good(folder / "zstd.parquet"))
    cells = bare(GOLDEN / "v2.parquet")
    pq.write_table(cells, folder / "dictionary.parquet", compression="snappy", row_group_size=7)
    pq.write_table(cells, folder / "v2pages.parquet", compression="zstd", data_page_version="2.0", use_dictionary=False)
    with pa.ipc.new_file(folder / "batches.arrow", cells.schema) as file:
        file.write_table(cells, max_chunksize=5)
    words = [
        pa.field(f.name, pa.dictionary(pa.int32(), f.type) if f.type == pa.string() else f.type) for f in cells.schema
    ]
    with pa.ipc.new_file(folder / "dictionary.arrow", pa.schema(words)) as file:
        file.write_table(cells.cast(pa.schema(words)))
    return files + [
        Good(folder / name, checked=False)
        for name in ("dictionary.parquet", "v2pages.parquet", "batches.arrow", "dictionary.arrow")
    ]


def bare(path: Path) -> pa.Table:
    """A table without digests and metadata, so that edits are judged by the rules and not by them."""
    return pq.read_table(path).replace_schema_metadata(None).drop_columns(["digest"])


def stored(table: pa.Table, suffix: str, **options: Any) -> bytes:
    """A table as other tools write it."""
    sink = pa.BufferOutputStream()
    if suffix == "parquet":
        pq.write_table(table, sink, **options)
    else:
        with pa.ipc.new_file(sink, table.schema, **options) as file:
            file.write_table(table)
    return sink.getvalue().to_pybytes()


def edited(table: pa.Table, changes: dict[str, Any], row: int = 4) -> pa.Table:
    """A table with some cells of one row changed; integers become as wide as they must."""
    for column, value in changes.items():
        values = table[column].to_pylist()
        values[row] = value
        kind = table.schema.field(column).type
        wide = {pa.int32(): pa.int64()}.get(kind, pa.list_(pa.int64()) if pa.types.is_list(kind) else kind)
        table = table.set_column(table.schema.names.index(column), column, pa.array(values, wide))
    return table


# ------------------------------------------------------------------------------------------------ bytes


def flips(good: Good, count: int, seed: int = 0) -> Iterator[Case]:
    """Single bits turned over, half of them in the last quarter, where footers are."""
    content, generator = good.content, random.Random(f"{good.name} {seed}")
    bits = len(content) * 8
    for index in range(count):
        bit = generator.randrange(bits * 3 // 4 if index % 2 else 0, bits)
        yield good.case(f"bit {bit}", patched(content, bit // 8, bytes([content[bit // 8] ^ 1 << bit % 8])))


def footer_flips(good: Good, step: int) -> Iterator[Case]:
    """A bit in every so many bytes of the footer: some of these end the process inside pyarrow's own accessors."""
    content = good.content
    for byte in range(Parquet(content).footer_start, len(content) - 8, step):
        yield good.case(f"footer byte {byte}", patched(content, byte, bytes([content[byte] ^ 1 << byte % 3])))


def structure(good: Good) -> Parquet | Ipc:
    return Parquet(good.content) if good.path.suffix == ".parquet" else Ipc(good.content)


def truncations(good: Good) -> Iterator[Case]:
    """The file ends at a boundary of its structure, or a byte before or after it."""
    content = good.content
    for boundary in structure(good).boundaries():
        for end in (boundary - 1, boundary, boundary + 1):
            if 0 <= end < len(content):
                yield good.case(f"ends at {end}", content[:end], "refused")


def cuts(good: Good) -> Iterator[Case]:
    """The bytes between two boundaries are missing, or are zeros, and the footer stands where it should, or not."""
    content, found = good.content, structure(good)
    for start, stop in zip(found.boundaries(), found.boundaries()[1:], strict=False):
        if start < found.footer_start:
            yield good.case(f"lacks {start} to {stop}", content[:start] + content[stop:])
            yield good.case(f"zeros from {start} to {stop}", patched(content, start, bytes(stop - start)))
            yield good.case(f"repeats {start} to {stop}", content[:stop] + content[start:])


# ------------------------------------------------------------------------------------------------ headers


def footer_lies(good: Good, step: int = 1) -> Iterator[Case]:
    """Each number in a Parquet footer says something else, or every so many of them."""
    content = good.content
    count = len(list(Parquet(content).footer.integers()))
    for index in range(0, count, step):
        for lie in (*LIES, None):
            parquet = Parquet(content)
            owner, number, path = list(parquet.footer.integers())[index]
            value = owner[number] + 1 if lie is None else lie
            if value != owner[number]:
                owner[number] = value
                yield good.case(f"footer {path} is {value}", parquet.with_footer())


def page_lies(good: Good, step: int = 1) -> Iterator[Case]:
    """Each number in the page headers says something else, or every so many of them."""
    count = 0
    for chunk_index, chunk in enumerate(Parquet(good.content).chunks()):
        name = b".".join(chunk[3]).decode()
        for page, (*_, header) in enumerate(Parquet(good.content).pages(chunk)):
            for index, (_, _, path) in enumerate(header.integers()):
                for lie in (*LIES, None):
                    count += 1
                    if count % step:
                        continue
                    parquet = Parquet(good.content)

                    def change(header: thrift.Struct, index: int = index, lie: int | None = lie) -> None:
                        owner, number, _ = list(header.integers())[index]
                        owner[number] = owner[number] + 1 if lie is None else lie

                    content = parquet.with_page(parquet.chunks()[chunk_index], page, change)
                    yield good.case(f"page {page} of {name}: {path} is {'one more' if lie is None else lie}", content)


def length_lies(good: Good) -> Iterator[Case]:
    """The length of the footer says something else."""
    content, end = good.content, 8 if good.path.suffix == ".parquet" else 10
    for lie in (0, 1, 2, 100, len(content), len(content) - 12, 2**31 - 1, 2**31, 2**32 - 1):
        yield good.case(
            f"footer of {lie} bytes", patched(content, len(content) - end, struct.pack("<I", lie)), "refused"
        )


def word_lies(good: Good, step: int = 1) -> Iterator[Case]:
    """Each aligned word in the metadata of an IPC file's messages, and in its footer, says something else."""
    content, ipc = good.content, Ipc(good.content)
    regions = [(m.start, m.body) for m in ipc.messages] + [(ipc.footer_start, len(content) - 6)]
    words = [at for start, stop in regions for at in range(start, stop - 8, 4)]
    for at in words[::step]:
        for lie in (-1, 2**31 - 1, 1 << 16):
            yield good.case(f"word at {at} is {lie}", patched(content, at, struct.pack("<i", lie)))
        if at % 8 == 0:
            for lie in (2**62, -(2**63), 1 << 40):
                yield good.case(f"word at {at} is {lie}", patched(content, at, struct.pack("<q", lie)))


def offset_lies(good: Good) -> Iterator[Case]:
    """Buffers of an IPC file overlap, lead out of their body, or are longer than it; and so do its record batches."""
    content, ipc = good.content, Ipc(good.content)
    buffers = list(ipc.buffers())
    for index, (message, start, stop) in enumerate(buffers):
        entry = ipc.entry(message, start, stop)
        if entry is None:
            continue
        size, body = stop - start, message.end - message.body
        _, other, other_stop = buffers[index - 1]
        lies = {
            "overlaps": (other - message.body, size),
            "is another": (other - message.body, other_stop - other),
            "begins at the end": (body, size),
            "begins past the end": (body + 8, size),
            "begins before its body": (-8, size),
            "begins in no memory": (2**62, size),
            "ends past the file": (start - message.body, len(content)),
            "ends in no memory": (start - message.body, 2**62),
            "is unaligned": (start - message.body + 1, size),
            "has a negative length": (start - message.body, -size - 1),
            "wraps around": (2**63 - 8, 16),
        }
        for what, lie in lies.items():
            yield good.case(f"buffer {index} {what}", patched(content, entry, struct.pack("<qq", *lie)))
        for what, value in (("no order", 2**31 - 1), ("the negative", -1)):
            if size >= 8:  # offsets of strings and lists, most of them
                yield good.case(f"buffer {index} holds {what}", patched(content, start + 4, struct.pack("<i", value)))
    blocks = ipc.blocks()
    for index, at in enumerate(blocks):
        other = blocks[index - 1]
        if other != at:
            yield good.case(f"batch {index} is listed twice", patched(content, other, content[at : at + 24]))
            swapped = patched(patched(content, other, content[at : at + 24]), at, content[other : other + 24])
            yield good.case(f"batch {index} has changed places", swapped)
        offset, head, body = struct.unpack("<qi4xq", content[at : at + 24])
        for lie in (
            (offset + 8, head, body), (-8, head, body), (2**62, head, body), (len(content), head, body),
            (offset, -8, body), (offset, 2**31 - 8, body), (offset, 8, body), (offset, head + 8, body),
            (offset, head, -8), (offset, head, 2**62), (offset, head, body + 64), (offset, head, 0),
        ):  # fmt: skip
            yield good.case(f"batch {index} at {lie}", patched(content, at, struct.pack("<qi4xq", *lie)))


# ------------------------------------------------------------------------------------------------ rows

# Row 4 is int4.group: shape [4, 8], 32 elements, 16 bytes of data, 2 groups of 16.
ROWS: dict[str, dict[str, Any]] = {
    "2^62 elements": {"shape": [2**62], "num_params": 2**62},
    "2^62 elements of many axes": {"shape": [2**31 - 1, 2**31 - 1], "num_params": (2**31 - 1) ** 2},
    "2^58 elements that all numbers agree on": {
        "shape": [2**20, 2**20, 2**18], "num_params": 2**58, "quant_type": "int8", "group_size": 0,
    },
    "a product that wraps to 32": {"shape": [2**32, 2**32, 32], "num_params": 32},
    "a product that wraps to 0": {
        "shape": [2**32, 2**32], "num_params": 0, "data": b"", "scales": b"", "zero_points": b"",
    },
    "an axis of 2^31": {"shape": [2**31], "num_params": 2**31},
    "a negative axis": {"shape": [-4, -8]},
    "an empty axis that hides another": {
        "shape": [0, 2**31 - 1, 2**31 - 1, 4], "num_params": 0, "data": b"", "scales": b"", "zero_points": b"",
    },
    "an empty shape with the old data": {"shape": [0, 8], "num_params": 0},
    "empty with a negative count": {"shape": [0, 8], "num_params": -1},
    "a scalar": {"shape": [], "num_params": 1},
    "65 axes": {"shape": [1] * 65, "num_params": 1},
    "a million axes": {"shape": [1] * 10**6, "num_params": 1},
    "2^62 in num_params": {"num_params": 2**62},
    "-2^63 in num_params": {"num_params": -(2**63)},
    "a group of 2^62": {"group_size": 2**62},
    "a group of -1": {"group_size": -1},
    "a group of 1": {"group_size": 1},
    "a rotation of 2^30": {"quant_type": "int4h", "rotation": 2**30},
    "a negative rotation": {"quant_type": "int4h", "rotation": -4},
    "2^31 channels of nothing": {
        "shape": [2**31 - 1, 0], "num_params": 0, "quant_axis": 0, "group_size": 0, "data": b"",
    },
    "a name that is there": {"layer_name": "embed.weight"},
    "no name": {"layer_name": ""},
    "null": {"layer_name": None},
    "a name of a million characters that is there": {"layer_name": "x" * 10**6, "num_params": 7},
    "a dtype of a million characters": {"dtype": "x" * 10**6},
    "a quant_type of a million characters": {"quant_type": "x" * 10**6},
    "an unknown quant_type": {"quant_type": "int9"},
    "a V1 dtype as quant_type": {"quant_type": "float32"},
    "scales of NaN": {"scales": np.full(2, np.nan, "<f4").tobytes()},
    "scales of 0": {"scales": bytes(8)},
    "one scale too few": {"scales": bytes(4)},
    "half a scale": {"scales": bytes(6)},
    "infinite zero points": {"zero_points": np.full(2, np.inf, "<f4").tobytes()},
    "one byte too few": {"data": bytes(15)},
    "one byte too many": {"data": bytes(17)},
    "no data": {"data": None},
    "a piece alone": {
        "num_params": 16, "data": bytes(8), "scales": np.ones(1, "<f4").tobytes(), "zero_points": bytes(4),
    },
}  # fmt: skip

# Of the row "none.float8_e4m3fn", of shape [2, 3], of the table "v2": what its dtype does not hold.
VALUES: dict[str, dict[str, Any]] = {
    "bytes that are no bool": {"dtype": "bool", "data": bytes(range(6))},
    "NaN as int8": {"dtype": "int8", "quant_type": "fp32", "data": np.full(6, np.nan, "<f4").tobytes()},
    "300 as int8": {"dtype": "int8", "quant_type": "fp16", "data": np.full(6, 300, "<f2").tobytes()},
    "0.5 as int64": {"dtype": "int64", "quant_type": "fp32", "data": np.full(6, 0.5, "<f4").tobytes()},
    "2^31 as int32": {"dtype": "int32", "quant_type": "fp32", "data": np.full(6, 2.0**31, "<f4").tobytes()},
    "2 as bool": {"dtype": "bool", "quant_type": "fp32", "data": np.full(6, 2, "<f4").tobytes()},
    "1e6 as float16": {"dtype": "float16", "quant_type": "fp32", "data": np.full(6, 1e6, "<f4").tobytes()},
    "infinities as float8": {
        "dtype": "float8_e4m3fn", "quant_type": "fp16", "data": np.full(6, np.inf, "<f2").tobytes(),
    },
}  # fmt: skip


_TABLE = np.concatenate([np.zeros(257), np.ones(1)]).astype("<f4")
# Rows of golden tables by their name: q4_k has shape [2, 512] in 4 records, those of the table "nested" [5, 64] and
# [5, 32] in 40 groups of 8, or [2, 128] in 8 groups, the others [5, 16] in 10 groups of 8.
GRIDS: dict[str, dict[str, Any]] = {
    "int4_f16i": {
        "zero points of float16": {"zero_points": bytes(20)},
        "a zero point too few": {"zero_points": bytes(9)},
        "no zero points": {"zero_points": b""},
        "scales of a byte": {"scales": bytes(10)},
        "scales of NaN": {"scales": np.full(10, np.nan, "<f2").tobytes()},
        "a code with zero points of halves": {"quant_type": "int4_f16z"},
        "a code without zero points": {"quant_type": "int4_f16"},
    },
    "int4_f16m": {
        "scales of NaN": {"scales": np.full(10, np.nan, "<f2").tobytes()},
        "infinite minimums": {"zero_points": np.full(10, np.inf, "<f2").tobytes()},
        "scales of float32": {"scales": bytes(40)},
        "half a scale": {"scales": bytes(19)},
        "no minimums": {"zero_points": b""},
        "the other half": {"quant_type": "int4_bf16m", "scales": bytes([1, 0]) * 10},
        "a rotation": {"rotation": 4},
        "a code without minimums": {"quant_type": "int4_f16"},
    },
    "int4_f32": {
        "scales of infinity": {"scales": np.full(10, np.inf, "<f4").tobytes()},
        "subnormal scales": {"scales": np.full(10, 1e-40, "<f4").tobytes()},
        "scales of halves": {"scales": bytes(20)},
        "zero points": {"zero_points": bytes(40)},
        "no scales": {"scales": b""},
    },
    "int4_bf16a": {
        "addends of NaN": {"zero_points": np.full(10, 0x7FC0, "<u2").tobytes()},
        "no addends": {"zero_points": b""},
        "a code without addends": {"quant_type": "int4_bf16"},
    },
    "int2_f16p": {
        "zero points of a byte": {"zero_points": bytes(40)},
        "no zero points": {"zero_points": b""},
        "a zero point too few": {"zero_points": bytes(9)},
        "scales of NaN": {"scales": np.full(40, np.nan, "<f2").tobytes()},
        "rows of six groups": {"shape": [5, 48], "num_params": 240, "data": bytes(60), "scales": bytes(60)},
        "channels": {"group_size": 0},
        "one axis": {"shape": [160]},
        "a piece of six groups": {"num_params": 24, "data": bytes(6), "scales": bytes(12), "zero_points": bytes(1)},
        "a code with zero points of a byte": {"quant_type": "int2_f16i"},
    },
    "f8_e4m3_f16": {
        "scales of NaN": {"scales": np.full(8, np.nan, "<f2").tobytes()},
        "scales below zero": {"scales": np.full(8, -1, "<f2").tobytes()},
        "scales of float32": {"scales": np.ones(8, "<f4").tobytes()},
        "zero points": {"zero_points": bytes(16)},
    },
    "nf4_nested": {
        "scales of float32": {"scales": bytes(160)},
        "a scale too few": {"scales": bytes(39)},
        "no table": {"zero_points": _TABLE[:1].tobytes()},
        "a largest too few": {"zero_points": _TABLE[:257].tobytes()},
        "a table of NaN": {"zero_points": (_TABLE * np.nan).tobytes()},
        "a largest of infinity": {"zero_points": np.append(_TABLE[:257], np.float32(np.inf)).tobytes()},
        "scales of zero": {"zero_points": bytes(4 * 258)},
        "groups that cross rows": {"group_size": 48, "scales": bytes(7)},
        "numbers that are too small": {"zero_points": (_TABLE * np.float32(1e-30)).tobytes()},
        "channels": {"group_size": 0},
        "one axis": {"shape": [320]},
        "a rotation": {"rotation": 4},
        "a code without nested scales": {"quant_type": "nf4"},
        "2^62 elements": {"shape": [2**31 - 1, 2**31 - 1], "num_params": (2**31 - 1) ** 2},
    },
    "q4_k": {
        "records of NaN": {"scales": np.array([0x7E00, 0, 0, 0] * 4, "<u2").tobytes()},
        "infinite records of minimums": {"zero_points": np.array([0x7C00, 0, 0, 0] * 4, "<u2").tobytes()},
        "a record too few": {"scales": bytes(24)},
        "half a record": {"scales": bytes(28)},
        "groups of another size": {"group_size": 16},
        "channels": {"group_size": 0},
        "no groups": {"group_size": 0, "quant_axis": -1},
        "rows that records cross": {"shape": [8, 128]},
        "an axis of nothing": {"shape": [0, 512]},
        "a piece that ends inside a record": {"num_params": 128, "data": bytes(64), "scales": bytes(8)},
        "another code": {"quant_type": "q6_k"},
        "2^62 elements": {"shape": [2**31 - 1, 2**31 - 256], "num_params": (2**31 - 1) * (2**31 - 256)},
    },
}


def row_lies(suffix: str) -> Iterator[Case]:
    """One row breaks a rule of the format; there are no digests that would show it."""
    cells = bare(GOLDEN / "v2.parquet")
    for what, changes in ROWS.items():
        yield Case(f"{suffix}: {what}", {f"m.{suffix}": stored(edited(cells, changes), suffix)})
    row = cells["layer_name"].to_pylist().index("none.float8_e4m3fn")
    for what, changes in VALUES.items():
        yield Case(f"{suffix}: {what}", {f"m.{suffix}": stored(edited(cells, changes, row), suffix)})
    stems = {"int4_f16i": "integers", "int4_f32": "addends", "int4_bf16a": "addends"}
    stems |= dict.fromkeys(("int2_f16p", "f8_e4m3_f16", "nf4_nested"), "nested")
    for name, lies in GRIDS.items():
        stem = stems.get(name, "grids")
        cells = bare(GOLDEN / f"{stem}.parquet")
        row = cells["layer_name"].to_pylist().index(name)
        for what, changes in lies.items():
            yield Case(f"{suffix}: {name} with {what}", {f"m.{suffix}": stored(edited(cells, changes, row), suffix)})
    cells = bare(GOLDEN / "v2.parquet")
    for name in ("layer_name", "dtype", "quant_type"):
        yield Case(f"{suffix}: no UTF-8 in {name}", {f"m.{suffix}": stored(not_utf8(cells, name), suffix)})


def not_utf8(table: pa.Table, column: str) -> pa.Table:
    raw = pa.array([value.encode() for value in table[column].to_pylist()], pa.binary()).to_pylist()
    raw[4] = raw[4][:-1] + b"\xff"
    binary = pa.array(raw, pa.binary())
    text = pa.StringArray.from_buffers(len(binary), binary.buffers()[1], binary.buffers()[2])
    return table.set_column(table.schema.names.index(column), column, text)


def row_losses(suffix: str) -> Iterator[Case]:
    """Rows are missing, doubled, reordered or another's, and the metadata and the digests are those of before."""
    name, good = f"m.{suffix}", GOLDEN / f"v2.{suffix}"
    table = pq.read_table(GOLDEN / "v2.parquet")
    count = len(table)
    changed = {
        "no rows": table.slice(0, 0),
        "the first is missing": table.slice(1),
        "the last is missing": table.slice(0, count - 1),
        "one is missing": table.take([0, 1, 2, 4, *range(5, count)]),
        "one is there twice": table.take([0, 0, *range(1, count)]),
        "one in the place of another": table.take([0, 0, *range(2, count)]),
        "two have changed places": table.take([1, 0, *range(2, count)]),
        "no digests": table.drop_columns(["digest"]),
        "no digest in a row": edited(table, {"digest": None}),
        "a short digest": edited(table, {"digest": b"\0"}),
        "another row's digest": edited(table, {"digest": table["digest"][5].as_py()}),
        "another row's data": edited(table, {"data": table["data"][5].as_py()}),
        "another cosine": edited(table, {"cosine": 0.999}),
        "another solver": edited(table, {"solver": "gptq"}),
        "another shape": edited(table, {"shape": [8, 4]}),
        "another dtype": edited(table, {"dtype": "torch.float16"}),
        "the columns of V1": table.select(["layer_name", "shape", "dtype", "data", "num_params", "digest"]),
        "a column twice": table.append_column("data", table["data"]) if suffix == "arrow" else table.slice(1),
    }
    for what, rows in changed.items():
        if suffix == "parquet":
            yield Case(f"{suffix}: {what}", {name: stored(rows, suffix)}, good=str(good))
        else:
            yield Case(f"{suffix}: {what}", {name: with_ipc_metadata(rows)}, good=str(good))
    yield Case(f"{suffix}: nothing is changed", {name: stored(bare_metadata(table, suffix), suffix)}, "any")


def bare_metadata(table: pa.Table, suffix: str) -> pa.Table:
    return table if suffix == "parquet" else table.replace_schema_metadata(None)


def with_ipc_metadata(table: pa.Table, text: bytes | None = None) -> bytes:
    """An IPC file with the metadata where the format wants it: on a last, empty batch."""
    metadata = (table.schema.metadata or {}).get(b"aq_jax") if text is None else text
    table = table.replace_schema_metadata(None)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as file:
        for batch in table.to_batches():
            if batch.num_rows:
                file.write_batch(batch)
        file.write_batch(
            pa.RecordBatch.from_pylist([], schema=table.schema), custom_metadata={b"aq_jax": metadata or b""}
        )
    return sink.getvalue().to_pybytes()


def metadata_lies(suffix: str) -> Iterator[Case]:
    """The metadata says what it must not."""
    table = pq.read_table(GOLDEN / "v2.parquet")
    good = json.loads(table.schema.metadata[b"aq_jax"])

    def changed(**entries: object) -> bytes:
        return json.dumps(good | entries).encode()

    texts = {
        "nothing": b"", "half an object": b"{", "a list": b"[]", "null": b"null", "depth": b"[" * 10**5,
        "deep objects": b'{"a":' * 10**5, "no UTF-8": b'{"version": "\xff"}', "NaN": b'{"version": NaN}',
        "a number of 10,000 digits": changed()[:-1] + b', "n": ' + b"9" * 10**4 + b"}",
        "a number beyond all floats": changed()[:-1] + b', "n": 1e999}', "a lone surrogate": changed(writer="\ud800"),
        "an alias that is a lone surrogate": changed(aliases={"\ud800": "one"}),
        "a key that is a lone surrogate": changed(**{"\ud800": 1}),
        "version 3": changed(version="3.0"), "version 1": changed(version="1.0"), "no version": changed(version=""),
        "version 2.2^62": changed(version="2." + "9" * 10**5), "a long version": changed(version="x" * 10**6),
        "rows as text": changed(rows="16"), "rows that are true": changed(rows=True), "-1 rows": changed(rows=-1),
        "10^100 rows": changed(rows=10**100), "an alias to nobody": changed(aliases={"a": "nobody"}),
        "an alias of a stored tensor": changed(aliases={"half": "one"}),
        "an alias to itself": changed(aliases={"a": "a"}),
        "an alias without a name": changed(aliases={"": "one"}), "an alias to a number": changed(aliases={"a": 1}),
        "an alias of a million characters": changed(aliases={"x" * 10**6: "nobody"}),
        "another alias": changed(aliases={"tied": "half"}), "another config": changed(config={}),
        "another digest": changed(digest="0" * 64), "a digest of a million characters": changed(digest="0" * 10**6),
        "another statistic": changed(statistics="0" * 64), "an entry more": changed(more=1),
    }  # fmt: skip
    for what, text in texts.items():
        if suffix == "parquet":
            content = stored(table.replace_schema_metadata({b"aq_jax": text}), suffix)
        else:
            content = with_ipc_metadata(table, text)
        yield Case(f"{suffix}: metadata with {what}", {f"m.{suffix}": content})
    content = (GOLDEN / f"v2.{suffix}").read_bytes()
    key = content.rindex(b"aq_jax", 0, content.rindex(b'{"aliases"') if suffix == "parquet" else None)
    for place in range(6):
        yield Case(
            f"{suffix}: the key of the metadata is damaged at {place}",
            {f"m.{suffix}": patched(content, key + place, bytes([content[key + place] ^ 1]))},
        )


# ------------------------------------------------------------------------------------------------ bombs


def bombs() -> Iterator[Case]:
    """Small files that unpack to much: by codecs, dictionaries, shared prefixes, views, nulls and runs."""
    cells = bare(GOLDEN / "v2.parquet")
    plain: dict[str, Any] = {"use_dictionary": False}
    for column in ("data", "scales", "zero_points"):
        for codec in ("zstd", "gzip", "lz4") if column == "data" else ("zstd",):
            table = edited(cells, {column: bytes(32 << 20)})
            yield Case(
                f"32 MiB of {column} in {codec}", {"m.parquet": stored(table, "parquet", compression=codec, **plain)}
            )
    for column in ("layer_name", "dtype", "quant_type", "solver"):
        table = edited(cells, {column: "x" * (32 << 20)})
        yield Case(f"32 MiB of {column}", {"m.parquet": stored(table, "parquet", compression="zstd", **plain)})
        del table
        for lie in (True, False):
            yield Case(
                f"a page of {column} that unpacks to 1 GiB{', as the footer admits' if not lie else ''}",
                {"m.parquet": swollen(stored(cells, "parquet", compression="zstd", **plain), column, 1 << 30, lie)},
            )
    for column in ("data", "scales"):
        yield Case(
            f"a page of {column} that unpacks to 1 GiB",
            {"m.parquet": swollen(stored(cells, "parquet", compression="zstd", **plain), column, 1 << 30, True)},
        )
    yield from repeated()
    rows = 4_000_000
    for suffix in ("parquet", "arrow"):
        yield Case(f"{suffix}: {rows} rows", {f"m.{suffix}": stored(many_rows(rows, suffix), suffix, **ipc_or(suffix))})
    yield from compressed_batches(cells)


def ipc_or(suffix: str) -> dict[str, Any]:
    if suffix == "parquet":
        return {"compression": "zstd"}
    return {"options": pa.ipc.IpcWriteOptions(compression="zstd")}


def many_rows(rows: int, suffix: str) -> pa.Table:
    """Rows of empty tensors with one name, which is refused when all of them have been looked at."""
    words = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array(["w"]))
    zeros = pa.array(np.zeros(rows, np.int64))
    shapes = pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32)), zeros)
    names = words.cast(pa.string()) if suffix == "parquet" else words
    dtypes = pa.DictionaryArray.from_arrays(words.indices, pa.array(["float32"]))
    empty = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), rows, [None, pa.py_buffer(bytes(8 * (rows + 1))), pa.py_buffer(b"")]
    )
    return pa.table({"layer_name": names, "shape": shapes, "dtype": dtypes, "data": empty, "num_params": zeros})


def swollen(content: bytes, column: str, size: int, footer_lies: bool) -> bytes:
    """A Parquet file in which a column's page really unpacks to so many bytes; the footer says so, or not."""
    parquet = Parquet(content)
    chunk = parquet.chunk(column)
    start, _, end, header = parquet.pages(chunk)[0]
    packed = zeros_in_zstd(size)
    header[PAGE_UNPACKED], header[PAGE_STORED] = size, len(packed)
    text = thrift.encode(header)
    out = Parquet(content)
    target, delta = out.chunk(column), len(text) + len(packed) - (end - start)
    target[7] += delta
    if not footer_lies:
        target[6] = size + len(text)
    for other in out.chunks():
        if other[9] > start:
            other[9] += delta
    out.content = content[:start] + text + packed + content[end:]
    out.footer_start += delta
    return out.with_footer()


def zeros_in_zstd(size: int) -> bytes:
    """A zstd frame of zeros, without the memory that they would take: many frames of one MiB."""
    frame = pa.compress(bytes(1 << 20), codec="zstd", asbytes=True)
    return frame * (size >> 20)


def repeated() -> Iterator[Case]:
    """One long value that many rows share: by a dictionary, by prefixes, by views. Nothing is compressed."""
    count, long = 3000, 1 << 20
    for column in ("layer_name", "dtype", "solver", "data"):
        table = wide_table(count)
        value: Any = bytes(long) if column == "data" else "x" * long
        kind = pa.binary() if column == "data" else pa.string()
        words = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([value], kind))
        place = table.schema.names.index(column)
        shared = table.set_column(place, column, words)
        yield Case(f"arrow: {count} rows share 1 MiB of {column}", {"m.arrow": stored(shared, "arrow")})
        sink = pa.BufferOutputStream()
        # Written as a dictionary, Arrow's own type left out: a column of plain values, as far as the schema says.
        pq.write_table(shared, sink, store_schema=False, dictionary_pagesize_limit=4 << 20)
        yield Case(f"parquet: {count} rows share 1 MiB of {column}", {"m.parquet": sink.getvalue().to_pybytes()})
        views = pa.array([value], pa.binary_view() if column == "data" else pa.string_view())
        view = struct.pack("<i4sii", long, bytes(4) if column == "data" else b"xxxx", 0, 0)
        buffers = [None, pa.py_buffer(view * count), views.buffers()[2]]
        shared = table.set_column(place, column, pa.Array.from_buffers(views.type, count, buffers))
        yield Case(f"arrow: {count} views of 1 MiB of {column}", {"m.arrow": stored(shared, "arrow")})
    for column in ("layer_name", "data"):
        table = wide_table(count)
        values = [("x" * (1 << 15)) + str(index) for index in range(count)]
        kind = table.schema.field(column).type
        long_names = pa.array([v.encode() if column == "data" else v for v in values], kind)
        table = table.set_column(table.schema.names.index(column), column, long_names)
        content = stored(
            table, "parquet", use_dictionary=False, column_encoding={column: "DELTA_BYTE_ARRAY"}, compression="none"
        )
        yield Case(f"parquet: {count} values of {column} share a prefix of 32 KiB", {"m.parquet": content})
    count = 320
    nulls = pa.array([None] * count, pa.binary(1 << 20))
    table = wide_table(count)
    for column in ("data", "digest"):
        wide = table.set_column(table.schema.names.index(column), column, nulls)
        yield Case(f"parquet: {count} nulls of 1 MiB each in {column}", {"m.parquet": stored(wide, "parquet")})
        del wide


def wide_table(count: int) -> pa.Table:
    """A V2 table of small tensors."""
    return pa.table(
        {
            "layer_name": pa.array([f"w{index}" for index in range(count)]),
            "shape": pa.array([[1]] * count, pa.list_(pa.int32())),
            "dtype": pa.array(["float32"] * count),
            "data": pa.array([bytes(4)] * count, pa.binary()),
            "num_params": pa.array([1] * count, pa.int64()),
            "quant_type": pa.array(["none"] * count),
            "scales": pa.array([b""] * count, pa.binary()),
            "zero_points": pa.array([b""] * count, pa.binary()),
            "quant_axis": pa.array([-1] * count, pa.int32()),
            "group_size": pa.array([0] * count, pa.int32()),
            "digest": pa.array([None] * count, pa.binary()),
            "solver": pa.array([None] * count, pa.string()),
        }
    )


def compressed_batches(cells: pa.Table) -> Iterator[Case]:
    """Arrow IPC whose buffers are compressed, and say of themselves how long they will be."""
    for codec in ("zstd", "lz4"):
        options = pa.ipc.IpcWriteOptions(compression=codec)
        yield Case(f"arrow: compressed with {codec}", {"m.arrow": stored(cells, "arrow", options=options)})
        big = edited(cells, {"layer_name": "x" * (32 << 20)})
        content = stored(big, "arrow", options=options)
        yield Case(f"arrow: 32 MiB in {codec}", {"m.arrow": content})
        for claim in (1 << 30, 2**62, -2):
            ipc, changed = Ipc(content), content
            for message in ipc.messages[1:]:
                for _, start, stop in compressed_buffers(content, message.metadata, message.body, message.end):
                    if stop - start > 8:
                        changed = patched(changed, start, struct.pack("<q", claim))
            yield Case(f"arrow: {codec} that says {claim}", {"m.arrow": changed})


def compressed_buffers(content: bytes, metadata: int, body: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(entry, start, end) of what looks like the entries of buffers in a message: rising offsets within its body."""
    at, last = metadata, 0
    while at + 16 <= body:
        offset, length = struct.unpack("<qq", content[at : at + 16])
        if offset == last and 0 < length <= end - body - offset:
            yield at, body + offset, body + offset + length
            last = offset + -(-length // 8) * 8
            at += 16
        else:
            at += 8


# ------------------------------------------------------------------------------------------------ folders and names


def folders() -> Iterator[Case]:
    """Folders of tables that do not belong together, and links."""
    v1, v2 = ((GOLDEN / f"{name}.parquet").read_bytes() for name in ("v1", "v2"))
    yield Case("the same table twice", {"t/a.parquet": v2, "t/b.parquet": v2}, opens="t")
    yield Case("the same names in V1 and V2", {"t/a.parquet": v1, "t/b.parquet": v2}, opens="t")
    yield Case("one of two is cut off", {"t/a.parquet": v1, "t/b.parquet": v2[:-9]}, opens="t")
    yield Case("one of two is empty", {"t/a.parquet": v1, "t/b.parquet": b""}, opens="t")
    yield Case("no table", {"t/a.txt": v1}, opens="t")
    yield Case("only a hidden one", {"t/.a.parquet": v1}, opens="t")
    yield Case("a link that leads nowhere", {"t/a.parquet": v1}, opens="t", links={"t/b.parquet": "nowhere"})
    yield Case("a link to itself", {"t/a.parquet": v1}, opens="t", links={"t/b.parquet": "b.parquet"})
    yield Case(
        "a link to the folder",
        {"t/a.parquet": v1},
        "same",
        opens="t",
        links={"t/b": "."},
        good=str(GOLDEN / "v1.parquet"),
    )
    yield Case("a link to a device", {}, links={"m.parquet": "/dev/zero"})
    yield Case(
        "a link to another file",
        {"t/x": v1},
        "same",
        links={"m.parquet": "t/x"},
        opens="m.parquet",
        good=str(GOLDEN / "v1.parquet"),
    )
    yield Case("16 GiB of nothing", {"m.parquet": b"PAR1"}, sparse={"m.parquet": 16 << 30})
    yield Case("16 GiB of nothing in IPC", {"m.arrow": b"ARROW1\0\0"}, sparse={"m.arrow": 16 << 30})


CONTROL = "evil\x1b[2J\x07\r\n\u202ename\x00\x9b31m../../etc/passwd"


def names(folder: Path) -> Iterator[Case]:
    """Names with control characters, and with paths: they are text, and nothing else."""
    row = Row(CONTROL, (4,), "uint8", np.arange(4, dtype=np.uint8), 4)
    for suffix in ("parquet", "arrow"):
        path = folder / f"control.{suffix}"
        write_table(path, [row], version=1, aliases={"tied" + CONTROL: CONTROL})
        good = Good(path)
        yield good.case("as it is", good.content, "same")
        yield good.case("damaged", good.content.replace(bytes([0, 1, 2, 3]), bytes([0, 1, 2, 4])), "refused")
