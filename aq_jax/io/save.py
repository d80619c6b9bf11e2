"""Writes arrays and QTensors to a table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from aq_jax.config import Compression
from aq_jax.core.frameworks import identity, to_numpy, unwrapped
from aq_jax.core.prepared import Prepared, to_qtensor
from aq_jax.core.qtensor import QTensor
from aq_jax.io.dense import as_v2, plain_rows
from aq_jax.io.qtensors import packed_rows
from aq_jax.store import TableWriter


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    config: Mapping[str, object] | None = None,
    compression: Compression = "none",
) -> None:
    """Write arrays and QTensors to a table: V1 if nothing is quantized, else V2.

    A value that stands under several names (the same object, or torch tensors over the same memory) is stored once
    and comes back under all of them. A QTensor is recorded as float32, whatever it was made from; `quantize_file`
    and `convert` record the dtype that a tensor had.

    Args:
        path: .parquet or .arrow; appears whole, or not at all.
        tensors: JAX, NumPy or torch arrays, or QTensors, by name; also as variables of Flax NNX. Of what `prepare` made
            the QTensor is stored.
        config: kept in the table's metadata.
        compression: "zstd" compresses the weights too (.parquet only).

    Raises:
        AqError: for a value that is no tensor, a masked array, and a shape without values.
        FormatError: for a file name, a tensor name or a shape that the format does not have.
        ValueError: for a batch of QTensors whose groups cross rows.

    >>> import jax.numpy as jnp, tempfile
    >>> import aq_jax as aq
    >>> path = tempfile.mkdtemp() + "/m.parquet"
    >>> aq.save(path, {"w": aq.quantize(jnp.ones((2, 8)), "int8"), "bias": jnp.zeros(2)}, config={"made": "by hand"})
    >>> list(aq.load(path))
    ['w', 'bias']
    """
    # Once: of a mapping that makes its values when asked, an object's id would mean nothing.
    tensors = {name: unwrapped(value) for name, value in tensors.items()}
    quantized = any(isinstance(value, QTensor | Prepared) for value in tensors.values())
    seen: dict[object, str] = {}
    with TableWriter(path, version=2 if quantized else 1, config=config, compression=compression) as table:
        for name, value in tensors.items():
            if (stored := seen.setdefault(identity(value), name)) != name:
                table.alias(name, stored)
                continue
            if isinstance(value, QTensor | Prepared):
                rows = packed_rows(name, to_qtensor(value))
            else:
                rows = plain_rows(name, to_numpy(value, name))
            for row in rows:
                table.write(as_v2(row) if quantized else row)
