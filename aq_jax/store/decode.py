"""Rows to NumPy arrays: codes are unpacked and dequantized, raw bytes get their dtype and shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from aq_jax.codes.bits import unpack_codes
from aq_jax.codes.rotation import unrotate_rows
from aq_jax.errors import FormatError
from aq_jax.store.layout import group_length, stored_dtype
from aq_jax.store.rows import elements
from aq_jax.store.schema import DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aq_jax.store.rows import Row

_ALIGNMENT = 64
_BLOCK = 1 << 15
_TINY = np.float32(2.0**-126)
_SAFE = 2.0**-60


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype | type | str) -> np.ndarray:
    """Uninitialized memory that starts at a multiple of 64 bytes, as JAX needs it to take it without a copy.

    >>> aligned_empty((3, 5), "float32").ctypes.data % 64
    0
    """
    dtype = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    memory = np.empty(count * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + count * dtype.itemsize].view(dtype).reshape(shape)


def dequantize_rows(pieces: Sequence[Row]) -> np.ndarray:
    """The tensor of quantized rows: float32(q) - zero_point, times scale, in float32; new memory, aligned.

    Results below 2^-126 become 0, as they do in XLA. The rotation of rotated rows is undone.
    """
    first = pieces[0]
    flat = aligned_empty((elements(first),), np.float32)
    start = 0
    for row in pieces:
        _dequantize(row, flat[start : start + row.num_params])
        start += row.num_params
    if first.rotation:
        flat[...] = unrotate_rows(flat, first.rotation)
    return flat.reshape(first.shape)


def _dequantize(row: Row, out: np.ndarray) -> None:
    if not out.size:
        return
    assert row.bits is not None  # noqa: S101
    codes = unpack_codes(row.data, row.bits, row.num_params)
    length = group_length(row.shape, row.quant_axis, row.group_size) or row.num_params
    scales, zeros = row.scales, row.zero_points
    tiny = bool((scales < _SAFE).any() or ((zeros != 0) & (abs(zeros) < _SAFE)).any())
    if tiny:  # XLA takes such inputs for zero as well
        zeros = np.where(abs(zeros) < _TINY, np.float32(0), zeros)
    whole = row.num_params // length
    with np.errstate(over="ignore", under="ignore"):
        if whole:
            body = whole * length
            shape = (whole, length)
            _affine(codes[:body].reshape(shape), scales[:whole, None], zeros[:whole, None], out[:body].reshape(shape))
        if whole < len(scales):
            rest = slice(whole * length, None)
            _affine(codes[None, rest], scales[whole:, None], zeros[whole:, None], out[None, rest])
        if tiny:
            out[abs(out) < _TINY] *= 0


def _affine(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, out: np.ndarray) -> None:
    """(codes - zeros) * scales, a block at a time: each block stays in the cache for all its steps."""
    groups, length = codes.shape
    shifted = bool(zeros.any())
    rows, columns = max(_BLOCK // length, 1), min(length, _BLOCK)
    for top in range(0, groups, rows):
        for left in range(0, length, columns):
            block = np.s_[top : top + rows, left : left + columns]
            target = out[block]
            target[...] = codes[block]
            if shifted:
                target -= zeros[top : top + rows]
            target *= scales[top : top + rows]


def raw_array(pieces: Sequence[Row]) -> np.ndarray:
    """The tensor of unquantized rows in its own dtype.

    A single row whose bytes need no cast is returned as a read-only view of them, all else as new memory.

    Raises:
        FormatError: the bytes are not values of that dtype.
    """
    first = pieces[0]
    stored, wanted = DTYPES[stored_dtype(first.dtype, first.quant_type)], DTYPES[first.dtype]
    for row in pieces:
        if stored == np.bool_ and row.data.size and row.data.max() > 1:
            raise FormatError(f"{row.layer_name}: holds bytes other than 0 and 1, which are no bool")
    if len(pieces) == 1 and stored == wanted:
        view = first.data.view(stored).reshape(first.shape)
        if view.flags.aligned:
            view.flags.writeable = False
            return view
    result = aligned_empty((elements(first),), wanted)
    start = 0
    for row in pieces:
        values = row.data.view(stored)
        if wanted.kind in "iub" and stored != wanted and not np.isfinite(values).all():
            raise FormatError(f"{row.layer_name}: holds NaN or infinity, which are no {first.dtype}")
        with np.errstate(over="ignore"):
            result[start : start + row.num_params] = values
        start += row.num_params
    return result.reshape(first.shape)


def decode(pieces: Sequence[Row]) -> np.ndarray:
    """One tensor from all its rows: float32 if it is quantized, else its own dtype."""
    return dequantize_rows(pieces) if pieces[0].quantized else raw_array(pieces)
