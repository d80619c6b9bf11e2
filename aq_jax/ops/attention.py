"""Attention, by the first kernel that takes it.

Models call it inside their programs; forcing another kernel makes another program (`kernels.choices`).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from aq_jax.ops.arguments import check_texts
from aq_jax.ops.cached import Cached
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

    Raises:
        TypeError: for a mask that is not of bools.
        ValueError: for one of another shape than the texts, and heads that do not divide the width.
    """
    check_texts("attention", query.shape, mask, heads)
    _, kernel = choose_kernel("attention", None, query, heads, dtype, scores, bias is not None)
    return kernel.run(query, key, value, mask, heads, dtype, scores, bias)


def cached_attention(
    query: Float[Array, "batch tokens heads size"],
    keys: Cached,
    values: Cached,
    positions: Int[Array, "tokens"],
    dtype: DTypeLike,
    scores: Scores = PLAIN,
    first: Int[Array, "batch"] | None = None,
) -> Float[Array, "batch tokens heads size"]:
    """Compute softmax(q k / sqrt(d)) v over the positions up to each token's own; several heads may share one key.

    Each text begins at the position `first`, and sees none before it; by default all begin at 0. What is computed for
    tokens before it means nothing.
    """
    _, kernel = choose_kernel("cached_attention", None, query, keys, dtype, scores)
    first = jnp.zeros(query.shape[0], jnp.int32) if first is None else first
    return kernel.run(query, keys, values, positions, dtype, scores, first)
