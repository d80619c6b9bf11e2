"""Decode elementwise codes in JAX: from the arrays of a QTensor to values."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8

from aq_jax.codes import bits_jax
from aq_jax.codes.elementwise import Elementwise


def unpacked(code: Elementwise, codes: Array) -> Float[Array, "*lead length"]:
    """Unpack codes to float32, from rows of bytes or from one code a byte."""
    return bits_jax.unpack_float(codes, code.bits) if codes.dtype == np.uint8 else codes.astype(jnp.float32)


def levels(code: Elementwise, q: Any) -> Int8[Array, "*shape"]:
    """See `Code.levels`."""
    return bits_jax.unpack(q.codes, code.bits) if q.packed else q.codes


def values(code: Elementwise, q: Any) -> Float[Array, "*shape"]:
    """See `Code.values`."""
    codes = unpacked(code, q.codes)
    if codes.size == 0:
        return codes
    if q.by_row:
        groups = q.row_groups
        grouped = codes.reshape(*codes.shape[:-1], groups, q.length // groups)
        return code.decode(grouped, q.scale, q.zero_point).reshape(codes.shape)
    size = min(q.spec.group_elements(q.shape), codes.size)
    short = q.scale.size * size - codes.size
    flat = jnp.pad(codes.reshape(-1), (0, short)) if short else codes
    found = code.decode(flat.reshape(q.scale.size, size), q.scale, q.zero_point)
    return (found.reshape(-1)[: codes.size] if short else found).reshape(codes.shape)


def take(
    code: Elementwise, table: Any, ids: Int[Array, "*batch"], inside: Bool[Array, "*batch"]
) -> Float[Array, "*batch width"]:
    """See `Code.take`."""
    codes = unpacked(code, jnp.take(table.codes, ids, axis=0, mode="clip"))
    if table.by_row:
        scale = jnp.take(table.scale, ids, axis=0, mode="fill", fill_value=jnp.nan)
        zeros = None if table.zero_point is None else jnp.take(table.zero_point, ids, axis=0, mode="clip")
        grouped = codes.reshape(*ids.shape, scale.shape[-1], -1)
        return code.decode(grouped, scale, zeros).reshape(*ids.shape, table.length)
    element = ids[..., None].astype(jnp.int32) * table.length + bits_jax.multiples(1, table.length, ids.ndim + 1)
    group = jnp.where(inside[..., None], element // table.spec.group_elements(table.shape), table.scale.size)
    scale = jnp.take(table.scale, group, mode="fill", fill_value=jnp.nan)
    zeros = None if table.zero_point is None else jnp.take(table.zero_point, group, mode="clip")
    return code.decode(codes[..., None], scale, zeros)[..., 0]
