"""Back from codes to values."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from aq_jax.codes.rotation_jax import unrotate
from aq_jax.core.prepared import Prepared, to_qtensor, unrotated
from aq_jax.core.qtensor import QTensor
from aq_jax.ops.kernels import Kernel, choose


def dequantize(
    q: QTensor | Prepared, dtype: DTypeLike = jnp.float32, *, kernel: str | None = None
) -> Float[Array, "*shape"]:
    """The values that the codes stand for, such as (q - zero_point) * scale, in float32; a rotation is undone.

    Args:
        q: a quantized tensor; also as `prepare` makes it.
        dtype: what the values are rounded to at the end.
        kernel: who computes it, of `ops.KERNELS["dequantize"]`; by default the first that takes it.

    Raises:
        ValueError: for a batch of tensors, made by `vmap`, whose groups do not lie in rows: its grids are those of
            one tensor each, so it takes `jax.vmap(dequantize)`.
        ConfigError: for a kernel that is not there, or does not take this.

    >>> import jax.numpy as jnp
    >>> from aq_jax import dequantize, quantize
    >>> dequantize(quantize(jnp.array([[0.5, -1.0, 0.25, 1.0]]), "int8")).round(2).tolist()
    [[0.5, -1.0, 0.25, 1.0]]
    """
    q = to_qtensor(q)
    return _dequantize(q, dtype, choose("dequantize", kernel, q)[1])


@functools.partial(jax.jit, static_argnames=("dtype", "kernel"))
def _dequantize(q: QTensor, dtype: DTypeLike, kernel: Kernel) -> Float[Array, "*shape"]:
    if not q.spec.rotation:
        return kernel.run(q, dtype)
    return unrotate(kernel.run(unrotated(q), jnp.float32), q.spec.rotation).astype(dtype)
