"""Quantizers, which choose codes: an open table, one file an entry.

A quantizer that needs "weights" sees the groups of a tensor through `GroupStatistics` and proposes one or more
candidate grids; the whole tensor takes the candidate with the smallest squared error. Or it chooses the codes of whole
matrices, where a code's numbers are chosen together (`MatrixQuantizer`). One that needs "inputs" solves a weight under
the Hessian: the second moment of the inputs that the running model multiplies it by.

A config names an entry, or has the object itself. To add one, assign it: `QUANTIZERS["mine"] = Mine()`.
"""

from __future__ import annotations

from aq_jax.codes import Grid
from aq_jax.core.grid import fix_degenerate
from aq_jax.quantizers.absmax import AbsMax
from aq_jax.quantizers.entry import Calibrated, DataFree, Entry, MatrixQuantizer, Quantizer
from aq_jax.quantizers.gptq import GPTQ
from aq_jax.quantizers.minmax import MinMax
from aq_jax.quantizers.mse import MSE
from aq_jax.quantizers.statistics import GroupStatistics
from aq_jax.quantizers.viterbi import Viterbi

QUANTIZERS: dict[str, Entry] = {entry.name: entry for entry in (AbsMax(), MinMax(), MSE(), Viterbi(), GPTQ())}

__all__ = [
    "QUANTIZERS",
    "Calibrated",
    "DataFree",
    "Entry",
    "Grid",
    "GroupStatistics",
    "MatrixQuantizer",
    "Quantizer",
    "fix_degenerate",
]
