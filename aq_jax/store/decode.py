"""Decode rows into NumPy arrays: unpack and dequantize codes, give raw bytes their dtype and shape.

One decoder serves every framework: JAX and torch take over its fresh, aligned memory without a copy, and agree bit for
bit by construction. It is the native library's, or else NumPy's. A load compiles nothing, and page faults bound it, not
arithmetic. XLA flushes results below 2^-126 to zero, so both decoders do as well, and `dequantize` of a packed tensor
gives the same.

One jitted function over the tree, or one a shape, was tried on MiniLM's packed tensors: 0.9 to 1.1 of the decoder's
time at eight and two bits, and a few tenths of a second more for the first load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from aq_jax.codes.rotation import unrotate_rows
from aq_jax.errors import FormatError
from aq_jax.store.casts import find_lost
from aq_jax.store.layout import group_length, stored_dtype
from aq_jax.store.rows import element_count
from aq_jax.store.schema import DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from aq_jax.store.rows import Row

_ALIGNMENT = 64


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype | type | str) -> np.ndarray:
    """Allocate uninitialized memory at a multiple of 64 bytes, which JAX can take over without a copy.

    >>> aligned_empty((3, 5), "float32").ctypes.data % 64
    0
    """
    dtype = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    memory = np.empty(count * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + count * dtype.itemsize].view(dtype).reshape(shape)


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """Copy an array into memory of its own, aligned so that JAX can take it over without another copy."""
    out = aligned_empty(array.shape, array.dtype)
    out[...] = array
    return out


def dequantize_rows(pieces: Sequence[Row]) -> np.ndarray:
    """Decode quantized rows into a float32 tensor in new, aligned memory.

    Results below 2^-126 become 0, as they do in XLA. The rotation of rotated rows is undone.
    """
    first = pieces[0]
    flat = aligned_empty((element_count(first),), np.float32)
    start = 0
    for row in pieces:
        assert row.code is not None  # noqa: S101
        out = flat[start : start + row.num_params]
        if out.size:
            group = group_length(row.shape, row.quant_axis, row.group_size) or row.num_params
            row.code.read(row.data, row.scales, row.zero_points, group, row.shape, out)
        start += row.num_params
    if first.rotation:
        flat[...] = unrotate_rows(flat, first.rotation)
    return flat.reshape(first.shape)


def raw_array(pieces: Sequence[Row], path: Path | None = None) -> np.ndarray:
    """Give unquantized rows their dtype and shape.

    A single row whose bytes need no cast becomes a read-only view of them; all else becomes new memory.

    Args:
        pieces: All rows of one tensor, in order.
        path: The table, for errors.

    Raises:
        FormatError: if the bytes are not values of that dtype.
    """
    first = pieces[0]
    stored, wanted = DTYPES[stored_dtype(first.dtype, first.quant_type)], DTYPES[first.dtype]
    where = first.layer_name if path is None else f"{path}: {first.layer_name}"
    if len(pieces) == 1 and stored == wanted:
        check_values(first, where)
        view = first.data.view(stored).reshape(first.shape)
        if view.flags.aligned:
            view.flags.writeable = False
            return view
    result = aligned_empty((element_count(first),), wanted)
    start = 0
    for row in pieces:
        out = result[start : start + row.num_params]
        check_values(row, where, out)
        start += row.num_params
    return result.reshape(first.shape)


def check_values(row: Row, where: str, out: np.ndarray | None = None) -> None:
    """Refuse an unquantized row whose bytes are not values of its dtype; all codes are values.

    Args:
        row: The row.
        where: The row's file and name, for errors.
        out: Memory for its values, in its dtype.

    Raises:
        FormatError: if a byte is no bool, or its dtype does not hold a value of an `fp16` or `fp32` row.
    """
    if row.quantized:
        return
    kept = stored_dtype(row.dtype, row.quant_type)
    stored, wanted = DTYPES[kept], DTYPES[row.dtype]
    if stored == np.bool_ and row.data.size and row.data.max() > 1:
        raise FormatError(
            f"{where}: holds bytes other than 0 and 1, which are not bool; wanted only those, or dtype uint8"
        )
    values = row.data.view(stored)
    if stored != wanted:
        at = find_lost(values, wanted, out)
        if at is not None:
            raise FormatError(
                f"{where}: holds the {kept} value {values[at]}, which {row.dtype} cannot hold; "
                f"wanted only values of {row.dtype}, or dtype {kept}"
            )
    elif out is not None:
        out[...] = values


def decode(pieces: Sequence[Row], path: Path | None = None) -> np.ndarray:
    """Decode all rows of one tensor: to float32 if it is quantized, else to its own dtype.

    Args:
        pieces, path: The arguments of `raw_array`.

    Raises:
        FormatError: as for `raw_array`.
    """
    return dequantize_rows(pieces) if pieces[0].quantized else raw_array(pieces, path)
