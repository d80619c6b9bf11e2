"""Kernels that tests alone register: products and rows of weights whose codes lie in panels of their own, turned."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from aq_jax import QTensor, dequantize
from aq_jax.ops import Epilogue, Prepared

NAME = "panels"


class Panels:
    """Codes of [outputs, inputs] as [inputs, outputs], instead of the QTensor.

    Args:
        factor: of results: no kernel may do that, but it tells whose they are.
    """

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.made = factor, 0

    def refuses(self, w: QTensor, *activations: str) -> str:
        return "" if w.spec.bits <= 4 else f"has weights of at most 4 bits, found {w.spec.bits}"

    def prepare(self, q: QTensor) -> dict[str, jax.Array]:
        assert not q.spec.rotation
        self.made += 1
        return {"codes": q.codes.T, "scale": q.scale, "zero_point": q.zero_point}

    def restore(self, arrays: dict[str, jax.Array], like: QTensor) -> QTensor:
        return dataclasses.replace(like, **arrays | {"codes": arrays["codes"].T})

    def values(self, w: Any) -> jax.Array:
        assert isinstance(w, Prepared)
        assert w.weight is None
        return jnp.float32(self.factor) * dequantize(w, kernel="xla")

    def run(self, x: jax.Array, w: Any, activations: str, after: Epilogue) -> jax.Array:
        return after.apply(x @ self.values(w).T)


class PanelRows(Panels):
    """Rows of such panels: what was prepared for products serves them, too."""

    def run(self, w: Any, ids: jax.Array, inside: jax.Array) -> jax.Array:  # type: ignore[override]
        return jnp.where(inside[..., None], jnp.take(self.values(w), ids, axis=0, mode="clip"), jnp.nan)


class Sums:
    """A product that wants a few numbers beside the QTensor: for each row of W the sum of its values."""

    def refuses(self, w: QTensor, activations: str) -> str:
        return ""

    def prepare(self, q: QTensor) -> jax.Array:
        return dequantize(q).sum(axis=1)

    def run(self, x: jax.Array, w: Any, activations: str, after: Epilogue) -> jax.Array:
        return after.apply(x @ dequantize(w.weight).T + w.arrays)
