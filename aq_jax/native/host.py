"""Call the native library on NumPy arrays, without JAX: for the loader, and for what is quantized tile by tile.

Each function says whether it did its work: without a library, or where AQ_JAX_KERNEL names another kernel, it does not.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np

from aq_jax import native
from aq_jax.cores import cores

VARIABLE = "AQ_JAX_KERNEL"
"""The variable that forces a kernel, here and in `aq_jax.ops`."""
LONGEST_SEARCHED = 1 << 18
"""The most elements of a group that is searched: it is read many times, from a cache."""
Method = Literal["absmax", "minmax", "mid_tread", "mid_rise", "affine"]
TRELLIS_ROWS = 256
"""The rows of a tile of trellis codes."""
_UNSOUND = 1


def dequantize(
    data: np.ndarray,
    bits: int,
    scales: np.ndarray,
    zero_points: np.ndarray | None,
    minimums: np.ndarray | None,
    group: int,
    out: np.ndarray,
) -> bool:
    """Decode a bit stream into float32: (code - zero_point) * scale + minimum, results below 2^-126 being 0.

    Args:
        data: The stream as uint8; with eight bits, signed bytes.
        bits: The bits of a code.
        scales: One float32 a group.
        zero_points: One float32 a group; None for zeros.
        minimums: The same.
        group: The number of elements of a group; the last may be short.
        out: The float32 array that is filled.
    """
    if (call := _filling("aq_decode", out)) is None:
        return False
    data = np.ascontiguousarray(data)
    grids = [
        None if grid is None else np.ascontiguousarray(grid, np.float32) for grid in (scales, zero_points, minimums)
    ]
    pointers = (None if grid is None else grid.ctypes.data for grid in grids)
    wrong = call(data.ctypes.data, data.size, bits, *pointers, scales.size, group, out.size, cores(), out.ctypes.data)
    return wrong is None


def dequantize_tiles(
    data: np.ndarray, step: tuple[int, int], scales: np.ndarray, shape: tuple[int, int, int], out: np.ndarray
) -> bool:
    """Decode matrices of trellis codes into float32: level * scale.

    Args:
        data: The bytes of their tiles.
        step: The bits of a step, and the weights that it is for.
        scales: One float32 a row.
        shape: The matrices, and the rows and columns of each.
        out: The float32 array that is filled.
    """
    if (call := _filling("aq_decode_tiles", out)) is None:
        return False
    data, scales = np.ascontiguousarray(data), np.ascontiguousarray(scales, np.float32)
    wrong = call(data.ctypes.data, data.size, *step, scales.ctypes.data, *shape, cores(), out.ctypes.data)
    return wrong is None


@dataclass(frozen=True)
class Recipe:
    """Tell the library how to choose the grid of each group.

    Args:
        method: From the range of a group ("absmax", "minmax"), or by a search for the smallest squared error with zero
            on a level, between two, or anywhere ("mid_tread", "mid_rise", "affine").
        starts: The fractions of the range that a search starts from.
        rounds: The rounds of a search from each start.
    """

    method: Method
    starts: tuple[float, ...] = ()
    rounds: int = 0

    @property
    def number(self) -> int:
        """The library's number of the method."""
        return get_args(Method).index(self.method)


def takes(recipe: Recipe, group: int) -> bool:
    """Tell whether the library has a recipe for groups of this length."""
    return group <= LONGEST_SEARCHED or not recipe.starts


