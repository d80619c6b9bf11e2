"""Eight-bit weights as the native kernels read them: panels of 16 outputs, of which a vector has four codes each."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int32, UInt8

from aq_jax.core.qtensor import QTensor

PANEL = 16


class Panels(NamedTuple):
    """A weight [outputs, inputs]; outputs are filled up to whole panels, the inputs of a group to whole steps of four.

    Args:
        codes: code + 128, which the processor's dot products want unsigned.
        scale, zero_point: The grids of the groups.
        sum: The sums of the groups' codes.
    """

    codes: UInt8[Array, "panels steps 16 4"]
    scale: Float[Array, "panels groups 16"]
    zero_point: Float[Array, "panels groups 16"]
    sum: Int32[Array, "panels groups 16"]


def to_panels(q: QTensor) -> Panels:
    """Turn a weight whose groups each lie in a row. NumPy does it where it can: nothing is compiled for each shape."""
    xp: Any = jnp if isinstance(q.codes, Tracer) else np
    outputs, inputs = q.shape
    groups = q.scale.shape[-1] if q.by_row else 1
    more = -outputs % PANEL
    codes = xp.asarray(q.codes).reshape(outputs, groups, inputs // groups)
    filled = xp.pad(codes, ((0, more), (0, 0), (0, -codes.shape[2] % 4))) ^ np.int8(-128)
    # Four codes as one number: they are turned faster.
    steps = filled.view(np.uint32).reshape((outputs + more) // PANEL, PANEL, -1).swapaxes(1, 2)

    def turn(grid: Any) -> Array:
        rows = xp.broadcast_to(xp.asarray(grid).reshape(-1, groups), (outputs, groups))
        return jnp.asarray(xp.pad(rows, ((0, more), (0, 0))).reshape(-1, PANEL, groups).swapaxes(1, 2))

    turned = xp.ascontiguousarray(steps) if xp is np else steps
    octets = jnp.asarray(turned.view(np.uint8)).reshape(*steps.shape, 4)
    return Panels(octets, turn(q.scale), turn(q.zero_point), turn(codes.sum(-1, dtype=np.int32)))


def from_panels(panels: Panels, like: QTensor) -> QTensor:
    """Turn panels back, bit for bit; `like` tells the shapes."""
    outputs, inputs = like.shape
    groups = panels.scale.shape[1]

    def turn(grid: Array, shape: tuple[int, ...]) -> Array:
        rows = grid.swapaxes(1, 2).reshape(-1, groups)[:outputs]
        return (rows if groups * outputs == np.prod(shape) else rows[:1]).reshape(shape)

    rows = panels.codes.swapaxes(1, 2).reshape(-1, groups, panels.codes.shape[1] // groups * 4)
    codes = (rows[:outputs, :, : inputs // groups] ^ np.uint8(128)).view(np.int8)
    return dataclasses.replace(
        like,
        codes=codes.reshape(outputs, inputs),
        scale=turn(panels.scale, like.scale.shape),
        zero_point=turn(panels.zero_point, like.zero_point.shape),
    )
