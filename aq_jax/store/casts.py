"""Cast numbers to a dtype that may not hold them all: find the first that it does not hold, or take the nearest."""

from __future__ import annotations

import ml_dtypes
import numpy as np

_BLOCK = 1 << 16  # elements: what is compared stays in the processor's cache


def find_lost(flat: np.ndarray, dtype: np.dtype, out: np.ndarray | None = None) -> int | None:
    """Find the first number that a dtype does not hold; None if it holds all of them.

    Floating dtypes round, but do not hold what would become an infinity or NaN. Integers and bool hold their own
    numbers alone.

    Args:
        flat: Numbers along one axis.
        dtype: The dtype to cast to: of integers, a narrower integer; of floating and complex numbers, any.
        out: Memory of that dtype for the numbers up to the one that is found.

    >>> find_lost(np.array([1, 0.1, np.inf, 1e6], np.float32), np.dtype("float16"))
    3
    >>> find_lost(np.array([1, -128, 127, 2.5], np.float32), np.dtype("int8"))
    3
    """
    real = all(each.name.startswith(("float", "bfloat")) for each in (flat.dtype, dtype))
    # One byte may have no place for an infinity.
    if real and dtype.itemsize > 1 and _outermost(flat.dtype)[1] <= _outermost(dtype)[1]:
        if out is not None:
            out[...] = flat
        return None
    # Two reductions take far less time than looking at each number; a NaN is within no bounds.
    within = _outermost(dtype) if real and flat.dtype.itemsize >= 4 else None
    for start in range(0, flat.size, _BLOCK):
        values = flat[start : start + _BLOCK]
        with np.errstate(over="ignore", invalid="ignore"):
            cast = values.astype(dtype)
        if out is not None:
            out[start : start + _BLOCK] = cast
        if within is not None and within[0] <= float(values.min()) and float(values.max()) <= within[1]:
            continue
        lost = _lost(values, cast)
        if lost.any():
            return start + int(lost.argmax())
    return None


def saturated(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Cast dequantized values to a dtype, each to the nearest number that it has: levels may lie beyond the outermost.

    >>> saturated(np.array([300, -1.6, -1000], np.float32), np.dtype("int8")).tolist()
    [127, -2, -128]
    """
    if array.dtype == dtype:
        return array
    if dtype.kind in "iub":  # another writer quantized integers
        low, high = _bounds(dtype)
        whole = np.asarray(np.rint(array))
        with np.errstate(invalid="ignore"):
            cast = whole.astype(dtype)
        # Bounds may be no float32: the nearest lies beyond, and would wrap.
        return np.where(whole >= float(high), dtype.type(high), np.where(whole <= float(low), dtype.type(low), cast))
    if dtype.itemsize < 4:
        array = np.asarray(np.clip(array, *_outermost(dtype)))
    return array.astype(dtype)


def _lost(values: np.ndarray, cast: np.ndarray) -> np.ndarray:
    if cast.dtype.kind not in "iub":
        lost = ~np.isfinite(cast)
        if lost.any():
            lost = (np.isnan(cast) & ~np.isnan(values)) | (np.isinf(cast) & ~np.isinf(values))
        return lost
    if values.dtype.kind in "iu":
        return cast != values
    low, high = _bounds(cast.dtype)
    wide = values.astype(np.promote_types(values.dtype, np.float32), copy=False)  # float16 has no 2^31
    return ~((wide == np.rint(wide)) & (wide >= float(low)) & (wide < float(high) + 1))


def _outermost(dtype: np.dtype) -> tuple[float, float]:
    """Return the outermost numbers of a floating dtype."""
    most = ml_dtypes.finfo(dtype)
    return float(most.min), float(most.max)


def _bounds(dtype: np.dtype) -> tuple[int, int]:
    """Return the outermost numbers of an integer dtype, or of bool."""
    if dtype == np.bool_:
        return 0, 1
    most = np.iinfo(dtype)
    return most.min, most.max
