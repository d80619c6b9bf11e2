"""Assemble QTensors from codes on known grids, and decode them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from aq_jax.codes import bits_jax
from aq_jax.codes.rotation_jax import unrotate
from aq_jax.config import QuantSpec
from aq_jax.core.qtensor import QTensor, check_layout, from_groups


def assemble_qtensor(
    codes: Float[Array, "*groups size"],
    scale: Float[Array, "*groups"],
    zero_point: Float[Array, "*groups"] | None,
    shape: tuple[int, ...],
    spec: QuantSpec,
) -> QTensor:
    """Make a QTensor from codes in groups: restore the tensor's shape, then pack (see `bits_jax.pack`).

    Args:
        codes: One code an element.
        scale: The scale of each group.
        zero_point: The zero point of each group; dropped where the code has none.
        shape: The tensor's shape.
        spec: The tensor's numerics.
    """
    codes = from_groups(codes, shape)
    packed = spec.coding.codes_like(shape)[1] == "uint8"
    zeros = zero_point if spec.coding.zero_points else None
    return QTensor(bits_jax.pack(codes, spec.bits if packed else 8), scale, zeros, spec, shape[-1])


@jax.jit(static_argnames="dtype")
def dequantize(q: QTensor, dtype: DTypeLike = jnp.float32) -> Float[Array, "*shape"]:
    """Decode a QTensor: (q - zero_point) * scale for evenly spaced levels, in float32; a rotation is undone.

    Args:
        q: The quantized tensor.
        dtype: The dtype that the values are rounded to at the end.

    Raises:
        ValueError: for a batch of tensors, made by `vmap`, whose groups cross rows: each tensor has its own grids, so
            use `jax.vmap(dequantize)`.

    >>> import jax.numpy as jnp
    >>> from aq_jax import dequantize, quantize
    >>> dequantize(quantize(jnp.array([[0.5, -1.0, 0.25, 1.0]]), "int8")).round(2).tolist()
    [[0.5, -1.0, 0.25, 1.0]]
    """
    if q.size:
        check_layout(q)
    values = q.spec.coding.values(q)
    return (unrotate(values, q.spec.rotation) if q.spec.rotation else values).astype(dtype)
