"""The kernels of `aq_jax.native`: products with packed weights, rows of tables, attention over whole texts.

A product of 8-bit inputs rounds its rows to the codes that XLA's kernel has, and sums their products exactly, as it
does; the floats made of these sums differ by a few units in the last place. Inputs of rotated weights are rotated by
sums in another order, so that a code may be the next one, where XLA's value lies between two. A product of float inputs
has another order of sums. A row's result depends on no other row, and not on the number of threads. Derivatives are
those of XLA's formulations.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from aq_jax import native
from aq_jax.codes import Trellis
from aq_jax.core.dispatch import TOKENS, Activations, backend
from aq_jax.core.prepared import Prepared
from aq_jax.core.qtensor import QTensor
from aq_jax.cores import cores
from aq_jax.ops import native_calls, xla, xla_attention
from aq_jax.ops.cached import Cached
from aq_jax.ops.epilogue import Epilogue
from aq_jax.ops.native_panels import WIDTHS, Panels, from_panels, to_panels
from aq_jax.ops.scores import PLAIN, Scores


@dataclass(frozen=True)
class _Weights:
    """Kernels of weights that are prepared (see `native_panels`): one form for products and rows."""

    def prepare(self, q: QTensor) -> Panels:
        return to_panels(q)

    def restore(self, arrays: Panels, like: QTensor) -> QTensor:
        return from_panels(arrays, like)

    def _refuses(self, w: QTensor) -> str:
        code = w.spec.coding
        if not isinstance(code, Trellis) and (w.spec.bits not in WIDTHS or not code.integral):
            widths = ", ".join(map(str, WIDTHS))
            return f"has trellis codes, and evenly spaced weights of {widths} bits, only; found {w.spec.quant_type}"
        if w.ndim != 2 or not w.size or not (w.by_row or w.scale.size == 1):
            return "wants a matrix of groups that each lie in one row"
        return missing()


@dataclass(frozen=True)
class Product(_Weights):
    """x @ W.T of float32 and of 8-bit inputs."""

    rotates: ClassVar = True

    @property
    def tokens(self) -> int:
        """The rows that a model is given at once: for each core as many as its caches keep from layer to layer."""
        return min(128 * cores(), TOKENS["cpu"])

    def refuses(self, w: QTensor, activations: Activations) -> str:
        if activations not in ("float32", "int8"):
            return f"multiplies float32 and 8-bit inputs only, found {activations}"
        return self._refuses(w)

    def run(
        self, x: Float[Array, "rows inputs"], w: Prepared, activations: Activations, after: Epilogue
    ) -> Float[Array, "rows outputs"]:
        return native_calls.product(x, w.arrays, activations, after, w.like)


@dataclass(frozen=True)
class Rows(_Weights):
    """Rows of a table, bit for bit those of XLA's kernel."""

    def refuses(self, table: QTensor) -> str:
        return self._refuses(table)

    def run(
        self, table: Prepared, ids: Int[Array, "*batch"], inside: Bool[Array, "*batch"]
    ) -> Float[Array, "*batch width"]:
        """Look up rows; an id that is not inside is the number of rows."""
        found = _look_up(table, ids.reshape(-1).astype(jnp.int32))
        return found.reshape(*ids.shape, table.like.length)


@jax.custom_jvp
def _look_up(table: Prepared, ids: Int[Array, "count"]) -> Float[Array, "count width"]:
    return native_calls.rows(table.arrays, ids, table.like)


@_look_up.defjvp
def _look_up_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    table, ids = primals

    def exact(table: Prepared) -> Array:
        return xla.Rows().run(table.to_qtensor(), ids, ids < table.like.shape[0])

    _, tangent = jax.jvp(exact, (table,), tangents[:1])
    return _look_up(table, ids), tangent


@dataclass(frozen=True)
class Attention:
    """softmax(q k / sqrt(d)) v in float32."""

    def refuses(
        self, query: Float[Array, "batch tokens width"], heads: int, dtype: DTypeLike, scores: Scores = PLAIN,
        biased: bool = False,
    ) -> str:  # fmt: skip
        return "adds no bias to scores" if biased else _refuses_dtype(dtype) or missing()

    def run(
        self,
        query: Float[Array, "batch tokens width"],
        key: Float[Array, "batch tokens width"],
        value: Float[Array, "batch tokens width"],
        mask: Bool[Array, "batch tokens"],
        heads: int,
        dtype: DTypeLike,
        scores: Scores = PLAIN,
        bias: None = None,
    ) -> Float[Array, "batch tokens width"]:
        q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
        return _attend(q, k, v, mask, heads, scores)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _attend(query: Array, key: Array, value: Array, mask: Array, heads: int, scores: Scores) -> Array:
    return native_calls.attention(query, key, value, mask, heads, scores)


@_attend.defjvp
def _attend_jvp(heads: int, scores: Scores, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    *qkv, mask = primals

    def exact(query: Array, key: Array, value: Array) -> Array:
        return xla_attention.Attention().run(query, key, value, mask, heads, jnp.float32, scores)

    _, tangent = jax.jvp(exact, tuple(qkv), tangents[:3])
    return _attend(*primals, heads, scores), tangent


@dataclass(frozen=True)
class CachedAttention:
    """softmax(q k / sqrt(d)) v in float32; a token sees positions up to its own, and later ones are not read.

    Keys and values are decoded where they are multiplied, a head at a time.
    """

    def refuses(
        self, query: Float[Array, "batch tokens heads size"], keys: Cached, dtype: DTypeLike, scores: Scores = PLAIN
    ) -> str:
        return _refuses_dtype(dtype) or missing()

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
        return _attend_to_cache(query.astype(jnp.float32), keys, values, positions, first, scores)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _attend_to_cache(
    query: Array, keys: Cached, values: Cached, positions: Array, first: Array, scores: Scores
) -> Array:
    return native_calls.cached_attention(query, keys, values, positions, first, scores)


@_attend_to_cache.defjvp
def _attend_to_cache_jvp(scores: Scores, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    *qkv, positions, first = primals

    def exact(query: Array, keys: Cached, values: Cached) -> Array:
        return xla_attention.CachedAttention().run(query, keys, values, positions, jnp.float32, scores, first)

    _, tangent = jax.jvp(exact, tuple(qkv), tangents[:3])
    return _attend_to_cache(*primals, scores), tangent


def _refuses_dtype(dtype: DTypeLike) -> str:
    name = jnp.dtype(dtype).name
    return "" if name == "float32" else f"multiplies in float32 only, found {name}"


def missing() -> str:
    """Say why there are no native kernels here; return "" if there are."""
    if (platform := backend()) != "cpu":
        return f"runs on CPUs, found {platform}"
    return native.load().reason
