"""The rotation of `...h` rows in JAX: matrix products with the blocks of `codes.rotation`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aq_jax.codes.rotation import rotation_matrix


def rotate(values: Float[Array, "*lead length"], block: int) -> Float[Array, "*lead length"]:
    """Compute values R, block by block along the last axis, in float32.

    >>> import jax
    >>> x = jax.random.normal(jax.random.key(0), (3, 96))
    >>> bool(jnp.allclose(unrotate(rotate(x, 32), 32), x, atol=1e-5))
    True
    """
    return _blocks_times(values, rotation_matrix(block))


def unrotate(values: Float[Array, "*lead length"], block: int) -> Float[Array, "*lead length"]:
    """Compute values R^T, which undoes `rotate`."""
    return _blocks_times(values, rotation_matrix(block).T)


def _blocks_times(values: Float[Array, "*lead length"], matrix: np.ndarray) -> Float[Array, "*lead length"]:
    blocks = values.reshape(*values.shape[:-1], values.shape[-1] // len(matrix), len(matrix))
    # Accelerators would round float32 products to fewer bits.
    return jnp.matmul(blocks, matrix, precision="highest").reshape(values.shape)
