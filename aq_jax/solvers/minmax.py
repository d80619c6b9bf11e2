"""Asymmetric round-to-nearest between the smallest and the largest value."""

from __future__ import annotations

from aq_jax.core.grid import Grid, minmax_grid
from aq_jax.solvers.measure import Measure


def minmax(groups: Measure, bits: int, symmetric: bool) -> tuple[Grid, ...]:
    """scale = (max - min) / n, zero_point = qmin - min / scale, a float. `symmetric` is always false here."""
    return (minmax_grid(groups.lo, groups.hi, bits),)
