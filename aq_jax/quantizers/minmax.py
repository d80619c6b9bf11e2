"""Asymmetric round-to-nearest between the smallest and the largest value."""

from __future__ import annotations

from dataclasses import dataclass

from aq_jax.codes import Code, Grid
from aq_jax.core.grid import minmax_grid
from aq_jax.native.host import Recipe
from aq_jax.quantizers.entry import Quantizer
from aq_jax.quantizers.statistics import GroupStatistics


@dataclass(frozen=True)
class MinMax(Quantizer):
    """scale = (max - min) / n, zero_point = qmin - min / scale, a float."""

    name = "minmax"
    grids = ("asymmetric",)

    def __call__(self, groups: GroupStatistics, code: Code, symmetric: bool) -> tuple[Grid, ...]:
        return (minmax_grid(groups.lo, groups.hi, code),)

    def recipes(self, code: Code, symmetric: bool) -> tuple[Recipe, ...]:
        return (Recipe("minmax"),)
