"""A second reader, written from docs/format.md alone: slow, obvious, and sharing no code with aq_jax.

It takes the file as whole Python values and decodes one code at a time.
"""

from __future__ import annotations

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
    from pathlib import Path

BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2, "int4h": 4, "int3h": 3, "int2h": 2}


def read_rows(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """All cells as Python values, and the metadata."""
    if path.read_bytes()[:4] == b"PAR1":
        text = (pq.read_metadata(path).metadata or {}).get(b"aq_jax")
        table = pq.read_table(path, page_checksum_verification=True)
    else:
        with pa.ipc.open_file(path) as file:
            count = file.num_record_batches
            last = file.get_batch_with_custom_metadata(count - 1).custom_metadata
            text = dict(last)[b"aq_jax"] if last else None
            table = file.read_all()
    return table.to_pylist(), json.loads(text) if text else None


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every stored tensor by name: quantized ones in float32, others in their own dtype."""
    parts: dict[str, list[np.ndarray]] = {}
    last: dict[str, dict[str, Any]] = {}
    for row in read_rows(path)[0]:
        parts.setdefault(row["layer_name"], []).append(decode(row))
        last[row["layer_name"]] = row
    whole = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    return {
        name: (unrotate(array, row["rotation"]) if row.get("rotation") else array).reshape(row["shape"])
        for (name, array), row in zip(whole.items(), last.values(), strict=True)
    }


def dtype_of(text: str) -> np.dtype:
    name = text.removeprefix("torch.")
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def decode(row: dict[str, Any]) -> np.ndarray:
    kind, count, dtype = row.get("quant_type", "none"), row["num_params"], dtype_of(row["dtype"])
    if kind in ("fp16", "fp32"):
        return np.frombuffer(row["data"], np.float16 if kind == "fp16" else np.float32).astype(dtype)
    if kind == "none":
        return np.frombuffer(row["data"], dtype)
    scales, zeros = (np.frombuffer(row[column], "<f4") for column in ("scales", "zero_points"))
    length = row["group_size"] or (math.prod(row["shape"][1:]) if row["quant_axis"] == 0 else count)
    values = [
        (np.float32(code(row["data"], i, BITS[kind])) - zeros[i // length]) * scales[i // length] for i in range(count)
    ]
    return np.array(values, np.float32)


def unrotate(values: np.ndarray, n: int) -> np.ndarray:
    """Each block of n elements of the flattened tensor times the transposed matrix, in float64."""
    out = [
        sum(float(values[start + j]) * rotation(i, j, n) for j in range(n))
        for start in range(0, values.size, n)
        for i in range(n)
    ]
    return np.array(out, np.float32)


def rotation(i: int, j: int, n: int) -> float:
    return (-1) ** ((i & (i >> 1)).bit_count() + (i & j).bit_count()) / math.sqrt(n)


def code(data: bytes, index: int, bits: int) -> int:
    if bits == 8:
        return struct.unpack_from("b", data, index)[0]
    value = 0
    for k in range(bits):
        place = bits * index + k
        value |= (data[place // 8] >> (place % 8) & 1) << k
    return value - 2 ** (bits - 1)


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
    columns = [
        "layer_name",
        "shape",
        "dtype",
        "quant_type",
        "quant_axis",
        "group_size",
        "rotation",
        "num_params",
        "scales",
        "zero_points",
        "data",
    ]
    return blake3(b"".join(field(row.get(column)) for column in columns)).digest()


def table_digests(rows: list[dict[str, Any]], metadata: dict[str, Any]) -> tuple[str, str]:
    """(statistics, digest) as the metadata must say them."""
    statistics = blake3(b"".join(field(row.get(c)) for row in rows for c in ("solver", "cosine", "rel_mse")))
    rest = {key: value for key, value in metadata.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return statistics.hexdigest(), blake3(text + b"".join(row["digest"] for row in rows)).hexdigest()
