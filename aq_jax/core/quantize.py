"""Between weights and QTensors, once the grid is known: codes for a grid, values for codes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from aq_jax.codes import bits_jax
from aq_jax.codes.rotation_jax import unrotate
from aq_jax.config import QuantSpec
from aq_jax.core.grid import decode
from aq_jax.core.qtensor import QTensor, check_layout, from_groups


def assemble(
    codes: Float[Array, "*groups size"],
    scale: Float[Array, "*groups"],
    zero_point: Float[Array, "*groups"],
    shape: tuple[int, ...],
    spec: QuantSpec,
) -> QTensor:
    """A QTensor from codes in groups (see `bits_jax.pack`): back to the tensor's shape, then packed."""
    codes = from_groups(codes, shape)
    whole = bits_jax.fills_bytes(shape[-1], spec.bits)
    return QTensor(bits_jax.pack(codes, spec.bits if whole else 8), scale, zero_point, spec, shape[-1])


@jax.jit(static_argnames="dtype")
def dequantize(q: QTensor, dtype: DTypeLike = jnp.float32) -> Float[Array, "*shape"]:
    """The values that the codes stand for: (q - zero_point) * scale, computed in float32; a rotation is undone.

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
    codes = bits_jax.unpack_float(q.codes, q.spec.bits) if q.packed else q.codes.astype(jnp.float32)
    values = _decode_tensor(codes, q)
    return (unrotate(values, q.spec.rotation) if q.spec.rotation else values).astype(dtype)


def _decode_tensor(codes: Float[Array, "*shape"], q: QTensor) -> Float[Array, "*shape"]:
    if codes.size == 0:
        return codes
    if q.by_row:
        groups = q.scale.shape[-1]
        grouped = codes.reshape(*codes.shape[:-1], groups, q.length // groups)
        return decode(grouped, q.scale, q.zero_point).reshape(codes.shape)
    check_layout(q)
    size = min(q.spec.group_elements(q.shape), codes.size)
    short = q.scale.size * size - codes.size
    flat = jnp.pad(codes.reshape(-1), (0, short)) if short else codes
    return from_groups(decode(flat.reshape(q.scale.size, size), q.scale, q.zero_point), codes.shape)
