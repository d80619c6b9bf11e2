"""Prepare Hessians: the second moments of a layer's inputs, damped, rotated and factored for GPTQ."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from aq_jax.codes.rotation_jax import rotate


class PreparedHessian(NamedTuple):
    """A Hessian that was damped, rotated and factored.

    Args:
        h: The damped Hessian, rotated as the weights will be.
        u: The upper triangular factor, h^-1 = u^T u, with columns and rows in the order of `order`.
        order: The columns, those of the largest inputs first.
    """

    h: Float[Array, "inputs inputs"]
    u: Float[Array, "inputs inputs"]
    order: Int[Array, "inputs"]


@partial(jax.jit, static_argnames="rotation")
def prepare_hessian(
    hessian: Float[Array, "inputs inputs"], damping: float = 0.01, rotation: int = 0
) -> PreparedHessian:
    """Damp, rotate and factor a Hessian.

    Columns whose input was always zero are rounded, and never compensate for others.

    Args:
        hessian: E[x^T x], or any multiple of it.
        damping: The share of the diagonal's mean that is added to the diagonal. It grows tenfold until the matrix is
            positive definite in float32; a matrix that is no second moment ends as a multiple of the identity.
        rotation: The Hadamard block of the weights (see `codes.rotation`); 0 for none.

    >>> prepare_hessian(jnp.diag(jnp.array([1.0, 3.0]))).order.tolist()
    [1, 0]
    """
    hessian = jnp.where(jnp.isfinite(hessian), hessian, 0.0)
    if rotation:
        hessian = rotate(rotate(hessian, rotation).T, rotation)
    diagonal = jnp.diagonal(hessian)
    unit = jnp.maximum(jnp.mean(jnp.maximum(diagonal, 0.0)), 1e-30)
    h = hessian / unit + jnp.diag((diagonal <= 0).astype(jnp.float32))
    order = jnp.argsort(-jnp.diagonal(h)).astype(jnp.int32)
    eye = jnp.eye(h.shape[0], dtype=jnp.float32)
    # The Cholesky factor of the reversed matrix, reversed, is the upper triangular r of h = r r^T; u is its inverse.
    backwards = h[order][:, order][::-1, ::-1]

    def factor(added: Array | float) -> Array:
        return jnp.linalg.cholesky(backwards + added * eye)

    def failed(state: tuple[Array, Array]) -> Bool[Array, ""]:
        return ~jnp.isfinite(state[1]).all() & (state[0] < 1e6)

    first = jnp.asarray(damping, jnp.float32)
    added, r = lax.while_loop(failed, lambda s: (10 * s[0], factor(10 * s[0])), (first, factor(first)))
    sound = jnp.isfinite(r).all()
    h, r = jnp.where(sound, h + added * eye, eye), jnp.where(sound, r, eye)
    u = jax.scipy.linalg.solve_triangular(r[::-1, ::-1], eye)
    return PreparedHessian(h, u, order)
