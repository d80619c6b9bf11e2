"""How codes are chosen: an open table of quantizers, one file an entry.

A quantizer that needs "weights" sees the groups of a tensor through `Measure` and gives one or more candidate grids for
them; where it gives more than one, the tensor as a whole takes the candidate of the smallest squared error. One that
needs "inputs" solves a weight under the second moment of what the running model multiplies it by.

A config names an entry, or has the object itself. To add one, assign it: `QUANTIZERS["mine"] = Mine()`.
"""

from __future__ import annotations

from aq_jax.codes import Grid
from aq_jax.core.grid import settle
from aq_jax.quantizers.absmax import AbsMax
from aq_jax.quantizers.entry import Calibrated, Entry, Quantizer
from aq_jax.quantizers.gptq import GPTQ
from aq_jax.quantizers.measure import Measure
from aq_jax.quantizers.minmax import MinMax
from aq_jax.quantizers.mse import MSE

QUANTIZERS: dict[str, Entry] = {entry.name: entry for entry in (AbsMax(), MinMax(), MSE(), GPTQ())}

__all__ = ["QUANTIZERS", "Calibrated", "Entry", "Grid", "Measure", "Quantizer", "settle"]
