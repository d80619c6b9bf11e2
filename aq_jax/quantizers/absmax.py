"""Symmetric round-to-nearest under the largest magnitude: the published recipe."""

from __future__ import annotations

from dataclasses import dataclass

from aq_jax.codes import Code, Grid
from aq_jax.core.grid import absmax_grid
from aq_jax.native.host import Recipe
from aq_jax.quantizers.entry import Quantizer
from aq_jax.quantizers.statistics import GroupStatistics


@dataclass(frozen=True)
class AbsMax(Quantizer):
    """scale = max|x| / qmax, zero_point = 0, q = round(x / scale): to the nearest level of any code."""

    name = "absmax"
    grids = ("symmetric",)

    def supports(self, code: Code) -> bool:
        return code.max_level > 0

    def __call__(self, groups: GroupStatistics, code: Code, symmetric: bool) -> tuple[Grid, ...]:
        return (absmax_grid(groups.lo, groups.hi, code),)

    def recipes(self, code: Code, symmetric: bool) -> tuple[Recipe, ...]:
        return (Recipe("absmax"),)
