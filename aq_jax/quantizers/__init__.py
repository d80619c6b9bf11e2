"""Quantizers, which choose codes: an open table, one file an entry.

A quantizer that needs "weights" sees the groups of a tensor through `GroupStatistics` and proposes one or more
candidate grids; the whole tensor takes the candidate with the smallest squared error. One that needs "inputs" solves a
weight under the Hessian: the second moment of the inputs that the running model multiplies it by.

A config names an entry, or has the object itself. To add one, assign it: `QUANTIZERS["mine"] = Mine()`.
"""

from __future__ import annotations

from aq_jax.codes import Grid
from aq_jax.core.grid import fix_degenerate
from aq_jax.quantizers.absmax import AbsMax
from aq_jax.quantizers.entry import Calibrated, Entry, Quantizer
from aq_jax.quantizers.gptq import GPTQ
from aq_jax.quantizers.minmax import MinMax
from aq_jax.quantizers.mse import MSE
from aq_jax.quantizers.statistics import GroupStatistics

QUANTIZERS: dict[str, Entry] = {entry.name: entry for entry in (AbsMax(), MinMax(), MSE(), GPTQ())}

__all__ = ["QUANTIZERS", "Calibrated", "Entry", "Grid", "GroupStatistics", "Quantizer", "fix_degenerate"]
