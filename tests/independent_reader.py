"""Read tables as docs/format.md says and no other way: an oracle that shares no code with aq_jax.

It takes the file as whole Python values, and its codes as single bits.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BITS = {f"int{bits}{rotated}": bits for rotated in ("", "h") for bits in (8, 6, 5, 4, 3, 2)}
# Trellis codes: the bits of a step, and its rows.
TRELLIS = {"tcq5": (5, 1), "tcq4": (4, 1), "tcq3": (3, 1), "tcq2": (2, 1), "tcq1.5": (3, 2)}
HASHES = ((0xBD8E8CD7, 0xED71BC08), (0x6F531C4F, 0x65330338))
FLOATS = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype(np.float32)}
SMALL_BITS = {
    f"int{bits}_{dtype}{what}": bits
    for dtype in FLOATS
    for what in (("", "i", "p") if dtype == "f32" else ("", "z", "i", "p", "u", "m", "a"))
    for bits in ((2,) if what == "p" else (8, 6, 5, 4, 3, 2))
}
# quant_type -> elements a group, bits of its integers, whether they are signed.
RECORDS = {"q2_k": (16, 4, False), "q3_k": (16, 6, True), "q4_k": (32, 6, False), "q5_k": (32, 6, False),
           "q6_k": (16, 8, True)}  # fmt: skip
NF4 = [-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1]  # fmt: skip
LEVELS = {"nf4": NF4, "fp4": [sign * level / 12 for sign in (1, -1) for level in (0, 1 / 16, 8, 12, 4, 6, 2, 3)]}
# Columns and their types; those that were added to V2 later may stand anywhere behind.
V1 = {"layer_name": "string", "shape": "list<element: int32>", "dtype": "string", "data": "binary",
      "num_params": "int64"}  # fmt: skip
V2 = V1 | {"quant_type": "string", "scales": "binary", "zero_points": "binary", "quant_axis": "int32",
           "group_size": "int32"}  # fmt: skip


def columns(path: Path, names: list[str] | None = None) -> pa.Table:
    """The whole table, or some of its columns, by pyarrow alone."""
    if path.read_bytes()[:4] == b"PAR1":
        return pq.read_table(path, columns=names, page_checksum_verification=True)
    with pa.ipc.open_file(path) as file:
        table = file.read_all()
    return table.select(names) if names else table


def begins_with(path: Path, wanted: dict[str, str]) -> bool:
    """Whether the table's first columns are these, in this order."""
    if path.read_bytes()[:4] == b"PAR1":
        schema = pq.read_schema(path)
    else:
        with pa.ipc.open_file(path) as file:
            schema = file.schema
    return [(field.name, str(field.type)) for field in schema][: len(wanted)] == list(wanted.items())


def reads_as_v1(path: Path) -> bool:
    """Whether a reader that knows the columns of V1 only gets them, and tensors of as many elements as they say."""
    table = columns(path, list(V1))
    whole: dict[str, int] = {}
    for row in (rows := table.drop_columns(["data"]).to_pylist()):
        whole[row["layer_name"]] = whole.get(row["layer_name"], 0) + row["num_params"]
    fits = all(whole[row["layer_name"]] == math.prod(row["shape"]) for row in rows)
    return fits and begins_with(path, V1) and table.column("data").null_count == 0


