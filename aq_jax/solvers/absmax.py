"""Symmetric round-to-nearest under the largest magnitude: the published recipe."""

from __future__ import annotations

from aq_jax.core.grid import Grid, absmax_grid
from aq_jax.solvers.measure import Measure


def absmax(groups: Measure, bits: int, symmetric: bool) -> tuple[Grid, ...]:
    """scale = max|x| / qmax, zero_point = 0, q = round(x / scale). `symmetric` is always true here."""
    return (absmax_grid(groups.lo, groups.hi, bits),)
