"""Read rows as plain arrays of JAX, torch and NumPy, and make rows of plain arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from aq_jax.core.frameworks import Framework, cast_floating, check_framework, to_framework
from aq_jax.core.torch_tensors import torch_module
from aq_jax.errors import FormatError
from aq_jax.store import Row, TableReader, aligned_copy, decode, pieces
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
    array = cast_floating(decode(table.read_tensor(name)), dtype)
    return aligned_copy(array) if copy and not array.flags.writeable else array


def plain_rows(name: str, array: np.ndarray, dtype: str | None = None, quant_type: str | None = None) -> Iterator[Row]:
    """Make the rows of a tensor that is stored as it is: one, or several of at most 1 GiB."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype == np.bool_ and flat.view(np.uint8).max(initial=0) > 1:  # which no reader would load
        raise FormatError(
            f"{name}: holds bytes other than 0 and 1, which are not bool; wanted only those, or dtype uint8"
        )
    own = dtype_name(array.dtype)
    for start, stop in pieces(array.shape, own):
        data = flat[start:stop].view(np.uint8) if stop > start else _NO_BYTES
        yield Row(name, array.shape, dtype or own, data, stop - start, quant_type)


def as_v2(row: Row) -> Row:
    """Convert a plain row to that of a V2 table."""
    return row if row.quant_type else Row(row.layer_name, row.shape, row.dtype, row.data, row.num_params, "none")
