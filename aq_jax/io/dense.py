"""Read rows as plain arrays of JAX, torch and NumPy, and make rows of plain arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aq_jax.core.frameworks import Framework, cast_floating, check_framework, floating_dtype, to_framework
from aq_jax.core.torch_tensors import torch_module
from aq_jax.store import Row, TableReader, aligned_copy, decode, pieces
from aq_jax.store.decode import check_values
from aq_jax.store.schema import dtype_name

_NO_BYTES = np.empty(0, np.uint8)


def load_dense(table: TableReader, name: str, framework: Framework, dtype: Any, copy: bool) -> Any:
    """Read one tensor as an array of a framework; see `WeightLoader.get_layer`."""
    check_framework(framework)
    if framework == "torch":
        torch_module()  # before anything is read
    return to_framework(read_dense(table, name, dtype, copy), framework, name)


def read_dense(table: TableReader, name: str, dtype: Any, copy: bool) -> np.ndarray:
    """Read one tensor as a NumPy array; see `WeightLoader.get_layer`."""
    target = floating_dtype(dtype)
    array = decode_as(table.read_tensor(name), target, table.path)
    return aligned_copy(array) if copy and not array.flags.writeable else array


def decode_as(rows: Sequence[Row], dtype: np.dtype | None, path: Path) -> np.ndarray:
    """Decode all rows of one tensor of a table, and cast it to a floating dtype, if it is floating and there is one.

    Raises:
        FormatError: as for `decode`.
        AqError: naming the first value of an unquantized tensor that the dtype does not hold.
    """
    return cast_floating(decode(rows, path), dtype, rows[0].layer_name, rows[0].quantized)


def plain_rows(name: str, array: np.ndarray, dtype: str | None = None, quant_type: str | None = None) -> Iterator[Row]:
    """Make the rows of a tensor that is stored as it is: one, or several of at most 1 GiB.

    Raises:
        FormatError: as for `check_values`.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    own = dtype_name(array.dtype)
    for start, stop in pieces(array.shape, own):
        data = flat[start:stop].view(np.uint8) if stop > start else _NO_BYTES
        row = Row(name, array.shape, dtype or own, data, stop - start, quant_type)
        check_values(row, name)  # no reader would load others
        yield row


def as_v2(row: Row) -> Row:
    """Convert a plain row to that of a V2 table."""
    return row if row.quant_type else Row(row.layer_name, row.shape, row.dtype, row.data, row.num_params, "none")