def read_rows(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """All cells as Python values, and the metadata."""
    if path.read_bytes()[:4] == b"PAR1":
        text = (pq.read_metadata(path).metadata or {}).get(b"aq_jax")
    else:
        with pa.ipc.open_file(path) as file:
            last = file.get_batch_with_custom_metadata(file.num_record_batches - 1).custom_metadata
        text = dict(last)[b"aq_jax"] if last else None
    return columns(path).to_pylist(), json.loads(text) if text else None


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every stored tensor by name: quantized ones in float32, others in their own dtype."""
    return dict(tensors(read_rows(path)[0]))


def tensors(rows: list[dict[str, Any]]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors, one after the other: rows of one name are pieces of one tensor."""
    for name, pieces in itertools.groupby(rows, key=lambda row: row["layer_name"]):
        found = list(pieces)
        whole, last = np.concatenate([decode(row) for row in found]), found[-1]
        yield name, (unrotate(whole, last["rotation"]) if last.get("rotation") else whole).reshape(last["shape"])


def dtype_of(text: str) -> np.dtype:
    name = text.removeprefix("torch.")
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def decode(row: dict[str, Any]) -> np.ndarray:
    kind, count, dtype = row.get("quant_type", "none"), row["num_params"], dtype_of(row["dtype"])
    if kind in ("fp16", "fp32"):
        return np.frombuffer(row["data"], np.float16 if kind == "fp16" else np.float32).astype(dtype)
    if kind == "none":
        return np.frombuffer(row["data"], dtype)
    if kind in SMALL_BITS or kind in RECORDS:
        return small_grids(row)
    dtype = FLOATS[kind[8:]] if kind.startswith("f8_e4m3_") else np.uint8 if kind.endswith("_nested") else "<f4"
    scales, zeros = np.frombuffer(row["scales"], dtype), np.frombuffer(row["zero_points"], "<f4")
    length = row["group_size"] or (math.prod(row["shape"][1:]) if row["quant_axis"] == 0 else count)
    if kind.endswith("_nested"):
        kind, scales = kind.removesuffix("_nested"), nested(scales, zeros)
    if kind in TRELLIS:
        return trellis(row["data"], count, row["shape"], *TRELLIS[kind]) * np.repeat(scales, length)
    grids = np.arange(count) // max(length, 1)
    if kind.startswith("f8_e4m3"):
        return np.frombuffer(row["data"], ml_dtypes.float8_e4m3fn).astype(np.float32) * scales[grids].astype(np.float32)
    if kind in LEVELS:
        return np.float32(LEVELS[kind])[codes(row["data"], count, 4) + 8] * scales[grids]
    return (codes(row["data"], count, BITS[kind]).astype(np.float32) - zeros[grids]) * scales[grids]


def nested(numbers: np.ndarray, floats: np.ndarray) -> np.ndarray:
    """The scale of each group: a level of 256 times the largest of its 256 groups, and the offset."""
    table, offset, largest = floats[:256], floats[256], floats[257:]
    assert len(largest) == -(-len(numbers) // 256)
    return np.array([np.float32(table[i] * largest[g // 256]) + offset for g, i in enumerate(numbers)], np.float32)


def small_grids(row: dict[str, Any]) -> np.ndarray:
    """Rows of small grids: a scale a group, and perhaps an offset; or records of two levels."""
    kind, count, f32 = row["quant_type"], row["num_params"], np.float32
    bits = SMALL_BITS.get(kind) or int(kind[1])
    q = codes(row["data"], count, bits).astype(f32)
    length = row["group_size"] or (math.prod(row["shape"][1:]) if row["quant_axis"] == 0 else count)
    if kind in RECORDS:
        scales, offsets = (record_floats(row[column], kind) for column in ("scales", "zero_points"))
        form, offsets = "m" if offsets.size else "", -offsets
    else:
        dtype = FLOATS[kind.partition("_")[2].rstrip("zipuma")]
        form = kind[-1] if kind[-1] in "zipuma" else ""
        scales = np.frombuffer(row["scales"], dtype).astype(f32)
        if form == "p":
            offsets = codes(row["zero_points"], scales.size, 2).astype(f32)
        else:
            offsets = np.frombuffer(row["zero_points"], np.int8 if form == "i" else dtype).astype(f32)
        assert offsets.size == (scales.size if form else 0)
    if form == "u":
        offsets = offsets - f32(2 ** (bits - 1))
    group = np.arange(count) // max(length, 1)
    if form == "m":
        value = (q + f32(2 ** (bits - 1))) * scales[group] + offsets[group]
    elif form == "a":
        value = q * scales[group] + offsets[group]
    else:
        value = (q - offsets[group] if form else q) * scales[group]
    return np.where(np.abs(value) < f32(2.0**-126), value * 0, value)


def record_floats(data: bytes, kind: str) -> np.ndarray:
    """The half of each record times its integers."""
    size, width, signed = RECORDS[kind]
    step, found = 2 + 256 // size * width // 8, []
    for at in range(0, len(data), step):
        (half,) = struct.unpack("<e", data[at : at + 2])
        integers = codes(data[at + 2 : at + step], 256 // size, width).astype(int) + (0 if signed else 2 ** (width - 1))
        found += [np.float32(half) * np.float32(i) for i in integers]
    return np.array(found, np.float32)


def codes(data: bytes, count: int, bits: int) -> np.ndarray:
    """Code i is in bits [bits * i, bits * (i + 1)) of one little-endian stream; at eight bits it is a signed byte."""
    if bits == 8:
        return np.frombuffer(data, np.int8)
    stream = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: count * bits].reshape(count, bits)
    value = sum(stream[:, k].astype(np.int16) << k for k in range(bits))
    return np.asarray(value) - 2 ** (bits - 1)


def trellis(data: bytes, count: int, shape: list[int], bits: int, high: int) -> np.ndarray:
    """The levels of a row of the table: tile after tile of its matrices, each weight by itself."""
    below, columns = shape[-2:]
    found = np.zeros((count // columns, columns), np.float32)
    at = 0
    for matrix in range(0, len(found), below):
        for top in range(matrix, min(matrix + below, len(found)), 256):
            rows = min(256, matrix + below - top, len(found) - top)
            length = columns * rows // high * bits
            ring = int.from_bytes(data[at : at + (length + 7) // 8], "little") & ((1 << length) - 1)
            ring |= ring << length
            at += (length + 7) // 8
            for row in range(rows):
                for column in range(columns):
                    state = ring >> (column * (rows // high) + row // high) * bits & 4095
                    factor, summand = HASHES[row % high]
                    found[top + row, column] = sum(((state * factor + summand) % 2**32).to_bytes(4)) // 4 - 127
    assert at == len(data)
    return found.reshape(-1)


def unrotate(values: np.ndarray, n: int) -> np.ndarray:
    """Each block of n elements of the flattened tensor times the transposed matrix, in float64."""
    matrix = np.array([[rotation(i, j, n) for j in range(n)] for i in range(n)])
    return (values.reshape(-1, n).astype(np.float64) @ matrix.T).astype(np.float32).reshape(-1)


def rotation(i: int, j: int, n: int) -> float:
    return (-1) ** ((i & (i >> 1)).bit_count() + (i & j).bit_count()) / math.sqrt(n)


def field(value: Any) -> bytes:
    if value is None:
        return b"\0"
    if isinstance(value, str):
        value = value.encode()
    elif isinstance(value, int):
        value = struct.pack("<q", value)
    elif isinstance(value, float):
        value = struct.pack("<d", value)
    elif isinstance(value, list):
        value = b"".join(struct.pack("<q", axis) for axis in value)
    return b"\1" + struct.pack("<Q", len(value)) + value


def row_digest(row: dict[str, Any]) -> bytes:
    """The digest of a row as its cells say it must be."""
    names = ("layer_name", "shape", "dtype", "quant_type", "quant_axis", "group_size", "rotation", "num_params")
    arrays = ("scales", "zero_points", "data")
    return blake3(b"".join(field(row.get(name)) for name in names + arrays)).digest()


def table_digests(rows: list[dict[str, Any]], metadata: dict[str, Any]) -> tuple[str, str]:
    """(statistics, digest) as the metadata must say them."""
    statistics = blake3(b"".join(field(row.get(c)) for row in rows for c in ("solver", "cosine", "rel_mse")))
    rest = {key: value for key, value in metadata.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return statistics.hexdigest(), blake3(text + b"".join(row["digest"] for row in rows)).hexdigest()
