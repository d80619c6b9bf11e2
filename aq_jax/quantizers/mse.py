"""Find grids of small squared error by alternating least squares and rounding, from several starts, without data.

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
from aq_jax.core.grid import SCALE_MAX, SCALE_MIN, fix_degenerate, round_mantissa
from aq_jax.native.host import Recipe
from aq_jax.quantizers.entry import Quantizer
from aq_jax.quantizers.statistics import GroupStatistics, LevelSums

# One number, the scale, converges sooner than two.
ROUNDS: Mapping[Rounding, int] = MappingProxyType({"mid_tread": 4, "mid_rise": 4, "affine": 14})
STARTS = 8
# The narrower the code, the further inside the range the best grid may end.
SMALLEST_START = MappingProxyType({2: 0.25, 3: 0.35, 4: 0.6, 5: 0.7, 6: 0.8, 7: 0.85, 8: 0.9})
STORED_MANTISSA = 7


@dataclass(frozen=True)
class MSE(Quantizer):
    """The quantizer `mse`: one affine grid for each group or, symmetric, two candidates for the tensor.

    One of them has zero on a level, the other between two; the tensor takes the one with the smaller total error.
    """

    name = "mse"

    def __call__(self, groups: GroupStatistics, code: Code, symmetric: bool) -> tuple[Grid, ...]:
        return tuple(_best_grid(groups, code, rounding) for rounding in _roundings(symmetric))

    def recipes(self, code: Code, symmetric: bool) -> tuple[Recipe, ...]:
        starts = tuple(_starts(code.bits).tolist())
        return tuple(Recipe(rounding, starts, ROUNDS[rounding]) for rounding in _roundings(symmetric))


def _roundings(symmetric: bool) -> tuple[Rounding, ...]:
    return ("mid_tread", "mid_rise") if symmetric else ("affine",)


def _starts(bits: int) -> np.ndarray:
    return np.linspace(1.0, SMALLEST_START[bits], STARTS, dtype=np.float32)


def _best_grid(groups: GroupStatistics, code: Code, rounding: Rounding) -> Grid:
    xp = groups.lo.__array_namespace__()
    # Around one, no square over- or underflows; a power of two changes no bit of a mantissa.
    top = xp.maximum(groups.hi, -groups.lo)
    unit = round_mantissa(xp.clip(top, SCALE_MIN, SCALE_MAX), 0)
    scaled = groups.scaled(1 / unit)

    sums = scaled.sums(_grid(scaled.hi, scaled.lo, scaled.lo, rounding), code)
    mean = sums.w / sums.count

    def grid_at(start: Any) -> tuple[Any, Grid]:
        scale, base = _initial_grid(scaled.lo, scaled.hi, mean, start, code.bits, rounding)
        grid = _grid(scale, base, base, rounding)
        grid = _round_to_stored(_alternate(scaled, grid, code), code.bits)
        return scaled.squared_error(grid, code), grid

    found = scaled.best_grid(grid_at, _starts(code.bits))
    return fix_degenerate(found.scale * unit, found.zero_point, found.base * unit, groups.lo, groups.hi, code, rounding)


def _alternate(groups: GroupStatistics, grid: Grid, code: Code) -> Grid:
    """Alternate least squares and rounding."""
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


def _initial_grid(lo: Any, hi: Any, mean: Any, fraction: Any, bits: int, rounding: Rounding) -> tuple[Any, Any]:
    """Start from a grid over a fraction of the range; the narrower it is, the nearer its middle is to the mean."""
    xp = lo.__array_namespace__()
    qmin, qmax = code_range(bits)
    if rounding == "affine":
        scale = (hi - lo) * fraction / (qmax - qmin)
        middle = mean + fraction * ((lo + hi) / 2 - mean)
        return scale, middle - scale * ((qmax - qmin) / 2)
    top = xp.maximum(hi, -lo)
    return top * fraction / (qmax if rounding == "mid_tread" else qmax + 0.5), xp.zeros_like(lo)


def _grid(scale: Any, zero_point: Any, base: Any, rounding: Rounding) -> Grid:
    xp = scale.__array_namespace__()
    scale = xp.clip(scale, SCALE_MIN, SCALE_MAX)
    return Grid(scale, zero_point, base, scale > 0, rounding)


def _refine(s: LevelSums, grid: Grid) -> Grid:
    """Fit a line through (level, weight) by least squares; a group with one code throughout keeps its grid."""
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


def _round_to_stored(grid: Grid, bits: int) -> Grid:
    """Round scale and zero point to two-byte floats, as they are stored.

    After rounding, a zero point beyond 2^8 could not be told from its neighbours; a larger scale keeps it below, in
    groups far from zero.
    """
    xp = grid.scale.__array_namespace__()
    if grid.rounding != "affine":
        scale = round_mantissa(grid.scale, STORED_MANTISSA)
        zero = np.float32(0.0 if grid.rounding == "mid_tread" else -0.5)
        return _grid(scale, xp.zeros_like(scale) + zero, grid.base, grid.rounding)
    qmin, _ = code_range(bits)
    scale = round_mantissa(xp.maximum(grid.scale, xp.abs(grid.base) * np.float32(2.0**-8)), STORED_MANTISSA)
    scale = xp.clip(scale, SCALE_MIN, SCALE_MAX)
    zero_point = round_mantissa(qmin - grid.base / scale, STORED_MANTISSA)
    return _grid(scale, zero_point, (qmin - zero_point) * scale, "affine")
