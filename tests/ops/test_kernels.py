"""The table of kernels is open: one entry, made here, computes what models do; and only what it takes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aq_jax import ConfigError, QTensor, QuantizationConfig, dequantize, qdot, qembed, quantize
from aq_jax.nn import QEmbed, QLinear
from aq_jax.ops import KERNELS
from aq_jax.ops.kernels import VARIABLE

FACTOR = 3.0  # no kernel may do that: here it tells whose result it is


class Tripled:
    """A product of four-bit weights, and their rows, three times too large."""

    def refuses(self, w: QTensor, *activations: str) -> str:
        return "" if w.spec.bits == 4 else f"has weights of 4 bits only, found {w.spec.bits}"

    def run(self, x: Any, w: Any, *rest: Any) -> jax.Array:
        if isinstance(x, QTensor):
            return FACTOR * jnp.take(dequantize(x), w, axis=0)
        return FACTOR * x @ dequantize(w).T


@pytest.fixture(autouse=True)
def tripled(monkeypatch: pytest.MonkeyPatch) -> None:
    for operation in ("product", "rows"):
        monkeypatch.setitem(KERNELS, operation, KERNELS[operation] | {"tripled": Tripled()})


def weight(quant_type: str, **options: Any) -> QTensor:
    w = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)
    q = quantize(w, QuantizationConfig(quant_type, group_size=16, solver="absmax", **options))
    assert isinstance(q, QTensor)
    return q


X = jnp.asarray(np.random.default_rng(1).normal(size=(3, 32)), jnp.float32)


@pytest.mark.parametrize("rotate", [False, True])
def test_a_kernel_of_ones_own_computes_what_it_is_asked_for(rotate: bool) -> None:
    q, ids = weight("int4", rotate=rotate), jnp.array([2, -1])
    np.testing.assert_allclose(qdot(X, q, kernel="tripled"), FACTOR * qdot(X, q), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(qembed(q, ids, kernel="tripled"), FACTOR * qembed(q, ids), rtol=1e-5, atol=1e-5)
    # Derivatives are those of the float32 product, whoever computes it.
    slope = jax.grad(lambda x: qdot(x, q, "int8", kernel="tripled").sum())(X)
    np.testing.assert_allclose(slope, jnp.ones((3, 8)) @ dequantize(q), rtol=1e-4, atol=1e-4)


def test_the_first_that_takes_a_call_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "product", {"tripled": Tripled()} | KERNELS["product"])
    x = X[:2]  # another shape: what was traced stays as it was
    for quant_type, factor in (("int4", FACTOR), ("int8", 1)):
        q = weight(quant_type)
        np.testing.assert_allclose(qdot(x, q), factor * qdot(x, q, kernel="xla"), rtol=1e-4, atol=1e-4)


def test_the_variable_forces_it_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    q = weight("int4")
    layer, table, ids = QLinear(q), QEmbed(q), jnp.array([1])
    y, rows = layer(X), table(ids)
    monkeypatch.setenv(VARIABLE, "tripled")
    np.testing.assert_allclose(layer(X), FACTOR * y, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(table(ids), FACTOR * rows, rtol=1e-5, atol=1e-5)
    monkeypatch.setitem(KERNELS, "rows", {"xla": KERNELS["rows"]["xla"]})  # which has no such kernel then
    np.testing.assert_array_equal(table(ids), rows)
    monkeypatch.setenv(VARIABLE, "nonsense")
    with pytest.raises(ConfigError, match=r"^AQ_JAX_KERNEL = 'nonsense': wanted one of xla, tripled$"):
        layer(X)


def test_what_is_not_there_or_not_taken_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^kernel = 'native': product has xla, tripled$"):
        qdot(X, weight("int4"), kernel="native")
    with pytest.raises(ConfigError, match=r"^product: kernel 'tripled': has weights of 4 bits only, found 8$"):
        qdot(X, weight("int8"), kernel="tripled")
