"""Attention, by the first kernel that takes it.

Models call it inside their programs; forcing another kernel makes another program (`kernels.choices`).
"""

from __future__ import annotations

from jaxtyping import Array, Bool, DTypeLike, Float, Int

from aq_jax.ops.kernels import choose_kernel
from aq_jax.ops.scores import PLAIN, Scores


def attention(
    query: Float[Array, "batch tokens width"],
    key: Float[Array, "batch tokens width"],
    value: Float[Array, "batch tokens width"],
    mask: Bool[Array, "batch tokens"],
    heads: int,
    dtype: DTypeLike,
    scores: Scores = PLAIN,
    bias: Float[Array, "heads tokens tokens"] | None = None,
) -> Float[Array, "batch tokens width"]:
    """Compute softmax(q k / sqrt(d) + bias) v over whole texts, with products of `dtype` and sums of float32.

    Masked keys have no weight at all, so that a sentence does not depend on its padding.
    """
    _, kernel = choose_kernel("attention", None, query, heads, dtype, scores, bias is not None)
    return kernel.run(query, key, value, mask, heads, dtype, scores, bias)


def cached_attention(
    query: Float[Array, "batch tokens heads size"],
    keys: Float[Array, "batch positions kv_heads size"],
    values: Float[Array, "batch positions kv_heads size"],
    positions: Int[Array, "tokens"],
    dtype: DTypeLike,
    scores: Scores = PLAIN,
) -> Float[Array, "batch tokens heads size"]:
    """Compute softmax(q k / sqrt(d)) v over the positions up to each token's own; several heads may share one key."""
    _, kernel = choose_kernel("cached_attention", None, query, keys, dtype, scores)
    return kernel.run(query, keys, values, positions, dtype, scores)
