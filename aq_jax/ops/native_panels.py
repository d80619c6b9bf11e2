"""Eight-bit weights as the native kernels read them: panels of 16 outputs, of which a vector has four codes each."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, UInt8

from aq_jax.core.qtensor import QTensor

PANEL = 16


class Panels(NamedTuple):
    """A weight [outputs, inputs]; outputs are filled up to whole panels, the inputs of a group to whole steps of four.

    Args:
        codes: code + 128, which the processor's dot products want unsigned.
        grids: The scales of the groups, their zero points, and the sums of their codes.
    """

    codes: UInt8[Array, "panels steps 16 4"]
    grids: Float[Array, "panels groups 3 16"]


def to_panels(q: QTensor) -> Panels:
    """Turn a weight whose groups each lie in a row. NumPy does it where it can: nothing is compiled for each shape."""
    leaves = jax.tree.leaves(q)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return jax.eval_shape(to_panels, q)
    xp: Any = jnp if any(isinstance(leaf, Tracer) for leaf in leaves) else np
    outputs, inputs = q.shape
    groups = q.scale.shape[-1] if q.by_row else 1
    more = -outputs % PANEL
    codes = xp.asarray(q.codes).reshape(outputs, groups, inputs // groups)
    filled = xp.pad(codes, ((0, more), (0, 0), (0, -codes.shape[2] % 4))) ^ np.int8(-128)
    # Four codes as one number: they are turned faster.
    steps = filled.view(np.uint32).reshape((outputs + more) // PANEL, PANEL, -1).swapaxes(1, 2)
    turned = xp.ascontiguousarray(steps) if xp is np else steps
    octets = turned.view(np.uint8).reshape(*steps.shape, 4)
    scale, zero_point = (
        xp.broadcast_to(xp.asarray(grid).reshape(-1, groups), (outputs, groups)) for grid in (q.scale, q.zero_point)
    )
    sums = codes.sum(-1, dtype=np.int32).astype(np.float32)  # exact: they are less than 2^24
    grids = xp.pad(xp.stack([scale, zero_point, sums]), ((0, 0), (0, more), (0, 0)))
    panels = Panels(octets, grids.reshape(3, -1, PANEL, groups).transpose(1, 3, 0, 2))
    where = q.codes.sharding if xp is np and getattr(q.codes, "committed", False) else None
    return jax.tree.map(jnp.asarray, panels) if where is None else jax.device_put(panels, where)


def from_panels(panels: Panels, like: QTensor) -> QTensor:
    """Turn panels back, bit for bit; `like` tells the shapes."""
    outputs, inputs = like.shape
    groups = panels.grids.shape[1]
    rows = panels.codes.swapaxes(1, 2).reshape(-1, groups, panels.codes.shape[1] // groups * 4)
    codes = (rows[:outputs, :, : inputs // groups] ^ np.uint8(128)).view(np.int8)
    scale, zero_point, _ = panels.grids.transpose(2, 0, 3, 1).reshape(3, -1, groups)[:, :outputs]

    def shaped(grid: Array, shape: tuple[int, ...]) -> Array:
        return (grid if grid.size == np.prod(shape) else grid[:1]).reshape(shape)  # one for all, or one for each

    return dataclasses.replace(
        like,
        codes=codes.reshape(outputs, inputs),
        scale=shaped(scale, like.scale.shape),
        zero_point=shaped(zero_point, like.zero_point.shape),
    )
