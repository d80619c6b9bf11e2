"""The table of kernels is open: one entry, made here, computes what models do; and only what it takes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from panels import NAME, PanelRows, Panels, Sums

import aq_jax as aq
from aq_jax import ConfigError, QTensor, QuantizationConfig, dequantize, prepare, qdot, qembed, quantize
from aq_jax.nn import QEmbed, QLinear
from aq_jax.nn.layers import PreparedWeight
from aq_jax.ops import KERNELS, Prepared
from aq_jax.ops.kernels import VARIABLE

FACTOR = 3.0  # no kernel may do that: here it tells whose result it is


class Tripled:
    """A product of four-bit weights, and their rows, three times too large."""

    def refuses(self, w: QTensor, *activations: str) -> str:
        return "" if w.spec.bits == 4 else f"has weights of 4 bits only, found {w.spec.bits}"

    def run(self, x: Any, w: Any, *rest: Any) -> jax.Array:
        if isinstance(x, QTensor):
            return FACTOR * jnp.take(dequantize(x), w, axis=0)
        after = rest[-1]
        return after.apply(FACTOR * x @ dequantize(w).T)


@pytest.fixture(autouse=True)
def tripled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)  # all of the tests may run with a kernel forced
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
    with pytest.raises(ConfigError, match=r"^AQ_JAX_KERNEL = 'nonsense': wanted one of native, xla, tripled$"):
        layer(X)


def test_what_is_not_there_or_not_taken_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"(?m)^kernel = 'mine': product has native, xla, tripled$"):
        qdot(X, weight("int4"), kernel="mine")
    with pytest.raises(ConfigError, match=r"(?m)^product: kernel 'tripled': has weights of 4 bits only, found 8$"):
        qdot(X, weight("int8"), kernel="tripled")


# ------------------------------------------------------------------------------------------------ prepared weights


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> Panels:
    """Registered behind XLA's; what they have made is counted."""
    own, rows = Panels(FACTOR), PanelRows(FACTOR)
    monkeypatch.setitem(KERNELS, "product", KERNELS["product"] | {NAME: own})
    monkeypatch.setitem(KERNELS, "rows", KERNELS["rows"] | {NAME: rows})
    return own


def same(a: Any, b: Any) -> bool:
    """Whether two trees are one, bit for bit."""
    (these, tree), (those, other) = jax.tree.flatten(a), jax.tree.flatten(b)
    return tree == other and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(these, those, strict=True))


def test_xla_takes_weights_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "xla")
    q = weight("int4")
    w = prepare(q)
    assert w.weight is q
    assert (w.arrays, w.nbytes, w.shape, w.kernel) == (None, q.nbytes, q.shape, "xla")
    assert np.array_equal(qdot(X, w), qdot(X, q))
    assert isinstance(QLinear(q).weight, nnx.Param)


@pytest.mark.parametrize("rotate", [False, True])
def test_what_a_kernel_wants_of_a_weight_is_made_once_and_gives_it_back(panels: Panels, rotate: bool) -> None:
    q, ids = weight("int4", rotate=rotate), jnp.array([2, -1, 8])
    w = prepare(q, kernel=NAME)
    assert (panels.made, w.weight, w.nbytes) == (1, None, q.nbytes)
    assert same(w.to_qtensor(), q)
    y, rows = qdot(X, q, kernel="xla"), qembed(q, ids, kernel="xla")
    np.testing.assert_allclose(qdot(X, w), FACTOR * y, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.jit(qdot)(X, w), FACTOR * y, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(qembed(w, ids), FACTOR * rows, rtol=1e-5, atol=1e-5)
    slope = jax.grad(lambda x: qdot(x, w).sum())(X)
    np.testing.assert_allclose(slope, jnp.ones((3, 8)) @ dequantize(q), rtol=1e-4, atol=1e-4)
    assert panels.made == 1
    # Others are given the QTensor; what is not prepared is, in the call.
    assert np.array_equal(qdot(X, w, kernel="xla"), y)
    assert np.array_equal(dequantize(w), dequantize(q))
    np.testing.assert_allclose(qdot(X, q, kernel=NAME), FACTOR * y, rtol=1e-4, atol=1e-4)
    assert panels.made == 2
    with pytest.raises(ConfigError, match=r"^product: kernel 'panels': has weights of at most 4 bits, found 8$"):
        prepare(weight("int8"), kernel=NAME)


def test_it_maps_over_a_stack(panels: Panels) -> None:
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), weight("int4"))
    found = jax.vmap(lambda q: qdot(X, prepare(q, kernel=NAME)))(stack)
    kept = jax.vmap(lambda w: qdot(X, w))(jax.vmap(lambda q: prepare(q, kernel=NAME))(stack))
    wanted = FACTOR * jax.vmap(lambda q: qdot(X, q, kernel="xla"))(stack)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(kept, wanted, rtol=1e-4, atol=1e-4)


