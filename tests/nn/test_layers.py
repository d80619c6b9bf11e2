"""QLinear and QEmbed against float layers of the dequantized weight."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aq_jax import ConfigError, QuantizationConfig, dequantize, qdot, quantize
from aq_jax.nn import QEmbed, QLinear

CONFIGS = ["int8", QuantizationConfig("int4", group_size=16, symmetric=False, solver="minmax")]
ONES = nnx.initializers.ones  # random ones would have to be compiled


def float_linear(layer: QLinear, weight: jax.Array) -> nnx.Linear:
    """An nnx.Linear that computes what QLinear stands for."""
    made = nnx.Linear(
        weight.shape[1], weight.shape[0], use_bias=layer.bias is not None, kernel_init=ONES, rngs=nnx.Rngs(0)
    )
    made.kernel.set_value(weight.T)
    if layer.bias is not None:
        made.bias.set_value(layer.bias.get_value())
    return made


@pytest.mark.parametrize("config", CONFIGS, ids=["int8", "int4"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_a_linear_layer_is_the_float_layer(
    with_bias: bool, config: QuantizationConfig | str, weight: np.ndarray, rng: np.random.Generator
) -> None:
    q = quantize(weight, config)
    bias = jnp.asarray(rng.normal(size=6), jnp.float32) if with_bias else None
    x = jnp.asarray(rng.normal(size=(2, 3, 64)), jnp.float32)
    layer = QLinear(q, bias, activations="float32")
    y = layer(x)
    assert (y.shape, y.dtype) == ((2, 3, 6), jnp.float32)
    assert np.allclose(y, float_linear(layer, dequantize(q))(x), rtol=1e-5, atol=1e-5)
    # The layer's own activations are used.
    for how in ("int8", "bfloat16"):
        wanted = qdot(x, q, how)
        wanted = wanted if bias is None else wanted + bias
        np.testing.assert_allclose(QLinear(q, bias, activations=how)(x), wanted, rtol=1e-5, atol=1e-5)


def test_axes_are_those_of_a_general_linear_layer(rng: np.random.Generator) -> None:
    general = nnx.LinearGeneral((4, 8), (2, 3), axis=(-2, -1), kernel_init=ONES, rngs=nnx.Rngs(0))
    general.bias.set_value(jnp.arange(6.0).reshape(2, 3))
    q = quantize(rng.normal(size=(6, 32)).astype(np.float32), "int8")
    layer = QLinear(q, general.bias.get_value(), activations="float32", inputs=(4, 8), outputs=(2, 3))
    general.kernel.set_value(dequantize(q).T.reshape(4, 8, 2, 3))
    for batch in ((), (2, 5), (0,)):
        x = jnp.asarray(rng.normal(size=(*batch, 4, 8)), jnp.float32)
        y = layer(x)
        assert y.shape == (*batch, 2, 3)
        assert np.allclose(y, general(x), rtol=1e-5, atol=1e-5)


def test_a_linear_layer_keeps_the_dtype_of_its_inputs(weight: np.ndarray) -> None:
    layer = QLinear(quantize(weight, "int8"), jnp.ones(6), activations="float32")
    assert layer(jnp.ones((2, 64), jnp.bfloat16)).dtype == jnp.bfloat16
    assert layer(jnp.ones((2, 64), jnp.int32)).dtype == jnp.float32


def test_a_dtype_is_that_of_inputs_and_results(weight: np.ndarray) -> None:
    q, x = quantize(weight, "int8"), jnp.ones((2, 64)) / 3
    half = jnp.bfloat16
    y = QLinear(q, jnp.ones(6), activations="float32", dtype=half)(x)
    assert y.dtype == half
    assert np.array_equal(y, QLinear(q, jnp.ones(6), activations="float32")(x.astype(half)))
    layer = QEmbed(q, activations="float32", dtype=half)
    assert layer.attend(x).dtype == layer(jnp.array([1])).dtype == half
    assert np.array_equal(layer(jnp.array([1])), QEmbed(q)(jnp.array([1])).astype(half))


def test_what_integers_cannot_be_multiplied_by_is_refused_at_once(weight: np.ndarray) -> None:
    q = quantize(weight, QuantizationConfig("int8", group_size=24))
    for make in (QLinear, QEmbed):
        message = (
            rf"^{make.__name__}: activations = 'int8' needs grids that each .*; found QTensor.*; choose a group_size"
        )
        with pytest.raises(ConfigError, match=message):
            make(q, activations="int8")
        make(q)


@pytest.mark.parametrize("config", CONFIGS, ids=["int8", "int4"])
def test_an_embedding_is_the_float_layer(
    config: QuantizationConfig | str, weight: np.ndarray, rng: np.random.Generator
) -> None:
    q = quantize(weight, config)
    layer, wanted = QEmbed(q, activations="float32"), nnx.Embed(6, 64, embedding_init=ONES, rngs=nnx.Rngs(0))
    wanted.embedding.set_value(dequantize(q))
    ids = jnp.array([[0, 5, 2], [3, -1, 6]])  # the last is outside: both give NaN
    assert np.array_equal(layer(ids), wanted(ids), equal_nan=True)
    query = jnp.asarray(rng.normal(size=(2, 64)), jnp.float32)
    assert np.allclose(layer.attend(query), wanted.attend(query), rtol=1e-5, atol=1e-5)
    found = QEmbed(q, activations="int8").attend(query)
    assert np.allclose(found, qdot(query, q, "int8"), rtol=1e-5, atol=1e-5)


def test_layers_take_a_sharding_of_their_outputs(weight: np.ndarray) -> None:
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    q = quantize(weight, "int8")
    with jax.set_mesh(mesh):
        where = jax.sharding.NamedSharding(mesh, jax.P(None, "model"))
        x = jnp.ones((2, 64))
        for y, plain in (
            (QLinear(q)(x, out_sharding=where), QLinear(q)(x)),
            (QEmbed(q).attend(x, out_sharding=where), QEmbed(q).attend(x)),
            (QEmbed(q)(jnp.array([0, 1]), out_sharding=where), QEmbed(q)(jnp.array([0, 1]))),
        ):
            assert y.sharding == where
            assert np.array_equal(y, plain)


def test_layers_split_merge_and_jit(weight: np.ndarray) -> None:
    q = quantize(weight, "int8")
    # In float32: elsewhere another program may round to another level, half-way between two.
    model = nnx.Sequential(QEmbed(q), QLinear(q, jnp.ones(6), activations="float32"))
    ids = jnp.array([0, 3, 5])
    graph, state = nnx.split(model)
    wanted = model(ids)
    assert np.array_equal(nnx.merge(graph, state)(ids), wanted)
    assert hash(graph) == hash(nnx.split(model)[0])
    leaves = jax.tree.leaves(state)
    assert sorted(str(leaf.dtype) for leaf in leaves)[:5] == ["float32"] * 5  # and codes

    @jax.jit
    def run(state: nnx.State, ids: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(ids)

    @nnx.jit
    def run_model(model: nnx.Module, ids: jax.Array) -> jax.Array:
        return model(ids)

    for compiled in (run(state, ids), run_model(model, ids)):
        assert np.allclose(compiled, wanted, rtol=1e-5, atol=1e-5)
    run(jax.tree.map(jnp.copy, nnx.state(model)), ids)
    assert run._cache_size() == 1


def test_biases_and_scales_have_gradients(weight: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AQ_JAX_KERNEL", "xla")  # others may keep another form of the weight, which is no parameter
    layer = QLinear(quantize(weight, "int8"), jnp.zeros(6), activations="int8")
    x = jnp.ones((3, 64))

    def loss(bias: jax.Array, scale: jax.Array) -> jax.Array:
        graph, state = nnx.split(layer)
        arrays = {"bias": bias, "weight": dataclasses.replace(q, scale=scale)}
        nnx.replace_by_pure_dict(state, arrays)
        return nnx.merge(graph, state)(x).sum()

    q = layer.weight.get_value()
    bias, scale = jax.grad(loss, argnums=(0, 1))(layer.bias.get_value(), q.scale)
    assert np.allclose(bias, 3)
    assert np.allclose(scale[:, 0], 3 * np.asarray(q.codes, np.float64).sum(axis=1), rtol=1e-5)


def test_wrong_shapes_are_named(weight: np.ndarray) -> None:
    q = quantize(weight, "int8")
    with pytest.raises(ValueError, match=r"^QLinear: weight of shape \[6, 64\] does not fit \(64,\) -> \(5,\)$"):
        QLinear(q, outputs=(5,))
    with pytest.raises(ValueError, match=r"^QLinear: weight of shape \[6, 64\] does not fit \(8, 7\) -> \(6,\)$"):
        QLinear(q, inputs=(8, 7))
    with pytest.raises(ValueError, match=r"^QLinear: weight of shape \[2, 3, 64\] does not fit \(3, 64\) -> \(2,\)$"):
        QLinear(quantize(weight.reshape(2, 3, 64), "int8"))
    with pytest.raises(ValueError, match=r"^QLinear: x of shape \[2, 63\]; wanted \[\.\.\., 64\]$"):
        QLinear(q)(jnp.ones((2, 63)))
    with pytest.raises(ValueError, match=r"^QLinear: x of shape \[64\]; wanted \[\.\.\., 8, 8\]$"):
        QLinear(q, inputs=(8, 8))(jnp.ones(64))
    with pytest.raises(ValueError, match=r"^qdot: x of shape \[2, 6\] and W of shape \[6, 64\]"):
        QEmbed(q).attend(jnp.ones((2, 6)))
