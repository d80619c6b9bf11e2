"""Between weights and QTensors, once the grid is known: codes for a grid, values for codes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from aq_jax.codes import bits_jax
from aq_jax.codes.rotation_jax import unrotate
from aq_jax.config import QuantSpec
from aq_jax.core.qtensor import QTensor, check_layout, from_groups


def assemble(
    codes: Float[Array, "*groups size"],
    scale: Float[Array, "*groups"],
    zero_point: Float[Array, "*groups"] | None,
    shape: tuple[int, ...],
    spec: QuantSpec,
) -> QTensor:
    """A QTensor from codes in groups (see `bits_jax.pack`): back to the tensor's shape, then packed.

    Args:
        codes: one an element.
        scale: of each group.
        zero_point: of each group; nothing is kept of it where the code has none.
        shape: of the tensor.
        spec: its numerics.
    """
    codes = from_groups(codes, shape)
    packed = spec.coding.codes_like(shape)[1] == "uint8"
    zeros = zero_point if spec.coding.zero_points else None
    return QTensor(bits_jax.pack(codes, spec.bits if packed else 8), scale, zeros, spec, shape[-1])


@jax.jit(static_argnames="dtype")
def dequantize(q: QTensor, dtype: DTypeLike = jnp.float32) -> Float[Array, "*shape"]:
    """The values that the codes stand for, such as (q - zero_point) * scale, in float32; a rotation is undone.

    Args:
        q: a quantized tensor.
        dtype: what the values are rounded to at the end.

    Raises:
        ValueError: for a batch of tensors, made by `vmap`, whose groups do not lie in rows: its grids are those of
            one tensor each, so it takes `jax.vmap(dequantize)`.

    >>> import jax.numpy as jnp
    >>> from aq_jax import dequantize, quantize
    >>> dequantize(quantize(jnp.array([[0.5, -1.0, 0.25, 1.0]]), "int8")).round(2).tolist()
    [[0.5, -1.0, 0.25, 1.0]]
    """
    if q.size:
        check_layout(q)
    values = q.spec.coding.values(q)
    return (unrotate(values, q.spec.rotation) if q.spec.rotation else values).astype(dtype)
