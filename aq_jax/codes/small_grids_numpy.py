"""Decode and check codes of small grids in NumPy."""

from __future__ import annotations

import numpy as np

from aq_jax.codes.affine import Affine
from aq_jax.codes.bits import unpack_codes
from aq_jax.codes.elementwise_numpy import in_blocks
from aq_jax.codes.elementwise_numpy import read as read_uniform
from aq_jax.codes.small_grids import SmallGrids
from aq_jax.native import host

_TINY = np.float32(2.0**-126)
_SAFE = np.float32(2.0**-60)


def read(
    code: SmallGrids, data: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, group: int, out: np.ndarray
) -> None:
    """See `Code.read`. Results below 2^-126 become 0, as they do in XLA."""
    grids = scale, zeros, minimum = code.float_grids(scales, zero_points)
    if host.dequantize(data, code.bits, *grids, group, out):
        return
    if minimum is None:
        read_uniform(Affine(code.bits), data, scale, scale[:0] if zeros is None else zeros, group, out)
        return
    codes = unpack_codes(data, code.bits, out.size)
    for own, part, to in in_blocks(codes, group, out):
        np.add(part, np.float32(code.lift), out=to)
        to *= scale[own, None]
        to += minimum[own, None]
    # Both terms are whole multiples of a small number: their sum is none that float32 rounds to below 2^-126.
    if not (_safe(scale) and _safe(minimum)):
        out[abs(out) < _TINY] *= 0


def _safe(numbers: np.ndarray) -> bool:
    return not ((numbers != 0) & (abs(numbers) < _SAFE)).any()


def refuses_numbers(numbers: np.ndarray, what: str) -> str:
    """Say why these numbers cannot be grids; "" if they can."""
    size = abs(numbers.astype(np.float32))
    if not (size <= 2.0**126).all():  # NaN is not
        return f"{what} are not all finite, and at most 2^126 in magnitude"
    if ((size > 0) & (size < _TINY)).any():
        return f"{what} hold {size[size > 0].min():g}; wanted 0, or at least 2^-126 in magnitude"
    return ""
