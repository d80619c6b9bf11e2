"""The kernels of `aq_jax.native`: products of 8-bit codes, and attention over whole texts, on CPUs.

A product rounds the rows of its inputs to the codes that XLA's kernel has, and sums their products exactly, as it does;
the floats made of these sums differ by a few units in the last place. Inputs of rotated weights are rotated by sums in
another order, so that a code may be the next one, where XLA's value lies between two. A row's result depends on no
other row, and not on the number of threads. Derivatives are those of XLA's formulations.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float

from aq_jax import native
from aq_jax.core.dispatch import TOKENS, Activations, backend
from aq_jax.core.prepared import Prepared
from aq_jax.core.qtensor import QTensor
from aq_jax.ops import native_calls, xla_attention
from aq_jax.ops.epilogue import Epilogue
from aq_jax.ops.native_panels import Panels, from_panels, to_panels


@dataclass(frozen=True)
class Product:
    """x @ W.T of 8-bit inputs and weights, whose codes are prepared in panels (see `native_panels`)."""

    rotates: ClassVar = True

    @property
    def tokens(self) -> int:
        """The rows that a model is given at once: for each core as many as its caches keep from layer to layer."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(128 * cores, TOKENS["cpu"])

    def refuses(self, w: QTensor, activations: Activations) -> str:
        if activations != "int8":
            return f"multiplies 8-bit inputs only, found {activations}"
        if w.spec.bits != 8 or w.packed or not w.spec.coding.uniform:
            return f"multiplies evenly spaced 8-bit weights only, found {w.spec.quant_type}"
        if w.ndim != 2 or not w.size or not (w.by_row or w.scale.size == 1):
            return "wants a matrix of groups that each lie in one row"
        return _missing()

    def prepare(self, q: QTensor) -> Panels:
        return to_panels(q)

    def restore(self, arrays: Panels, like: QTensor) -> QTensor:
        return from_panels(arrays, like)

    def run(
        self, x: Float[Array, "rows inputs"], w: Prepared, activations: Activations, after: Epilogue
    ) -> Float[Array, "rows outputs"]:
        return native_calls.product(x, w.arrays, after, w.like)


@dataclass(frozen=True)
class Attention:
    """softmax(q k / sqrt(d)) v in float32."""

    def refuses(self, query: Float[Array, "batch tokens width"], heads: int, dtype: DTypeLike) -> str:
        if jnp.dtype(dtype) != jnp.float32:
            return f"multiplies in float32 only, found {jnp.dtype(dtype).name}"
        return _missing()

    def run(
        self,
        query: Float[Array, "batch tokens width"],
        key: Float[Array, "batch tokens width"],
        value: Float[Array, "batch tokens width"],
        mask: Bool[Array, "batch tokens"],
        heads: int,
        dtype: DTypeLike,
    ) -> Float[Array, "batch tokens width"]:
        q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
        return _attend(q, k, v, mask, heads)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _attend(query: Array, key: Array, value: Array, mask: Array, heads: int) -> Array:
    return native_calls.attention(query, key, value, mask, heads)


@_attend.defjvp
def _attend_jvp(heads: int, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    *qkv, mask = primals

    def exact(query: Array, key: Array, value: Array) -> Array:
        return xla_attention.Attention().run(query, key, value, mask, heads, jnp.float32)

    _, tangent = jax.jvp(exact, tuple(qkv), tangents[:3])
    return _attend(*primals, heads), tangent


def _missing() -> str:
    """Say why there are no native kernels here; return "" if there are."""
    if (platform := backend()) != "cpu":
        return f"runs on CPUs, found {platform}"
    return native.load().reason
