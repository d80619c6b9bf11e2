"""Write arrays and QTensors to a table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from aq_jax.config import Compression
from aq_jax.core.frameworks import identity_key, to_numpy, unwrap_variable
from aq_jax.core.prepared import Prepared, to_qtensor
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import FormatError
from aq_jax.io.dense import as_v2, plain_rows
from aq_jax.io.qtensors import packed_rows
from aq_jax.store import TableWriter
from aq_jax.store.row_rules import is_name


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    config: Mapping[str, object] | None = None,
    compression: Compression = "none",
) -> None:
    """Write arrays and QTensors to a table: V1 if nothing is quantized, else V2.

    A value with several names (the same object, or torch tensors over the same memory) is stored once and comes back
    under all of them. A QTensor is recorded as float32, whatever it was made from; `quantize_file` and `convert` record
    the tensor's own dtype.

    Args:
        path: The path of a .parquet or .arrow file, which appears whole, or not at all.
        tensors: JAX, NumPy or torch arrays, or QTensors, by name; also in variables of Flax NNX. A prepared weight is
            stored as its QTensor.
        config: A config for the table's metadata.
        compression: The compression of the weights: "zstd" (.parquet only), or "none".

    Raises:
        AqError: for a value that is not a tensor, a masked array, and a shape without values.
        FormatError: for a file name, a tensor name or a shape that the format does not allow, and a config that is no
            mapping.
        ValueError: for a batch of QTensors whose groups cross rows.

    >>> import jax.numpy as jnp, tempfile
    >>> import aq_jax as aq
    >>> path = tempfile.mkdtemp() + "/m.parquet"
    >>> aq.save(path, {"w": aq.quantize(jnp.ones((2, 8)), "int8"), "bias": jnp.zeros(2)}, config={"made": "by hand"})
    >>> list(aq.load(path))
    ['w', 'bias']
    """
    # Once: where a mapping makes its values when asked, their ids would mean nothing.
    tensors = {name: unwrap_variable(value) for name, value in tensors.items()}
    for name in tensors:
        if not is_name(name):
            raise FormatError(f"{path}: found the tensor name {name!r:.60}; wanted a non-empty string of valid Unicode")
    quantized = any(isinstance(value, QTensor | Prepared) for value in tensors.values())
    seen: dict[object, str] = {}
    with TableWriter(path, version=2 if quantized else 1, config=config, compression=compression) as table:
        for name, value in tensors.items():
            if (stored := seen.setdefault(identity_key(value), name)) != name:
                table.alias(name, stored)
                continue
            if isinstance(value, QTensor | Prepared):
                rows = packed_rows(name, to_qtensor(value))
            else:
                rows = plain_rows(name, to_numpy(value, name))
            for row in rows:
                table.write(as_v2(row) if quantized else row)
