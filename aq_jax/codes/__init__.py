"""Say how numbers become bytes: a table of codes by the format's `quant_type`.

An entry says how wide its codes are and whether the weights under them were rotated; the store, the core and the
configs ask it, and have no list of their own. Nothing here imports NumPy or JAX before bytes are touched.

    affine          evenly spaced levels of any width from 2 to 8 bits
    bits            the stream that they lie in, in NumPy (`bits_jax`: in JAX)
    rotation        the Hadamard blocks of rotated weights, in NumPy (`rotation_jax`: in JAX)
"""

from __future__ import annotations

from aq_jax.codes.affine import Affine

WIDTHS = (8, 6, 5, 4, 3, 2)

CODES: dict[str, Affine] = {
    code.name: code for rotated in (False, True) for code in (Affine(bits, rotated) for bits in WIDTHS)
}

__all__ = ["CODES", "Affine"]
