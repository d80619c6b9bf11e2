"""What a model does with a quantized weight: multiply by it, and look rows up in it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Real

from aq_jax.core import packing
from aq_jax.core.grid import decode
from aq_jax.core.qtensor import QTensor, check_layout
from aq_jax.core.quantize import dequantize


@jax.jit
def qdot(x: Real[Array, "*batch inputs"], w: QTensor) -> Float[Array, "*batch outputs"]:
    """x @ W.T for a weight stored as [outputs, inputs], as PyTorch and this format store it.

    The weight is dequantized to float32, the products are summed in float32, and the result has x's dtype, or float32
    where x is not floating.

    Args:
        x: real numbers, the last axis as long as W's.
        w: [outputs, inputs].

    Raises:
        ValueError: if W has other than two axes, or x another length.

    >>> import jax.numpy as jnp
    >>> from aq_jax import qdot, quantize
    >>> w = quantize(jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), "int8")
    >>> qdot(jnp.array([3.0, 4.0]), w).round(2).tolist()
    [3.0, 4.0, 7.0]
    """
    if w.ndim != 2 or x.shape[-1:] != w.shape[1:]:
        raise ValueError(f"qdot: x of shape {list(x.shape)} and W of shape {list(w.shape)}: wanted [..., n] and [m, n]")
    y = jnp.einsum("...i,oi->...o", x.astype(jnp.float32), dequantize(w), preferred_element_type=jnp.float32)
    return y.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else y


@jax.jit
def qembed(table: QTensor, ids: Integer[Array, "*batch"]) -> Float[Array, "*batch width"]:
    """Rows of an embedding table: gathered as codes, dequantized after.

    Args:
        table: [rows, width].
        ids: row numbers; negative ones count from the end. An id outside the table gives a row of NaN, since
            nothing can be raised in compiled code.

    Raises:
        ValueError: if the table has other than two axes, or groups that cross rows and over 2^31 elements.

    >>> import jax.numpy as jnp
    >>> from aq_jax import qembed, quantize
    >>> qembed(quantize(jnp.eye(3), "int8"), jnp.array([2, 0])).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    if table.ndim != 2:
        raise ValueError(f"qembed: table of shape {list(table.shape)}: wanted [rows, width]")
    check_layout(table)
    rows = table.shape[0]
    if ids.dtype.itemsize < 4:  # may not be able to count the rows
        ids = ids.astype(jnp.int32)
    elif jnp.issubdtype(ids.dtype, jnp.unsignedinteger):
        ids = jnp.minimum(ids, rows).astype(jnp.int32)
    inside = (ids >= -rows) & (ids < rows)
    wrapped = jnp.where(inside, jnp.where(ids < 0, ids + rows, ids), rows)
    codes = jnp.take(table.codes, wrapped, axis=0, mode="clip")
    values = packing.unpack_float(codes, table.spec.bits) if table.packed else codes.astype(jnp.float32)
    if table.by_row:
        scale = jnp.take(table.scale, wrapped, axis=0, mode="fill", fill_value=jnp.nan)
        zero_point = jnp.take(table.zero_point, wrapped, axis=0, mode="clip")
        grouped = values.reshape(*ids.shape, scale.shape[-1], -1)
        return decode(grouped, scale, zero_point).reshape(*ids.shape, table.length)
    if table.size >= 2**31:
        raise ValueError(
            f"qembed: a table of {table.size} elements whose groups cross rows cannot be indexed in 32 bits; "
            "choose a group_size that divides the width"
        )
    group = (wrapped[..., None] * table.length + jnp.arange(table.length)) // table.spec.group_elements(table.shape)
    group = jnp.where(inside[..., None], group, table.scale.size)
    scale = jnp.take(table.scale, group, mode="fill", fill_value=jnp.nan)
    return (values - jnp.take(table.zero_point, group, mode="clip")) * scale
