"""Attention, by the first kernel that takes it.

Models call it inside their programs, which are other ones where another kernel is forced (`kernels.choices`).
"""

from __future__ import annotations

from jaxtyping import Array, Bool, DTypeLike, Float, Int

from aq_jax.ops.kernels import choose


def attention(
    query: Float[Array, "batch tokens width"],
    key: Float[Array, "batch tokens width"],
    value: Float[Array, "batch tokens width"],
    mask: Bool[Array, "batch tokens"],
    heads: int,
    dtype: DTypeLike,
) -> Float[Array, "batch tokens width"]:
    """softmax(q k / sqrt(d)) v, heads and batch together as one axis, products of `dtype`, sums of float32.

    Keys that are masked have no weight at all, so that a sentence does not depend on how far it was padded.
    """
    _, kernel = choose("attention", None, query, heads, dtype)
    return kernel.run(query, key, value, mask, heads, dtype)


def cached_attention(
    query: Float[Array, "batch tokens heads size"],
    keys: Float[Array, "batch positions kv_heads size"],
    values: Float[Array, "batch positions kv_heads size"],
    positions: Int[Array, "tokens"],
    dtype: DTypeLike,
) -> Float[Array, "batch tokens heads size"]:
    """softmax(q k / sqrt(d)) v over the positions up to each token's own; several heads share one key."""
    _, kernel = choose("cached_attention", None, query, keys, dtype)
    return kernel.run(query, keys, values, positions, dtype)
