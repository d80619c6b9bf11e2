"""Dequantize: from codes to values."""

from __future__ import annotations

import functools
from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from aq_jax.codes.rotation_jax import unrotate
from aq_jax.core.prepared import Prepared, to_qtensor, unrotated
from aq_jax.core.qtensor import QTensor
from aq_jax.ops.kernels import choices, choose_kernel
from aq_jax.ops.xla import saturated


def dequantize(
    q: QTensor | Prepared, dtype: DTypeLike = jnp.float32, *, kernel: str | None = None
) -> Float[Array, "*shape"]:
    """Decode a QTensor: (q - zero_point) * scale for evenly spaced levels, in float32; a rotation is undone.

    Args:
        q: The quantized tensor, or the result of `prepare`.
        dtype: The dtype that the values are rounded to at the end; beyond its largest number, they become that.
        kernel: The name of a kernel in `ops.KERNELS["dequantize"]`; by default the first that takes the tensor.

    Raises:
        ValueError: for a batch of tensors, made by `vmap`, whose groups cross rows: each tensor has its own grids, so
            use `jax.vmap(dequantize)`.
        ConfigError: for an unknown kernel, and for one that does not take this tensor.

    >>> import jax.numpy as jnp
    >>> from aq_jax import dequantize, quantize
    >>> dequantize(quantize(jnp.array([[0.5, -1.0, 0.25, 1.0]]), "int8")).round(2).tolist()
    [[0.5, -1.0, 0.25, 1.0]]
    """
    return _dequantize(q, dtype, kernel, choices("dequantize"))


# Arguments are checked when it is traced, as in `qdot`.
@functools.partial(jax.jit, static_argnames=("dtype", "kernel", "chosen"))
def _dequantize(
    q: QTensor | Prepared, dtype: DTypeLike, kernel: str | None, chosen: Hashable
) -> Float[Array, "*shape"]:
    q = to_qtensor(q)
    _, entry = choose_kernel("dequantize", kernel, q)
    if not q.spec.rotation:
        return entry.run(q, dtype)
    return saturated(unrotate(entry.run(unrotated(q), jnp.float32), q.spec.rotation), dtype)
