"""Writes golden files beside this script, those that are named: `python tests/golden/make.py rotated`.

They are committed. Run it only for a new version of the format, and keep the files of the old one: what was written
once must be readable for ever. Their bytes differ between releases of pyarrow, which signs Parquet footers.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from aq_jax.codes import CODES
from aq_jax.codes.bits import pack_codes
from aq_jax.store import DTYPES, Row, cut_grids, write_table
from aq_jax.store.schema import Version

FOLDER = Path(__file__).parent
ALIASES = {"lm_head.weight": "embed.weight"}
CONFIG = {"quant_type": "int2", "group_size": 16, "note": "Größe"}


def plain(name: str, shape: tuple[int, ...], dtype: str, quant_type: str | None) -> Row:
    """An unquantized row of small numbers, which every dtype can hold."""
    count = int(np.prod(shape))
    values = (np.arange(count) % 7).astype(np.float32).astype(DTYPES[dtype])
    if quant_type == "fp16":
        values = (np.arange(count) / 8).astype(np.float16)
    return Row(name, shape, dtype, values.view(np.uint8).reshape(-1), count, quant_type)


def coded(
    name: str, shape: tuple[int, ...], quant_type: str, quant_axis: int, group_size: int, rotation: int = 0
) -> Row:
    """A quantized row; the codes run through their whole range."""
    bits, count = int(quant_type[3]), int(np.prod(shape))
    codes = ((np.arange(count) * 5 + 3) % 2**bits - 2 ** (bits - 1)).astype(np.int8)
    groups = -(-count // group_size) if group_size else shape[0] if quant_axis == 0 else 1
    scales = ((np.arange(groups) % 5 + 1) / 64).astype(np.float32)
    zeros = np.full(groups, -0.5, np.float32) if bits < 4 else (np.arange(groups) % 3 / 4).astype(np.float32)
    data = pack_codes(codes, bits)
    statistics = ("search", 0.875 + bits / 100, 0.25 / bits)
    return Row(
        name, shape, "float32", data, count, quant_type, scales, zeros, quant_axis, group_size, rotation, *statistics
    )


def in_pieces(whole: Row, cut: int) -> list[Row]:
    """A row as two pieces."""
    code, length, rows = CODES[whole.quant_type or ""], whole.group_size or whole.shape[-1], []
    for start, stop in ((0, cut), (cut, whole.num_params)):
        scales, zeros = cut_grids(whole, start // length, -(-stop // length))
        data = whole.data[slice(*code.span(start, stop, whole.shape))]
        rows.append(dataclasses.replace(whole, num_params=stop - start, data=data, scales=scales, zero_points=zeros))
    return rows


def v1_rows() -> list[Row]:
    """A V1 table: many dtypes, a scalar, an empty tensor."""
    dtypes = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "uint8", "bool")
    rows = [plain(f"layer.{dtype}", (3, 5), dtype, None) for dtype in dtypes if dtype != "bool"]
    rows.append(Row("layer.bool", (4,), "bool", np.array([0, 1, 1, 0], np.uint8), 4))
    rows += [plain("scalar", (), "float32", None), plain("empty", (0, 4), "float32", None)]
    return [*rows, plain("embed.weight", (9, 4), "float32", None)]


def v2_rows() -> list[Row]:
    """A V2 table: every kind of row that is not rotated."""
    rows = [
        coded("embed.weight", (9, 4), "int8", 0, 0),
        coded("int8.tensor", (3, 7), "int8", -1, 0),
        coded("int8.group", (3, 7), "int8", 0, 8),
        coded("int4.channel", (3, 7), "int4", 0, 0),
        coded("int4.group", (4, 8), "int4", 0, 16),
        coded("int3.group", (5, 7), "int3", 0, 16),
        coded("int3.channel", (4, 3, 2), "int3", 0, 0),
        coded("int2.group", (5, 7), "int2", 0, 16),
        coded("int2.tensor", (11,), "int2", -1, 0),
        plain("half", (3, 5), "float32", "fp16"),
        plain("half.of_bfloat16", (3, 5), "bfloat16", "fp16"),
    ]
    dtypes = ("float32", "bfloat16", "float8_e4m3fn", "int64")
    return [
        *rows,
        *(plain(f"none.{dtype}", (2, 3), dtype, "none") for dtype in dtypes),
        coded("one", (), "int8", -1, 0),
    ]


def rotated_rows() -> list[Row]:
    """A V2 table of rotated rows; the last tensor is cut inside a block, and a group crosses its rows."""
    return [
        coded("embed.weight", (9, 4), "int4h", 0, 0, 4),
        coded("int3h.channel", (4, 3, 2), "int3h", 0, 0, 2),
        coded("int2h.tensor", (2, 128), "int2h", -1, 0, 128),
        coded("int2h.group", (3, 32), "int2h", 0, 16, 32),
        coded("int4h.group", (5, 12), "int4h", 0, 8, 4),
        coded("int4", (2, 8), "int4", 0, 0),
        *in_pieces(coded("int3h.pieces", (4, 16), "int3h", 0, 24, 16), 24),
    ]


def widths_rows() -> list[Row]:
    """A V2 table of five and six bits, and of rotated rows of five bits and more."""
    return [
        coded("embed.weight", (9, 4), "int6", 0, 0),
        coded("int5.channel", (3, 7), "int5", 0, 0),
        coded("int5.group", (4, 8), "int5", 0, 16),
        coded("int5.tensor", (11,), "int5", -1, 0),
        coded("int6.group", (5, 7), "int6", 0, 16),
        coded("int6.stacked", (2, 3, 4), "int6", 0, 4),
        coded("int8h.channel", (3, 8), "int8h", 0, 0, 8),
        coded("int6h.group", (5, 12), "int6h", 0, 8, 4),
        coded("int5h.tensor", (2, 128), "int5h", -1, 0, 128),
        *in_pieces(coded("int5.pieces", (4, 16), "int5", 0, 24), 24),
    ]


def tiled(name: str, shape: tuple[int, ...], quant_type: str, group_size: int = 0, rotation: int = 0) -> Row:
    """A row of a trellis code: any bytes are codes; the spare bits at the end of a matrix are zero."""
    code, (*lead, rows, columns) = CODES[quant_type], shape
    count = int(np.prod(shape))
    data = ((np.arange(code.data_bytes(count, shape)) * 151 + 89) % 251).astype(np.uint8).reshape(*lead, -1)
    bits = rows % 256 * columns * code.step_bits // code.step_rows
    data[..., -1] &= 255 >> -bits % 8
    scales = ((np.arange(count // columns) % 5 + 1) / 64).astype(np.float32)
    statistics = ("viterbi", 0.9375, 0.0625)
    return Row(
        name, shape, "float32", data.reshape(-1), count, quant_type, scales, scales[:0], 0, group_size, rotation,
        *statistics,
    )  # fmt: skip


def trellis_rows() -> list[Row]:
    """A V2 table of trellis codes: whole tiles and short ones, spare bits, matrices, rotations, and pieces."""
    return [
        tiled("embed.weight", (300, 4), "tcq1.5", 0, 4),
        tiled("tcq2.short", (5, 7), "tcq2"),
        tiled("tcq3.one", (1, 4), "tcq3"),
        tiled("tcq3", (257, 6), "tcq3", 0, 2),
        tiled("tcq4", (256, 3), "tcq4"),
        tiled("tcq5.experts", (2, 10, 3), "tcq5", 3),
        tiled("tcq1.5.experts", (2, 256, 2), "tcq1.5", 2, 2),
        *in_pieces(tiled("tcq2.pieces", (520, 4), "tcq2", 0, 4), 2048),
    ]


def small(name: str, shape: tuple[int, ...], quant_type: str, quant_axis: int, group_size: int) -> Row:
    """A row of one scale a group: negative ones, a zero, and the smallest there are. Zero points may be bytes."""
    half = DTYPES["float32" if "f32" in quant_type else "bfloat16" if "bf16" in quant_type else "float16"]
    row = coded(name, shape, quant_type[:4], quant_axis, group_size)
    numbers = np.array([0.25, -0.375, 0, 2.0**-24 if half == np.float16 else 2.0**-126, 1.5, -(2.0**-20)])
    scales = numbers[np.arange(row.scales.size) % 6].astype(half)
    offsets = (numbers[np.arange(row.scales.size) % 5] * 3).astype(half) if quant_type[-1] in "zuma" else scales[:0]
    if quant_type[-1] == "p":
        offsets = pack_codes(np.array([-2, 1, 0, -1, 1], np.int8)[np.arange(row.scales.size) % 5], 2)
    if quant_type[-1] == "i":
        offsets = np.array([-128, 127, 0, 7, -8, 1, -1], np.int8)[np.arange(row.scales.size) % 7]
    return dataclasses.replace(row, quant_type=quant_type, scales=scales, zero_points=offsets, solver="GGUF Q4_0")


def recorded(name: str, shape: tuple[int, ...], quant_type: str) -> Row:
    """A row whose grids are records; integers and codes run through their whole range."""
    code = CODES[quant_type]
    row = coded(name, shape, f"int{code.bits}", 0, code.group)
    records, (groups, _) = row.num_params // 256, code.grid_block
    half = 2 ** (code.sub_bits - 1)

    def grids(step: int) -> np.ndarray:
        d = np.array([0.125, -0.5, 2.0**-24])[np.arange(records) % 3].astype(np.float16)
        integers = (np.arange(records * groups) * step % (2 * half) - half).astype(np.int8)
        packed = pack_codes(integers, code.sub_bits).reshape(records, -1)
        return np.concatenate([d.view(np.uint8).reshape(-1, 2), packed], axis=1).reshape(-1)

    zeros = grids(7) if code.zero_points else np.empty(0, np.uint8)
    solver = f"GGUF {quant_type.upper()}"
    return dataclasses.replace(row, quant_type=quant_type, scales=grids(5), zero_points=zeros, solver=solver)


def grids_rows() -> list[Row]:
    """A V2 table of all types of small grids, some in pieces."""
    rows = [dataclasses.replace(coded("embed.weight", (9, 4), "int8", 0, 0))]
    for bits in (8, 6, 5, 4, 3, 2):
        for half in ("f16", "bf16"):
            rows += [
                small(f"int{bits}_{half}{what}", (5, 16), f"int{bits}_{half}{what}", 0, 8) for what in ("", "z", "m")
            ]
    rows += [small("f16.channel", (3, 7), "int4_f16m", 0, 0), small("bf16.tensor", (11,), "int5_bf16z", -1, 0)]
    rows += [small("f16.across", (5, 7), "int3_f16m", 0, 16)]
    rows += [recorded(f"q{bits}_k", (2, 512), f"q{bits}_k") for bits in (2, 3, 4, 5, 6)]
    rows += in_pieces(recorded("q5_k.pieces", (3, 256), "q5_k"), 256)
    return rows + in_pieces(small("f16.pieces", (4, 16), "int5_f16m", 0, 24), 24)


def unsigned_rows() -> list[Row]:
    """A V2 table of small grids with zero points of unsigned codes."""
    rows = [coded("embed.weight", (9, 4), "int8", 0, 0)]
    for bits in (8, 6, 5, 4, 3, 2):
        for kind in (f"int{bits}_f16u", f"int{bits}_bf16u"):
            rows.append(small(kind, (5, 16), kind, 0, 8))
    return [*rows, small("across.int4_f16u", (5, 7), "int4_f16u", 0, 16)]


def integers_rows() -> list[Row]:
    """A V2 table of small grids with zero points of one byte."""
    rows = [coded("embed.weight", (9, 4), "int8", 0, 0)]
    for bits in (8, 6, 5, 4, 3, 2):
        for kind in (f"int{bits}_f16i", f"int{bits}_bf16i"):
            rows.append(small(kind, (5, 16), kind, 0, 8))
    rows += [small("i.channel", (3, 7), "int4_f16i", 0, 0), small("i.tensor", (11,), "int5_bf16i", -1, 0)]
    rows += [small("i.across", (5, 7), "int3_f16i", 0, 16)]
    return rows + in_pieces(small("i.pieces", (4, 16), "int5_bf16i", 0, 24), 24)


def addends_rows() -> list[Row]:
    """A V2 table of small grids with float32 scales, and of those with addends."""
    rows = [coded("embed.weight", (9, 4), "int8", 0, 0)]
    for bits in (8, 6, 5, 4, 3, 2):
        for kind in (f"int{bits}_{grids}" for grids in ("f32", "f32i", "f16a", "bf16a")):
            rows.append(small(kind, (5, 16), kind, 0, 8))
    rows += [small("a.channel", (3, 7), "int4_f16a", 0, 0), small("a.tensor", (11,), "int5_bf16a", -1, 0)]
    rows += [small("a.across", (5, 7), "int3_f32i", 0, 16)]
    return rows + in_pieces(small("a.pieces", (4, 16), "int5_f32", 0, 24), 24)


def levels_rows() -> list[Row]:
    """A V2 table of codes that number levels, each of which occurs."""

    def numbered(name: str, shape: tuple[int, ...], quant_type: str, group_size: int) -> Row:
        row = coded(name, shape, "int8" if quant_type == "f8_e4m3" else "int4", 0, group_size)
        return dataclasses.replace(row, quant_type=quant_type, zero_points=row.scales[:0], solver="bitsandbytes")

    rows = [numbered("nf4.group", (5, 7), "nf4", 16), numbered("fp4.channel", (4, 8), "fp4", 0)]
    every = numbered("f8.channel", (2, 128), "f8_e4m3", 0)
    bytes_ = np.arange(256, dtype=np.uint8)
    bytes_[[0x7F, 0xFF]] = 0  # NaN
    return [coded("embed.weight", (9, 4), "int8", 0, 0), *rows, dataclasses.replace(every, data=bytes_)]


def nested_rows() -> list[Row]:
    """A V2 table of nested scales, of float8 with halves as scales, and of zero points of two bits."""

    def nested(name: str, shape: tuple[int, ...], quant_type: str, group_size: int) -> Row:
        row = coded(name, shape, "int4", 0, group_size)
        numbers = np.arange(row.scales.size)
        table = np.arange(256, dtype=np.float32) / 127 - 1
        largest = np.float32([0.6, 0.7, 0, -0.3, 0.5])[: -(-numbers.size // 256)]
        zeros = np.concatenate([table, np.float32([0.9]), largest])
        scales = (numbers * 37 % 256).astype(np.uint8)
        return dataclasses.replace(row, quant_type=quant_type, scales=scales, zero_points=zeros, solver="bitsandbytes")

    every = coded("f8", (2, 128), "int8", 0, 32)
    every = dataclasses.replace(every, data=np.where(np.arange(256) % 128 == 127, 0, np.arange(256)).astype(np.uint8))
    rows = [coded("embed.weight", (9, 4), "int8", 0, 0)]
    rows += [nested("nf4_nested", (5, 64), "nf4_nested", 8), nested("fp4_nested", (6, 450), "fp4_nested", 9)]
    rows += [nested("nested.many", (8, 258), "nf4_nested", 2), nested("nested.experts", (2, 3, 8), "fp4_nested", 4)]
    rows += in_pieces(nested("nested.pieces", (75, 8), "nf4_nested", 2), 512)
    for half, dtype in (("f16", "float16"), ("bf16", "bfloat16")):
        scales, kind = every.scales.astype(DTYPES[dtype]), f"f8_e4m3_{half}"
        rows.append(dataclasses.replace(every, layer_name=kind, quant_type=kind, scales=scales, zero_points=scales[:0]))
    rows += [small(kind, (5, 32), kind, 0, 4) for kind in ("int2_f16p", "int2_bf16p", "int2_f32p")]
    return rows + in_pieces(small("p.pieces", (3, 32), "int2_f16p", 0, 8), 32)


TABLES: dict[str, tuple[Callable[[], list[Row]], Version]] = {
    "v1": (v1_rows, 1),
    "v2": (v2_rows, 2),
    "rotated": (rotated_rows, 2),
    "widths": (widths_rows, 2),
    "trellis": (trellis_rows, 2),
    "grids": (grids_rows, 2),
    "levels": (levels_rows, 2),
    "unsigned": (unsigned_rows, 2),
    "integers": (integers_rows, 2),
    "addends": (addends_rows, 2),
    "nested": (nested_rows, 2),
}


def write(path: Path) -> None:
    """The table that a golden file of this name holds."""
    rows, version = TABLES[path.stem]
    write_table(path, rows(), version=version, config=CONFIG, aliases=ALIASES)


if __name__ == "__main__":
    for table in sys.argv[1:]:
        for suffix in ("parquet", "arrow"):
            write(FOLDER / f"{table}.{suffix}")
