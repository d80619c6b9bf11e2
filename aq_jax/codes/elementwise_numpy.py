"""Decode elementwise codes in NumPy: from a row of the table to values."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from aq_jax.codes.bits import unpack_codes
from aq_jax.codes.elementwise import Elementwise
from aq_jax.native import host

_BLOCK = 1 << 15
_TINY = np.float32(2.0**-126)
_SAFE = 2.0**-60


def read(
    code: Elementwise, data: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, group: int, out: np.ndarray
) -> None:
    """See `Code.read`. Results below 2^-126 become 0, as they do in XLA."""
    if code.uniform and host.dequantize(
        data, code.bits, scales, zero_points if code.zero_points else None, None, group, out
    ):
        return
    scales = scales.astype(np.float32, copy=False)
    codes = unpack_codes(data, code.bits, out.size)
    zeros = zero_points if code.zero_points else None
    tiny = bool((scales < _SAFE).any())
    if zeros is not None:
        tiny |= bool(((zeros != 0) & (abs(zeros) < _SAFE)).any())
        if tiny:  # XLA takes such inputs for zero as well
            zeros = np.where(abs(zeros) < _TINY, np.float32(0), zeros)
        zeros = zeros if zeros.any() else None
    with np.errstate(over="ignore", under="ignore"):
        for own, part, to in in_blocks(codes, group, out):
            code.fill(part, scales[own], None if zeros is None else zeros[own], to)
        if tiny:
            out[abs(out) < _TINY] *= 0


def in_blocks(codes: np.ndarray, group: int, out: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Cut groups, the last of which may be short, into blocks that stay in the cache for all their steps.

    Yields:
        The numbers of a block's groups; its codes, and the values that they become, both [groups, some of each].
    """
    whole = out.size // group
    for first, count, length in ((0, whole, group), (whole, 1, out.size - whole * group)):
        if not count or not length:
            continue
        at = slice(first * group, first * group + count * length)
        parts = codes[at].reshape(count, length), out[at].reshape(count, length)
        rows, columns = max(_BLOCK // length, 1), min(length, _BLOCK)
        for top in range(0, count, rows):
            for left in range(0, length, columns):
                block = np.s_[top : top + rows, left : left + columns]
                yield slice(first + top, first + min(top + rows, count)), parts[0][block], parts[1][block]
