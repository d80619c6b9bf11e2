"""How codes are chosen: a table of algorithms, one file each.

A solver sees the groups of a tensor through `Measure` and gives one or more candidate grids for them; where it gives
more than one, the tensor as a whole takes the candidate of the smallest squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from aq_jax.core.grid import Grid
from aq_jax.solvers.absmax import absmax
from aq_jax.solvers.measure import Measure
from aq_jax.solvers.minmax import minmax
from aq_jax.solvers.search import search

Solver = Callable[[Measure, int, bool], tuple[Grid, ...]]

SOLVERS: Mapping[str, Solver] = MappingProxyType({"absmax": absmax, "minmax": minmax, "search": search})

__all__ = ["SOLVERS", "Solver", "absmax", "minmax", "search"]
