"""Records of two-level scales in JAX."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float16, Int, UInt8

from aq_jax.codes.elementwise_jax import unpacked
from aq_jax.codes.records import Records


def halves(octets: UInt8[Array, "*lead 2"]) -> Float16[Array, "*lead 1"]:
    """View pairs of bytes as float16.

    >>> halves(jnp.array([[0x00, 0x3C]], jnp.uint8)).tolist()
    [[1.0]]
    """
    low, high = octets[..., :1].astype(jnp.uint16), octets[..., 1:].astype(jnp.uint16)
    return lax.bitcast_convert_type(low | high << 8, jnp.float16)


def take(
    code: Records, table: Any, ids: Int[Array, "*batch"], inside: Bool[Array, "*batch"]
) -> Float[Array, "*batch width"]:
    """See `Code.take`."""
    codes, scale = (jnp.take(leaf, ids, axis=0, mode="clip") for leaf in (table.codes, table.scale))
    minimum = None if table.zero_point is None else jnp.take(table.zero_point, ids, axis=0, mode="clip")
    grouped = unpacked(code, codes).reshape(*ids.shape, -1, code.group)
    found = code.decode(grouped, scale, minimum).reshape(*ids.shape, table.length)
    return jnp.where(inside[..., None], found, jnp.nan)