def quantize(
    w: np.ndarray, group: int, bits: int, recipe: Recipe, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray
) -> tuple[tuple[float, ...], bool]:
    """Quantize the groups of a flat array into arrays that are there.

    Args:
        w: Contiguous weights, float32 or bfloat16.
        group: The number of elements of a group; the last may be short.
        bits: The bits of a code.
        recipe: How grids are chosen.
        codes: The bit stream, uint8, if groups are whole bytes; or int8, one code each.
        scales: One float32 a group.
        zeros: The zero points, one float32 a group.

    Returns:
        The sums of w.w, w.d and d.d over all elements, d being the error, in float64; and whether all elements are
        finite and all scales within bounds. Neither depends on the number of threads.
    """
    call = _function("aq_quantize_groups")
    assert call is not None  # noqa: S101
    starts = (ctypes.c_float * len(recipe.starts))(*recipe.starts)
    sums, flags = (ctypes.c_double * 3)(), ctypes.c_int32()
    wrong = call(w.ctypes.data, w.itemsize == 2, w.size, group, bits, recipe.number, starts, len(starts), recipe.rounds,
                 codes.dtype == np.uint8, cores(), codes.ctypes.data, scales.ctypes.data, zeros.ctypes.data, sums,
                 ctypes.byref(flags))  # fmt: skip
    if wrong is not None:
        raise ValueError(f"aq_quantize_groups: {wrong.decode()}")
    return tuple(sums), not flags.value & _UNSOUND


def encodes_trellis() -> bool:
    """Tell whether the library is there to choose trellis codes."""
    return _chosen() and _function("aq_encode_trellis") is not None


def encode_trellis(
    w: np.ndarray,
    bits: int,
    levels: np.ndarray,
    hessian: tuple[np.ndarray, np.ndarray] | None,
    start: float,
    rounds: int,
    data: np.ndarray,
    scales: np.ndarray,
) -> tuple[np.ndarray, bool]:
    """Choose the trellis codes of a matrix, into arrays that are there.

    Args:
        w: Contiguous float32 weights [rows, columns].
        bits: The bits of a step.
        levels: The int8 levels of each state, [values of a step, states].
        hessian: What the columns weigh, and the factor of the inverse; both contiguous float32.
        start: The first scale of a row, as a part of the root of its mean square.
        rounds: The rounds of refinement.
        data: The codes, uint8, each tile from a whole byte on.
        scales: One float32 a row.

    Returns:
        The sums of w.w, w.d and d.d over all elements, d being the error, in float64; and whether all elements are
        finite and all scales within bounds. Neither depends on the number of threads.
    """
    call = _function("aq_encode_trellis")
    assert call is not None  # noqa: S101
    h, u = (None, None) if hessian is None else (each.ctypes.data for each in hessian)
    sums, flags = np.empty((-(-len(w) // TRELLIS_ROWS), 3)), np.zeros(1, np.int32)
    wrong = call(w.ctypes.data, *w.shape, TRELLIS_ROWS, bits, len(levels), levels.ctypes.data, h, u, start, rounds,
                 cores(), data.ctypes.data, scales.ctypes.data, sums.ctypes.data, flags.ctypes.data)  # fmt: skip
    if wrong is not None:
        raise ValueError(f"aq_encode_trellis: {wrong.decode()}")
    return sums.sum(axis=0), not flags[0] & _UNSOUND


_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = {
    "aq_quantize_groups": (_POINTER, *(_NUMBER,) * 5, _POINTER, *(_NUMBER,) * 4, *(_POINTER,) * 5),
    "aq_encode_trellis": (
        _POINTER, *(_NUMBER,) * 5, *(_POINTER,) * 3, ctypes.c_double, _NUMBER, _NUMBER, *(_POINTER,) * 4
    ),
    "aq_decode_tiles": (_POINTER, _NUMBER, _NUMBER, _NUMBER, _POINTER, *(_NUMBER,) * 4, _POINTER),
    "aq_decode": (_POINTER, _NUMBER, _NUMBER, _POINTER, _POINTER, _POINTER, *(_NUMBER,) * 4, _POINTER),
}  # fmt: skip


def _chosen() -> bool:
    return os.environ.get(VARIABLE, "native") == "native"


def _filling(name: str, out: np.ndarray) -> ctypes._NamedFuncPointer | None:
    """Find a function that fills an array, if it is chosen and the array is one that it fills."""
    return _function(name) if _chosen() and out.flags.c_contiguous and out.dtype == np.float32 else None


@cache
def _function(name: str) -> ctypes._NamedFuncPointer | None:
    library = native.open_library()
    if library is None:
        return None
    found = getattr(library, name)
    found.argtypes, found.restype = _ARGUMENTS[name], ctypes.c_char_p
    return found