def test_what_cannot_stand_for_a_weight_is_kept_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "product", KERNELS["product"] | {"sums": Sums()})
    q = weight("int4")
    w = prepare(q, kernel="sums")
    assert w.to_qtensor() is q
    assert w.nbytes == q.nbytes + 4 * 8
    wanted = qdot(X, q) + dequantize(q).sum(axis=1)
    np.testing.assert_allclose(qdot(X, w), wanted, rtol=1e-4, atol=1e-4)
    assert np.array_equal(qdot(X, w, kernel="xla"), qdot(X, q, kernel="xla"))


def test_a_prepared_weight_is_saved_as_what_it_was_made_of(panels: Panels, tmp_path: Any) -> None:
    from aq_jax.converters import orbax

    q = weight("int4")
    w = prepare(q, kernel=NAME)
    tree = {"one": w, "two": w, "bias": jnp.ones(8)}
    aq.save(tmp_path / "m.parquet", tree)
    with aq.WeightLoader(tmp_path / "m.parquet") as loader:
        assert loader.aliases == {"two": "one"}
        assert same(loader.get_quantized("one"), q)
    orbax.save(tmp_path / "m.orbax", tree)
    assert same(orbax.load(tmp_path / "m.orbax"), {"one": q, "two": q, "bias": jnp.ones(8)})
    assert aq.quantize_tree(tree, "int8")["two"] is w  # is quantized already


def test_layers_prepare_their_weights_and_they_are_no_parameters(panels: Panels, monkeypatch: Any) -> None:
    monkeypatch.setenv(VARIABLE, NAME)
    q, ids = weight("int4"), jnp.array([2, -1])
    linear, table = QLinear(q, jnp.ones(8)), QEmbed(q)
    for layer, variable in ((linear, linear.weight), (table, table.table)):
        assert isinstance(variable, PreparedWeight)
        assert isinstance(variable.get_value(), Prepared)
        assert same(layer.qtensor, q)
    assert len(jax.tree.leaves(nnx.state(linear, nnx.Param))) == 1  # the bias
    np.testing.assert_allclose(nnx.jit(lambda layer: layer(X))(linear), FACTOR * qdot(X, q, kernel="xla") + 1, 1e-4)
    np.testing.assert_allclose(table(ids), FACTOR * qembed(q, ids, kernel="xla"), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(table.attend(X), FACTOR * qdot(X, q, kernel="xla"), rtol=1e-4, atol=1e-4)
    assert panels.made == 1  # and once for the rows
    given = prepare(q, kernel="xla")
    assert QLinear(given).weight.get_value().kernel == "xla"


# ------------------------------------------------------------------------------------------------ codes and values


class Wrong:
    """Codes that are all 1, and values that are all 2."""

    def refuses(self, *what: Any) -> str:
        return "" if len(what) == 1 or what[1].bits == 4 else f"has codes of 4 bits only, found {what[1].bits}"

    def run(self, w: Any, *rest: Any) -> jax.Array:
        return jnp.full(w.shape, 2, rest[0]) if isinstance(w, QTensor) else jnp.ones_like(w)


def test_codes_and_values_are_a_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    config = QuantizationConfig("int4", group_size=16, solver="absmax")
    q, tree = quantize(w, config), aq.quantize_tree({"w": w}, config)["w"]
    for operation in ("quantize", "dequantize"):
        monkeypatch.setitem(KERNELS, operation, KERNELS[operation] | {"wrong": Wrong()})
    assert set(np.asarray(quantize(w, config, kernel="wrong").codes).flat) == {0x99}
    assert set(np.asarray(dequantize(q, kernel="wrong")).flat) == {2.0}
    with pytest.raises(ConfigError, match=r"^quantize: kernel 'wrong': has codes of 4 bits only, found 8$"):
        quantize(w, "int8", kernel="wrong")
    monkeypatch.setenv(VARIABLE, "wrong")
    assert set(np.asarray(aq.quantize_tree({"w": w}, config)["w"].codes).flat) == {0x99}
    assert set(np.asarray(dequantize(q, jnp.bfloat16), np.float32).flat) == {2.0}
    assert set(np.asarray(aq.fake_quant(w, config)).flat) == {2.0}
    monkeypatch.delenv(VARIABLE)
    assert same(quantize(w, config), q)
    assert same(aq.quantize_tree({"w": w}, config)["w"], tree)
