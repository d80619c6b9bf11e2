"""XLA's kernels of attention."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from aq_jax.ops.cached import Cached
from aq_jax.ops.scores import PLAIN, Scores

MIN_COLUMNS = 32  # keys in a product


@dataclass(frozen=True)
class Attention:
    """softmax(q k / sqrt(d) + bias) v, heads and batch together as one axis, products of `dtype`, sums of float32."""

    def refuses(
        self, query: Float[Array, "batch tokens width"], heads: int, dtype: DTypeLike, scores: Scores = PLAIN,
        biased: bool = False,
    ) -> str:  # fmt: skip
        return ""

    def run(
        self,
        query: Float[Array, "batch tokens width"],
        key: Float[Array, "batch tokens width"],
        value: Float[Array, "batch tokens width"],
        mask: Bool[Array, "batch tokens"],
        heads: int,
        dtype: DTypeLike,
        scores: Scores = PLAIN,
        bias: Float[Array, "heads tokens tokens"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        batch, tokens, width = query.shape
        size = width // heads

        def split(x: Array) -> Array:
            return x.reshape(batch, tokens, heads, size).transpose(0, 2, 1, 3).reshape(batch * heads, tokens, size)

        value = jnp.where(mask[..., None], value, 0)  # no weight hides NaN
        q, k, v = split(query * scores.factor(size)).astype(dtype), split(key).astype(dtype), split(value).astype(dtype)
        # Keys as columns, and 32 of them or more: otherwise XLA sums in another order for other numbers of tokens
        # where vectors are 512 bits wide.
        columns = jnp.pad(k.swapaxes(1, 2), ((0, 0), (0, 0), (0, max(0, MIN_COLUMNS - tokens))))
        columns = jax.lax.optimization_barrier(columns)
        products = jnp.einsum("bqd,bdk->bqk", q, columns, preferred_element_type=jnp.float32)[..., :tokens]
        scored = scores.bound(products.reshape(batch, heads, tokens, tokens))
        scored = scored if bias is None else scored + bias[None]
        seen = mask[:, None, None, :]
        if scores.reach is not None:
            at = jnp.arange(tokens, dtype=jnp.int32)
            seen = seen & scores.near(at, at)[None, None]
        scored = jnp.where(seen, scored, -jnp.inf)
        # A sentence of padding only, which fills up a batch, has no largest score.
        weights = exp(scored - jnp.maximum(scored.max(-1, keepdims=True, initial=-jnp.inf), jnp.finfo(jnp.float32).min))
        weights = weights.reshape(batch * heads, tokens, tokens).astype(dtype)
        # Their sums come out of the product as well: as a reduction they would be rounded otherwise in other shapes,
        # and so would a product that is one column wider (see `exp`).
        v = jnp.concatenate([v, jnp.ones_like(v)], axis=-1)
        mixed = jnp.einsum("bqk,bkd->bqd", weights, v, preferred_element_type=jnp.float32)
        mixed = mixed[..., :size] / jnp.maximum(mixed[..., size : size + 1], jnp.finfo(jnp.float32).tiny)
        return mixed.reshape(batch, heads, tokens, size).transpose(0, 2, 1, 3).reshape(batch, tokens, width)


@dataclass(frozen=True)
class CachedAttention:
    """softmax(q k / sqrt(d)) v; a token sees positions up to its own. Keys and values are decoded whole."""

    def refuses(
        self, query: Float[Array, "batch tokens heads size"], keys: Cached, dtype: DTypeLike, scores: Scores = PLAIN
    ) -> str:
        return ""

    def run(
        self,
        query: Float[Array, "batch tokens heads size"],
        keys: Cached,
        values: Cached,
        positions: Int[Array, "tokens"],
        dtype: DTypeLike,
        scores: Scores,
        first: Int[Array, "batch"],
    ) -> Float[Array, "batch tokens heads size"]:
        batch, tokens, heads, size = query.shape
        k, v = keys.values().astype(dtype), values.values().astype(dtype)
        shared = (query * scores.factor(size)).reshape(batch, tokens, k.shape[2], -1, size).astype(dtype)
        products = jnp.einsum("bqgrd,bkgd->bgrqk", shared, k, preferred_element_type=jnp.float32)
        at = jnp.arange(k.shape[1], dtype=jnp.int32)
        seen = at[None] <= positions[:, None]
        if scores.reach is not None:
            seen = seen & scores.near(positions, at)
        seen = seen[None] & (at[None] >= first[:, None])[:, None]
        # Not infinity: a token before its text sees nothing, and must not become NaN, which no weight would hide.
        scored = jnp.where(seen[:, None, None], scores.bound(products), jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scored, axis=-1).astype(dtype)
        mixed = jnp.einsum("bgrqk,bkgd->bqgrd", weights, v, preferred_element_type=jnp.float32)
        return mixed.reshape(batch, tokens, heads, size)


def exp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Compute e^x for x <= 0, to 2 units in the last place: the same bits in programs of every shape.

    XLA's own differs in the last bit between loops that it vectorizes and loops that it does not; one such bit turns an
    8-bit code, that code others, and a short sentence alone would not be what it is in a batch. Here
    e^x = 2^n e^r, n being the integer nearest to x / ln 2 and e^r a polynomial (Cephes, expf).
    """
    n = jnp.round(jnp.maximum(x, -87.0) * np.float32(1.44269504))
    r = jnp.maximum(x, -87.0) - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    e = jnp.full_like(r, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        e = e * r + np.float32(c)
    power = jax.lax.bitcast_convert_type((n.astype(jnp.int32) + 127) << 23, jnp.float32)
    return jnp.where(x < -87.0, 0.0, e * power)
