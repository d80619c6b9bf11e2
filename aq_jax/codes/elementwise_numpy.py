"""Decode elementwise codes in NumPy: from a row of the table to values."""

from __future__ import annotations

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
    whole = out.size // group
    with np.errstate(over="ignore", under="ignore"):
        for own, at in ((slice(whole), slice(whole * group)), (slice(whole, None), slice(whole * group, None))):
            if count := scales[own].size:
                parts = codes[at].reshape(count, -1), out[at].reshape(count, -1)
                _fill(code, parts[0], scales[own], None if zeros is None else zeros[own], parts[1])
        if tiny:
            out[abs(out) < _TINY] *= 0


def _fill(code: Elementwise, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, out: np.ndarray) -> None:
    """Decode groups a block at a time: each stays in the cache for all its steps."""
    groups, length = codes.shape
    rows, columns = max(_BLOCK // length, 1), min(length, _BLOCK)
    for top in range(0, groups, rows):
        own = slice(top, top + rows)
        for left in range(0, length, columns):
            block = np.s_[own, left : left + columns]
            code.fill(codes[block], scales[own], None if zeros is None else zeros[own], out[block])
