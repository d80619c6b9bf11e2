"""The grid with the least squared error that alternation finds, from several starts; no data is needed.

Given codes, the best scale and zero point are those of a straight line through (level, weight): least squares.
Given the line, the best codes are the nearest ones. Alternating the two never raises the error (Lloyd's algorithm
restricted to evenly spaced levels: S. P. Lloyd, "Least squares quantization in PCM", 1982), but it stops at the
nearest valley, so it starts from several fractions of the full range and keeps the best end.

Every candidate is judged after its scale and zero point have been rounded to two-byte floats, as they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax import lax

from aq_jax.codes import Code, Grid
from aq_jax.codes.affine import code_range
from aq_jax.codes.entry import Rounding
from aq_jax.core.grid import SCALE_MAX, SCALE_MIN, round_mantissa, settle
from aq_jax.quantizers.entry import Quantizer
from aq_jax.quantizers.measure import Measure, Sums

# One number, the scale, settles sooner than two.
ROUNDS: Mapping[Rounding, int] = MappingProxyType({"tread": 4, "rise": 4, "affine": 14})
STARTS = 8
# The narrower the code, the further inside the range the best grid may end.
SMALLEST_START = MappingProxyType({2: 0.25, 3: 0.35, 4: 0.6, 5: 0.7, 6: 0.8, 7: 0.85, 8: 0.9})
STORED_MANTISSA = 7


@dataclass(frozen=True)
class MSE(Quantizer):
    """Candidates: one affine grid for each group or, symmetric, one with zero on a level and one with zero between
    two; which of them a tensor takes is decided by its total error.
    """

    name = "mse"

    def __call__(self, groups: Measure, code: Code, symmetric: bool) -> tuple[Grid, ...]:
        roundings: tuple[Rounding, ...] = ("tread", "rise") if symmetric else ("affine",)
        return tuple(_best_grid(groups, code, rounding) for rounding in roundings)


def _best_grid(groups: Measure, code: Code, rounding: Rounding) -> Grid:
    xp = groups.lo.__array_namespace__()
    # Around one, no square over- or underflows; a power of two changes no bit of a mantissa.
    top = xp.maximum(groups.hi, -groups.lo)
    unit = round_mantissa(xp.clip(top, SCALE_MIN, SCALE_MAX), 0)
    scaled = groups.scaled(1 / unit)

    sums = scaled.sums(_grid(scaled.hi, scaled.lo, scaled.lo, rounding), code)
    mean = sums.w / sums.count

    def grid_at(start: Any) -> tuple[Any, Grid]:
        scale, base = _start(scaled.lo, scaled.hi, mean, start, code.bits, rounding)
        grid = _grid(scale, base, base, rounding)
        grid = _stored(_rounds(scaled, grid, code), code.bits)
        return scaled.error(grid, code), grid

    found = scaled.best(grid_at, np.linspace(1.0, SMALLEST_START[code.bits], STARTS, dtype=np.float32))
    return settle(found.scale * unit, found.zero_point, found.base * unit, groups.lo, groups.hi, code, rounding)


def _rounds(groups: Measure, grid: Grid, code: Code) -> Grid:
    """Least squares and rounding in turn."""
    times, rounding = ROUNDS[grid.rounding], grid.rounding
    if not isinstance(grid.scale, jax.Array):
        for _ in range(times):
            grid = _refine(groups.sums(grid, code), grid)
        return grid

    def once(_: int, arrays: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
        now = Grid(*arrays, rounding)
        return _refine(groups.sums(now, code), now)[:4]

    # A loop: unrolled, the rounds take longer to compile, and no less time to run.
    scale, zero_point, base, sound = lax.fori_loop(0, times, once, grid[:4])
    return Grid(scale, zero_point, base, sound, rounding)


def _start(lo: Any, hi: Any, mean: Any, fraction: Any, bits: int, rounding: Rounding) -> tuple[Any, Any]:
    """A grid over a fraction of the range; the narrower, the nearer its middle is to the mean."""
    xp = lo.__array_namespace__()
    qmin, qmax = code_range(bits)
    if rounding == "affine":
        scale = (hi - lo) * fraction / (qmax - qmin)
        middle = mean + fraction * ((lo + hi) / 2 - mean)
        return scale, middle - scale * ((qmax - qmin) / 2)
    top = xp.maximum(hi, -lo)
    return top * fraction / (qmax if rounding == "tread" else qmax + 0.5), xp.zeros_like(lo)


def _grid(scale: Any, zero_point: Any, base: Any, rounding: Rounding) -> Grid:
    xp = scale.__array_namespace__()
    scale = xp.clip(scale, SCALE_MIN, SCALE_MAX)
    return Grid(scale, zero_point, base, scale > 0, rounding)


def _refine(s: Sums, grid: Grid) -> Grid:
    """The least-squares line through (level, weight); where all codes are one, the grid stays."""
    xp = s.u.__array_namespace__()
    if grid.rounding != "affine":
        fits = s.uu > 0
        return _grid(
            xp.where(fits, s.uw / xp.where(fits, s.uu, 1), grid.scale), grid.zero_point, grid.base, grid.rounding
        )
    spread = s.uu - s.u * s.u / s.count
    scale = (s.uw - s.u * s.w / s.count) / xp.where(spread > 0, spread, 1)
    fits = (spread > 0) & (scale > 0)
    base = (s.w - scale * s.u) / s.count
    return _grid(xp.where(fits, scale, grid.scale), grid.zero_point, xp.where(fits, base, grid.base), grid.rounding)


def _stored(grid: Grid, bits: int) -> Grid:
    """The grid as it is stored: scale and zero point rounded to two-byte floats.

    A zero point beyond 2^8 could not be told from its neighbours after rounding; a scale that is large enough
    keeps it below (only groups far from zero are concerned).
    """
    xp = grid.scale.__array_namespace__()
    if grid.rounding != "affine":
        scale = round_mantissa(grid.scale, STORED_MANTISSA)
        zero = np.float32(0.0 if grid.rounding == "tread" else -0.5)
        return _grid(scale, xp.zeros_like(scale) + zero, grid.base, grid.rounding)
    qmin, _ = code_range(bits)
    scale = round_mantissa(xp.maximum(grid.scale, xp.abs(grid.base) * np.float32(2.0**-8)), STORED_MANTISSA)
    scale = xp.clip(scale, SCALE_MIN, SCALE_MAX)
    zero_point = round_mantissa(qmin - grid.base / scale, STORED_MANTISSA)
    return _grid(scale, zero_point, (qmin - zero_point) * scale, "affine")
