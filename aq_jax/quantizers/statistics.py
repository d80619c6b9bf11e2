"""Statistics of groups for quantizers: the range of the weights, and sums over the codes of a grid.

A quantizer is written once, against this protocol. `Groups` implements it inside a compiled function, for many groups
at a time; `stream.StreamedGroup` for one group that is too long to hold, which it reads again for each statistic.
Otherwise a grid for a whole tensor, which may be larger than memory, would need each quantizer a second time.

`best_grid` scans over the starting points of `mse`. One array axis for all of them was tried: 16 starts ran five times
slower, because the intermediate arrays left the cache. Groups mask their padding; subtracting its share instead was no
faster, and nothing exact is left where padding outnumbers elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from aq_jax.codes import Code, Grid
from aq_jax.codes.affine import code_range
from aq_jax.core.grid import finite_range

_CHUNK = 1024


class LevelSums(NamedTuple):
    """Sums over one group: of levels u, of u^2, of u*w and of w; and the count of its elements.

    A level is the code without its offset: value = base + u * scale, where base is 0 for symmetric grids.
    """

    u: Any
    uu: Any
    uw: Any
    w: Any
    count: Any


class GroupStatistics(Protocol):
    """The range of each group, and the sums that least squares needs."""

    lo: Any
    hi: Any

    def scaled(self, factor: Any) -> GroupStatistics:
        """Scale each group by a factor; values that are not finite are replaced."""
        ...

    def sums(self, grid: Grid, code: Code) -> LevelSums:
        """Compute the sums for least squares, with codes of evenly spaced levels rounded to `grid`."""
        ...

    def squared_error(self, grid: Grid, code: Code) -> Any:
        """Sum the squared differences between the weights and their values on the grid."""
        ...

    def best_grid(self, grid_at: Callable[[Any], tuple[Any, Grid]], starts: np.ndarray) -> Grid:
        """Choose for each group the best of the grids that `grid_at(start)` returns with their errors."""
        ...


def level_offset(grid: Grid, bits: int) -> float:
    """Return the offset from a code to its level."""
    return {"mid_tread": 0.0, "mid_rise": 0.5, "affine": float(-code_range(bits)[0])}[grid.rounding]


def chunked_sum(x: Float[Array, "*groups size"]) -> Float[Array, "*groups"]:
    """Sum over the last axis, long rows in pieces: a float32 sum of millions of terms stops growing."""
    size = x.shape[-1]
    if size <= _CHUNK:
        return jnp.sum(x, axis=-1)
    pieces = -(-size // _CHUNK)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pieces * _CHUNK - size)])
    return chunked_sum(jnp.sum(x.reshape(*x.shape[:-1], pieces, _CHUNK), axis=-1))


class Groups:
    """Many groups in memory, one row each.

    Args:
        w: The weights; infinities count as the nearest finite element of their group, NaN as 0.
        pads: The number of padding elements at the end of each group, which are in no sum. They must lie within the
            group's range, as copies of its last element do.
    """

    def __init__(self, w: Float[Array, "*groups size"], pads: Float[Array, "*groups"]) -> None:
        self.lo, self.hi, self.finite = finite_range(w)
        self.w = w
        self.pads = pads

    def scaled(self, factor: Float[Array, "*groups"]) -> Groups:
        """Scale each group by a factor; values that are not finite are replaced."""
        new = object.__new__(Groups)
        clean = jnp.where(jnp.isnan(self.w), 0.0, jnp.clip(self.w, self.lo[..., None], self.hi[..., None]))
        new.w, new.pads, new.finite = clean * factor[..., None], self.pads, self.finite
        new.lo, new.hi = self.lo * factor, self.hi * factor
        return new

    def _sum(self, terms: Float[Array, "*groups size"]) -> Float[Array, "*groups"]:
        position = lax.broadcasted_iota(jnp.float32, (1,) * (terms.ndim - 1) + terms.shape[-1:], terms.ndim - 1)
        return chunked_sum(jnp.where(position < terms.shape[-1] - self.pads[..., None], terms, 0.0))

    def sums(self, grid: Grid, code: Code) -> LevelSums:
        u = code.encode(self.w, grid) + level_offset(grid, code.bits)
        count = self.w.shape[-1] - self.pads
        return LevelSums(self._sum(u), self._sum(u * u), self._sum(u * self.w), self._sum(self.w), count)

    def squared_error(self, grid: Grid, code: Code) -> Float[Array, "*groups"]:
        values = code.decode(code.encode(self.w, grid), grid.scale, grid.zero_point)
        return self._sum((values - self.w) ** 2)

    def best_grid(self, grid_at: Callable[[Any], tuple[Any, Grid]], starts: np.ndarray) -> Grid:
        # A scan, not one more axis: the arrays of a step stay in the cache, and the program is one step long.
        def step(best: tuple[Array, ...], start: Array) -> tuple[tuple[Array, ...], None]:
            error, grid = grid_at(start)
            rounding.append(grid.rounding)
            new = (error, grid.scale, grid.zero_point, grid.base, grid.sound)
            better = error < best[0]
            return tuple(jnp.where(better, n, b) for n, b in zip(new, best, strict=True)), None

        rounding: list[Any] = []
        zeros = jnp.zeros_like(self.lo)
        first = (jnp.full_like(self.lo, jnp.inf), zeros + 1, zeros, zeros, zeros > 0)
        (_, *fields), _ = lax.scan(step, first, jnp.asarray(starts, jnp.float32))
        scale, zero_point, base, sound = fields
        return Grid(scale, zero_point, base, sound, rounding[0])
