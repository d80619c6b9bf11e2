"""List what a table holds, from its small columns alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aq_jax.store import RowInfo, open_table
from aq_jax.store.manifest import table_files


@dataclass(frozen=True, slots=True)
class Layer:
    """A tensor in the list of `inspect`: all of its rows together."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    quant_type: str
    params: int
    bytes: int
    bits: float
    cosine: float | None
    rel_mse: float | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """The contents of a table, from its small columns alone.

    Args:
        path: The file or folder.
        version: The version of the schema.
        file_bytes: The bytes on disk, everything counted.
        layers: The tensors.
        aliases: The tied tensors.
        config: The config that made the table, if it has one.
        format: The name of the format, if it is no table; `version` is 0 then.
    """

    path: str
    version: int
    file_bytes: int
    layers: tuple[Layer, ...]
    aliases: Mapping[str, str]
    config: Mapping[str, Any]
    format: str = "table"

    @property
    def params(self) -> int:
        return sum(layer.params for layer in self.layers)


def inspect_table(path: str | os.PathLike[str]) -> Inspection:
    """List the tensors of a table: shape, type, true bits per weight (bytes on disk), fit. No tensor is read.

    Args:
        path: The path of a table, or of a folder of them.

    Raises:
        FormatError: if it is not a table of this format.
        IntegrityError: if its metadata and its rows do not belong together.

    >>> import numpy as np, tempfile
    >>> import aq_jax as aq
    >>> path = tempfile.mkdtemp() + "/m.arrow"
    >>> aq.save(path, {"w": aq.quantize(np.ones((4, 8), np.float32), "int8")})
    >>> [(layer.name, layer.quant_type, layer.bits) for layer in inspect_table(path).layers]
    [('w', 'int8', 16.0)]
    """
    with open_table(path) as table:
        layers = tuple(_layer(table.pieces(name)) for name in table.names)
        return Inspection(str(path), table.version, _size(Path(path)), layers, dict(table.aliases), table.config)


def _layer(rows: list[RowInfo]) -> Layer:
    first, params = rows[0], sum(row.num_params for row in rows)
    size = sum(row.disk_bytes for row in rows)
    # Of a tensor in pieces, the worst cosine and the mean error count; NaN of another writer does not.
    cosines = [row.cosine for row in rows if row.cosine is not None and math.isfinite(row.cosine)]
    errors = [row.rel_mse * row.num_params for row in rows if row.rel_mse is not None and math.isfinite(row.rel_mse)]
    return Layer(
        name=first.layer_name,
        shape=first.shape,
        dtype=first.dtype,
        quant_type=first.quant_type or first.dtype,
        params=params,
        bytes=size,
        bits=size * 8 / params if params else 0.0,
        cosine=min(cosines) if cosines else None,
        rel_mse=sum(errors) / params if errors and params else None,
    )


def _size(path: Path) -> int:
    files = [path] if path.is_file() else table_files(path)[0]
    return sum(file.stat().st_size for file in files)
