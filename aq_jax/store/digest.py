"""Compute BLAKE3 digests of a row, of the rows' statistics, and of the table.

A digest depends on values only, never on how Arrow or Parquet encodes them: a table rewritten by another tool keeps it.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3

from aq_jax.store.schema import written_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from aq_jax.store.rows import Row, RowInfo, Sealed

_LENGTH = struct.Struct("<Q")
_INT = struct.Struct("<q")
_FLOAT = struct.Struct("<d")
_NULL = b"\x00"
_MANY_THREADS_FROM = 64 << 20


def row_digest(row: Row) -> bytes:
    """Hash everything that a row's values depend on into 32 bytes; docs/format.md specifies it byte by byte."""
    quantized = row.quant_type is not None
    head = b"".join(
        (
            _field(row.layer_name.encode()),
            _field(b"".join(map(_INT.pack, row.shape))),
            _field(written_dtype(row.dtype).encode()),
            _field(row.quant_type.encode() if row.quant_type is not None else None),
            _field(_INT.pack(row.quant_axis) if quantized else None),
            _field(_INT.pack(row.group_size) if quantized else None),
            _field(_INT.pack(row.rotation) if quantized else None),
            _field(_INT.pack(row.num_params)),
            _field(row.scales.tobytes() if quantized else None),
            _field(row.zero_points.tobytes() if quantized else None),
            b"\x01" + _LENGTH.pack(row.data.nbytes),
        )
    )
    # Threads would only compete with the caller's, unless there is much to hash.
    threads = blake3.AUTO if row.data.nbytes >= _MANY_THREADS_FROM else 1
    return blake3(head, max_threads=threads).update(np.ascontiguousarray(row.data).data).digest()


def statistics_digest(rows: Iterable[Row | RowInfo | Sealed]) -> bytes:
    """Hash solver, cosine and rel_mse of all rows in order into 32 bytes."""
    state = blake3()
    for row in rows:
        state.update(_field(row.solver.encode() if row.solver is not None else None))
        for value in (row.cosine, row.rel_mse):
            state.update(_field(_FLOAT.pack(value) if value is not None else None))
    return state.digest()


def table_digest(metadata: Mapping[str, object], row_digests: Iterable[bytes] = ()) -> bytes:
    """Hash the metadata without its own `digest`, and then every row's digest in order, into 32 bytes."""
    state = blake3(canonical_json({key: value for key, value in metadata.items() if key != "digest"}))
    for digest in row_digests:
        state.update(digest)
    return state.digest()


def canonical_json(value: object) -> bytes:
    """Write JSON with sorted keys and no spaces, in UTF-8: one value, one text.

    >>> canonical_json({"b": 1, "a": "ü"}).decode()
    '{"a":"ü","b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _field(value: bytes | None) -> bytes:
    return _NULL if value is None else b"\x01" + _LENGTH.pack(len(value)) + value
