"""Statistics of one group that is too long to hold: it is read tile by tile for each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aq_jax.codes import Code, Grid
from aq_jax.codes.entry import Rounding
from aq_jax.core.grid import AnyArray
from aq_jax.quantizers.eligibility import to_float32
from aq_jax.quantizers.statistics import Groups, LevelSums

TILE = 1 << 18
"""The number of elements of a tile."""


class StreamedGroup:
    """A long group, of any floating dtype; see `statistics.GroupStatistics`."""

    def __init__(self, flat: np.ndarray) -> None:
        self.flat, self.factor = flat, np.float32(1)
        ends = [_finite_range(to_float32(flat[i : i + TILE])) for i in range(0, flat.size, TILE)]
        self.finite = all(e[2] for e in ends)
        self.lo = np.array([min(e[0] for e in ends)], np.float32)
        self.hi = np.array([max(e[1] for e in ends)], np.float32)

    def scaled(self, factor: np.ndarray) -> StreamedGroup:
        """Scale the group by a factor; the data stays where it is."""
        new = StreamedGroup.__new__(StreamedGroup)
        new.flat, new.factor, new.finite = self.flat, self.factor * np.float32(factor[0]), self.finite
        new.lo, new.hi = self.lo * factor, self.hi * factor
        return new

    def tiles(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Iterate over the group as (position, tile, padding)."""
        for at in range(0, self.flat.size, TILE):
            values = to_float32(self.flat[at : at + TILE])
            pads = np.array([TILE - values.size], np.float32)
            if pads[0]:
                values = np.pad(values, (0, TILE - values.size), mode="edge")
            yield at, values.reshape(1, TILE), pads

    def _ask(self, grid: Grid, code: Code) -> np.ndarray:
        answers = [_stream_sums(t, p, self.factor, grid[:4], code, grid.rounding) for _, t, p in self.tiles()]
        return np.asarray(sum(np.asarray(a, np.float64) for a in answers), np.float32)

    def sums(self, grid: Grid, code: Code) -> LevelSums:
        answer = self._ask(grid, code)
        return LevelSums(*answer[:4], count=np.array([self.flat.size], np.float32))

    def squared_error(self, grid: Grid, code: Code) -> np.ndarray:
        return self._ask(grid, code)[4]

    def best_grid(self, grid_at: Callable[[Any], tuple[Any, Grid]], starts: np.ndarray) -> Grid:
        return min((grid_at(start) for start in starts), key=lambda found: found[0][0])[1]


@partial(jax.jit, static_argnames=("code", "rounding"))
def _stream_sums(
    w: Float[AnyArray, "1 size"],
    pads: Float[AnyArray, "1"],
    factor: Float[AnyArray, ""],
    grid: tuple[Any, Any, Any, Any],
    code: Code,
    rounding: Rounding,
) -> Float[Array, "5 1"]:
    # They are NumPy arrays where nothing is compiled (jax_disable_jit).
    groups = Groups(jnp.asarray(w), jnp.asarray(pads)).scaled(jnp.asarray(factor)[None])
    whole = Grid(*(jnp.asarray(each) for each in grid), rounding=rounding)
    s = groups.sums(whole, code)
    return jnp.stack([s.u, s.uu, s.uw, s.w, groups.squared_error(whole, code)])


def _finite_range(values: np.ndarray) -> tuple[float, float, bool]:
    lo, hi = float(values.min()), float(values.max())
    if math.isfinite(lo) and math.isfinite(hi):
        return lo, hi, True
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max()), False) if finite.size else (0.0, 0.0, False)
