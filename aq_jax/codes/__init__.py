"""Codes, which say how numbers become bytes: an open table by the format's `quant_type`.

The store, the core and the configs ask an entry, and have no list of their own. Nothing here imports NumPy or
JAX before one of their arrays is asked for.

    entry           the protocol of a code
    elementwise     codes of a fixed number of bits (`elementwise_numpy`: rows of a table; `elementwise_jax`: QTensors)
    affine          evenly spaced levels of any width from 2 to 8 bits
    trellis         levels that depend on their neighbours' codes (`trellis_numpy`, `trellis_jax`)
    levels          a table of levels: nf4, fp4, f8_e4m3
    nested          the same with scales that are quantized once more
    small_grids     the same with scales of halves, as other programs have them (`small_grids_numpy`: rows of a table)
    records         GGUF's codes of two-level scales (`records_jax`: QTensors)
    bits            the bit stream, in NumPy (`bits_jax`: in JAX; `runs`: its arithmetic)
    rotation        the Hadamard blocks of rotated weights, in NumPy (`rotation_jax`: in JAX)
"""

from __future__ import annotations

from aq_jax.codes.affine import Affine
from aq_jax.codes.elementwise import Elementwise
from aq_jax.codes.entry import Code, Grid, check_uniform
from aq_jax.codes.levels import LEVELS, Levels
from aq_jax.codes.nested import NESTED, Nested
from aq_jax.codes.records import records
from aq_jax.codes.small_grids import plain_grids
from aq_jax.codes.trellis import Trellis

WIDTHS = (8, 6, 5, 4, 3, 2)

CODES: dict[str, Code] = {
    code.name: code
    for code in (
        *(Affine(bits, rotated) for rotated in (False, True) for bits in WIDTHS),
        *(Trellis(bits) for bits in (5, 4, 3, 2)),
        Trellis(3, step_rows=2),
        *(code for bits in WIDTHS for code in plain_grids(bits)),
        *LEVELS,
        *NESTED,
        *records(),
    )
}

__all__ = ["CODES", "Affine", "Code", "Elementwise", "Grid", "Levels", "Nested", "Trellis", "check_uniform"]
