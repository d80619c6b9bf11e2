"""Quantize one tile: the compiled programs behind `tiles`.

A tile gives two arrays, codes and all numbers in one, because fetching an array costs 25 microseconds. A mask over
padding in the sums behind `cosine` doubled a tile's time; padding is copies of a row's last element, so its share is
counted and subtracted.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from aq_jax.codes import Code, Grid, bits_jax
from aq_jax.codes.entry import Rounding
from aq_jax.core.grid import SCALE_MAX, SCALE_MIN, AnyArray, round_mantissa
from aq_jax.ops.kernels import Kernel
from aq_jax.quantizers.statistics import Groups


@partial(jax.jit, static_argnames=("code", "symmetric", "quantizer", "kernel"))
def solve_tile(
    w: Float[AnyArray, "groups size"],
    pads: Float[AnyArray, "groups"],
    code: Code,
    symmetric: bool,
    quantizer: Any,
    kernel: Kernel,
) -> tuple[Shaped[Array, "candidates bytes"], Float[Array, "candidates numbers"]]:
    """Quantize a tile; all numbers come in one array, since fetching an array costs a tenth of the tile's time."""
    w = jnp.asarray(w)  # a NumPy array where nothing is compiled (jax_disable_jit)
    groups = Groups(w, jnp.asarray(pads))
    codes, numbers = [], []
    for grid in quantizer(groups, code, symmetric):
        q = jnp.round(kernel.run(w, grid, code))
        sound = (grid.sound & groups.finite).astype(jnp.float32)
        codes.append(_packed(q, code))
        numbers.append(jnp.concatenate([grid.scale, grid.zero_point, sound, _error_sums(groups, q, grid, code)]))
    return jnp.stack(codes), jnp.stack(numbers)


def split_numbers(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split the numbers of each candidate: (scale, zero_point, sound) of each group, and the sums of the tile."""
    rows = (numbers.shape[1] - 4) // 3
    return numbers[:, :-4].reshape(-1, 3, rows), numbers[:, -4:]


@partial(jax.jit, static_argnames=("code", "rounding", "kernel"))
def encode_tile(
    w: Float[AnyArray, "1 size"],
    pads: Float[AnyArray, "1"],
    grid: tuple[Any, Any, Any, Any],
    code: Code,
    rounding: Rounding,
    kernel: Kernel,
) -> tuple[Shaped[Array, "bytes"], Float[Array, "4"]]:
    """Encode a tile of one group on a grid that is known."""
    w, whole = jnp.asarray(w), Grid(*(jnp.asarray(each) for each in grid), rounding=rounding)
    q = jnp.round(kernel.run(w, whole, code))
    return _packed(q, code), _error_sums(Groups(w, jnp.asarray(pads)), q, whole, code)


def _packed(codes: Float[Array, "groups size"], code: Code) -> Array:
    """Pack a tile into a bit stream. Rows of odd lengths run on into each other, as they do in the tensor."""
    return bits_jax.pack(codes.reshape(-1), code.bits)


def _error_sums(groups: Groups, codes: Array, grid: Grid, code: Code) -> Float[Array, "4"]:
    """Compute w.w, w.d, d.d and a unit over a tile; d is the quantization error, and both are divided by the unit.

    The unit is a power of two. These three sums lose nothing where d is small beside w.
    """
    top = jnp.max(jnp.maximum(groups.hi, -groups.lo))
    unit = round_mantissa(jnp.clip(top, SCALE_MIN, SCALE_MAX), 0)
    w = groups.w / unit
    d = (groups.w - code.decode(codes, grid.scale, grid.zero_point)) / unit
    rows, size = w.shape
    if rows == 1:  # padding may outnumber elements: subtracting its share would leave nothing exact
        real = jnp.arange(size, dtype=jnp.float32)[None] < size - groups.pads[:, None]
        w, d = jnp.where(real, w, 0.0), jnp.where(real, d, 0.0)
        return jnp.stack([jnp.vdot(w, w), jnp.vdot(w, d), jnp.vdot(d, d), unit])

    def dot(a: Array, b: Array) -> Array:
        # Padding equals the last element of its row; a mask takes as long as everything else in a tile.
        return jnp.vdot(a, b) - jnp.vdot(groups.pads, a[:, -1] * b[:, -1])

    return jnp.stack([dot(w, w), dot(w, d), dot(d, d), unit])
