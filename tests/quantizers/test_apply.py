"""`quantize`, `fake_quant` and `quantize_tree`: one array or a tree, concrete or traced."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from helpers import compilations

from aq_jax import (
    AqError,
    ConfigError,
    Override,
    QTensor,
    QuantizationConfig,
    dequantize,
    fake_quant,
    qdot,
    quantize,
    quantize_tree,
)
from aq_jax.ops.kernels import VARIABLE
from aq_jax.ops.xla import saturated

ABSMAX = QuantizationConfig(quant_type="int4", group_size=32, solver="absmax")
MINMAX = QuantizationConfig(quant_type="int2", group_size=32, symmetric=False, solver="minmax")
MSE = QuantizationConfig(quant_type="int2", group_size=32)


def assert_same(found: QTensor, wanted: QTensor) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)


# Transformations


@partial(jax.jit, static_argnums=1)
def compiled(w: jax.Array, config: QuantizationConfig) -> QTensor:
    """One compilation for all tests of traced weights."""
    return quantize(w, config)


@pytest.mark.parametrize("config", [ABSMAX, MSE], ids=["absmax", "mse"])
def test_jit_changes_nothing(config: QuantizationConfig, weight: np.ndarray) -> None:
    assert_same(compiled(weight, config), quantize(weight, config))


def test_vmap_of_quantize_is_quantize_of_the_batch(weight: np.ndarray) -> None:
    batch = jnp.stack([jnp.asarray(weight), -weight, 5 * weight])
    found = jax.vmap(lambda w: quantize(w, ABSMAX))(batch)
    assert_same(found, jax.tree.map(lambda *leaves: jnp.stack(leaves), *[quantize(w, ABSMAX) for w in batch]))
    # Groups that divide the rows lie in the batch as they lie in its parts.
    assert_same(found, quantize(batch, ABSMAX))


def test_vmap_of_a_symmetric_mse_decides_for_each(rng: np.random.Generator) -> None:
    # The first is better with zero on a level, the second with zero between two.
    sparse = rng.choice([-0.7, 0, 0.7], (6, 64), p=[0.05, 0.9, 0.05])
    batch = jnp.asarray([sparse, rng.normal(size=(6, 64))], jnp.float32)
    found = jax.vmap(lambda w: quantize(w, MSE))(batch)
    scale, zero_point = np.asarray(found.scale), np.asarray(found.zero_point)
    assert set(zero_point[0][scale[0] != 1].tolist()) == {0.0}
    assert set(zero_point[1].ravel().tolist()) == {-0.5}


def test_scan_over_layers(weight: np.ndarray) -> None:
    batch = jnp.stack([jnp.asarray(weight), -weight])
    _, found = jax.lax.scan(lambda carry, w: (carry, quantize(w, ABSMAX)), None, batch)
    assert_same(found, jax.vmap(lambda w: quantize(w, ABSMAX))(batch))


@pytest.mark.parametrize("config", [ABSMAX, MSE], ids=["absmax", "mse"])
def test_eval_shape_is_what_comes_out(config: QuantizationConfig, weight: np.ndarray) -> None:
    abstract = jax.eval_shape(lambda w: quantize(w, config), weight)
    q = quantize(weight, config)
    assert jax.tree.structure(abstract) == jax.tree.structure(q)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(abstract)] == [(a.shape, a.dtype) for a in jax.tree.leaves(q)]


def test_eval_shape_of_half_is_half() -> None:
    abstract = jax.eval_shape(lambda w: quantize(w, "fp16"), jax.ShapeDtypeStruct((2, 8), jnp.float32))
    assert (abstract.shape, abstract.dtype) == ((2, 8), jnp.float16)


# The straight-through estimator


def test_fake_quant_rounds_forwards_and_is_the_identity_backwards(weight: np.ndarray) -> None:
    config = ABSMAX
    w = jnp.asarray(weight)
    rounded = dequantize(quantize(w, config))
    tangent = jnp.linspace(-1, 1, w.size).reshape(w.shape)
    value, pushed = jax.jvp(lambda w: fake_quant(w, config), (w,), (tangent,))
    assert np.allclose(value, rounded, rtol=0, atol=1e-6)
    assert np.array_equal(pushed, tangent)
    # The gradient is that of the function at the rounded weights.
    grads = jax.grad(lambda w: (fake_quant(w, config) ** 2).sum())(w)
    assert np.allclose(grads, 2 * rounded, rtol=0, atol=1e-5)


def test_fake_quant_under_jit_and_vmap_keeps_the_dtype(weight: np.ndarray) -> None:
    w = jnp.asarray(weight, jnp.bfloat16)
    out = jax.jit(lambda w: fake_quant(w, ABSMAX))(w)
    assert out.dtype == jnp.bfloat16
    assert np.array_equal(jax.vmap(lambda w: fake_quant(w, ABSMAX))(w[None])[0], out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [MINMAX, "fp16", "none"], ids=["minmax", "fp16", "none"])
def test_fake_quant_is_exactly_what_quantize_gives(
    config: QuantizationConfig | str, dtype: str, weight: np.ndarray
) -> None:
    w = jnp.asarray(weight * 37.3, dtype)
    q = quantize(w, config)
    found = fake_quant(w, config)
    assert found.dtype == w.dtype
    assert np.array_equal(found, dequantize(q, dtype=w.dtype) if isinstance(q, QTensor) else q.astype(w.dtype))
    assert np.array_equal(jax.grad(lambda w: (3 * fake_quant(w, config)).sum())(w), jnp.full_like(w, 3))


def test_fake_quant_has_second_derivatives() -> None:
    w = jnp.array([[0.5, -1.0, 0.25]])
    seen = fake_quant(w, "int8")
    hessian = jax.hessian(lambda w: (fake_quant(w, "int8") ** 3).sum())(w)
    np.testing.assert_allclose(hessian.reshape(3, 3), np.diag(6 * seen[0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        ("float16", QuantizationConfig("int3")),
        ("float16", QuantizationConfig("int3", group_size=4, rotate=True)),
        ("float8_e4m3fn", QuantizationConfig("int4", symmetric=False)),
    ],
    ids=["int3", "rotated", "float8"],
)
def test_levels_beyond_a_dtype_are_its_largest_number(config: QuantizationConfig, dtype: str) -> None:
    """The outermost of evenly spaced levels may lie further out than the weights."""
    parts = jnp.array([[1 / 448, 2 / 448, -3 / 448, 0.5 / 448, 1, -1, 320 / 448, -0.25]])
    whole = (parts * float(jnp.finfo(dtype).max)).astype(dtype)
    for w in (whole, -whole):
        found = np.asarray(fake_quant(w, config), np.float32)
        assert np.isfinite(found).all()
        assert np.array_equal(dequantize(quantize(w, config), dtype).astype(np.float32), found)
    assert np.isnan(np.asarray(saturated(jnp.array([jnp.nan]), dtype))).all()  # as `qembed` has it of no row


def test_fake_quant_refuses_what_quantize_does_but_no_values(weight: np.ndarray) -> None:
    for config in ("int8", "fp16", "none"):
        with pytest.raises(AqError, match="weight: dtype int32 is not floating"):
            fake_quant(jnp.ones((2, 2), jnp.int32), config)
        with pytest.raises(AqError, match="weight: a scalar has no axis"):
            fake_quant(1.0, config)
    broken = jnp.asarray(weight).at[2, 5].set(jnp.nan).at[2, 6].set(jnp.inf)
    assert np.array_equal(fake_quant(broken, ABSMAX), dequantize(compiled(broken, ABSMAX)))


# Numbers that are none, where nothing can be raised


@pytest.mark.parametrize("config", [ABSMAX, MSE], ids=["absmax", "mse"])
def test_under_tracing_nan_does_not_poison_its_group(config: QuantizationConfig, weight: np.ndarray) -> None:
    broken, mended = weight.copy(), weight.copy()
    broken[2, 5], mended[2, 5] = np.nan, 0.0
    found, wanted = compiled(broken, config), compiled(mended, config)
    assert np.array_equal(found.scale, wanted.scale)
    assert np.array_equal(found.zero_point, wanted.zero_point)
    others = np.ones(weight.shape, bool)
    others[2, 5] = False
    assert np.array_equal(oracle.codes_of(found)[others], oracle.codes_of(wanted)[others])
    assert np.isfinite(dequantize(found)).all()
    assert oracle.codes_of(found)[2, 5] == 0  # a level near zero


@pytest.mark.parametrize("config", [ABSMAX, MSE], ids=["absmax", "mse"])
def test_under_tracing_infinities_saturate(config: QuantizationConfig, weight: np.ndarray) -> None:
    broken = weight.copy()
    broken[2, 5], broken[2, 6] = np.inf, -np.inf
    found = compiled(broken, config)
    qmin, qmax = oracle.code_range(found.spec.bits)
    assert oracle.codes_of(found)[2, 5:7].tolist() == [qmax, qmin]
    assert np.isfinite(dequantize(found)).all()
    # The range is that of the finite elements.
    assert np.abs(dequantize(found)[2]).max() <= 2 * np.abs(weight[2]).max()
    untouched = np.arange(6) != 2
    wanted = compiled(weight, config)
    assert np.array_equal(dequantize(found)[untouched], dequantize(wanted)[untouched])


# What quantize refuses, and what it lets through


def test_only_floating_weights_with_an_axis() -> None:
    with pytest.raises(AqError, match="head: dtype int32 is not floating; wanted floating weights"):
        quantize(jnp.ones((2, 2), jnp.int32), "int8", name="head")
    with pytest.raises(AqError, match="head: a scalar has no axis"):
        quantize(jnp.float32(3.0), "int8", name="head")
    with pytest.raises(ConfigError, match="quant_type = 'int7'"):
        quantize(jnp.ones((2, 2)), "int7")


def test_types_that_are_no_codes(weight: np.ndarray) -> None:
    assert np.array_equal(quantize(weight, "none"), weight)
    half = quantize(weight, "fp16")
    assert half.dtype == jnp.float16
    assert np.array_equal(half, weight.astype(np.float16))
    tiny = jnp.asarray(weight * 1e-20, jnp.bfloat16)
    assert quantize(tiny, "fp16").dtype == jnp.bfloat16  # half cannot hold it


def test_a_name_is_seen_by_patterns(weight: np.ndarray) -> None:
    config = QuantizationConfig(mixed_precision_layers=["embed"], overrides=(Override("head", quant_type="none"),))
    assert isinstance(quantize(weight, config, name="layer"), QTensor)
    assert quantize(weight, config, name="embed.word").dtype == jnp.float16
    assert quantize(weight, config, name="head").dtype == jnp.float32


# Trees


@pytest.fixture
def params(rng: np.random.Generator) -> dict:
    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "embed": {"word": normal(8, 64), "position": normal(4, 64)},
        "layers": [{"kernel": normal(6, 64), "bias": normal(6)}, {"kernel": normal(6, 64), "bias": normal(6)}],
        "ids": jnp.arange(8).reshape(2, 4),
        "scale": jnp.float32(3.0),
        "step": 7,
        "nothing": None,
    }


def test_a_tree_is_quantized_by_name(params: dict) -> None:
    config = QuantizationConfig(
        quant_type="int4",
        group_size=32,
        solver="absmax",
        mixed_precision_layers=["position"],
        overrides=(Override(r"^layers\.1\.", quant_type="int8"), Override("word", quant_type="none")),
    )
    tree = quantize_tree(params, config)
    assert tree["embed"]["word"] is params["embed"]["word"]
    assert tree["embed"]["position"].dtype == jnp.float16
    assert_same(tree["layers"][0]["kernel"], quantize(params["layers"][0]["kernel"], ABSMAX))
    assert tree["layers"][1]["kernel"].spec.bits == 8
    # Not quantized: one axis, integers, scalars, and what is no array.
    for name in ("ids", "scale", "step", "nothing"):
        assert tree[name] is params[name]
    assert tree["layers"][0]["bias"] is params["layers"][0]["bias"]
    assert isinstance(tree["layers"], list)


def test_mixed_precision_holds_for_biases_too(params: dict) -> None:
    tree = quantize_tree(params, QuantizationConfig(mixed_precision_layers=["layers.0"]))
    assert tree["layers"][0]["bias"].dtype == jnp.float16
    assert tree["layers"][1]["bias"].dtype == jnp.float32


def test_a_tree_may_be_a_single_leaf_of_numpy(weight: np.ndarray) -> None:
    q = quantize_tree(weight, ABSMAX)
    assert isinstance(q.codes, jax.Array)
    assert_same(q, quantize(weight, ABSMAX))


def test_tied_leaves_stay_equal(params: dict) -> None:
    params["head"] = params["embed"]["word"]
    tree = quantize_tree(params, ABSMAX)
    assert_same(tree["head"], tree["embed"]["word"])


@pytest.mark.parametrize("traced", [False, True], ids=["concrete", "traced"])
def test_what_is_quantized_already_stays(params: dict, traced: bool) -> None:
    once = quantize_tree(params["layers"], ABSMAX)
    again = (jax.jit(lambda p: quantize_tree(p, "int8")) if traced else lambda p: quantize_tree(p, "int8"))(once)
    assert_same(again[0]["kernel"], once[0]["kernel"])


def test_a_traced_tree_is_the_concrete_one(params: dict) -> None:
    layers = params["layers"]
    found = jax.jit(lambda p: quantize_tree(p, ABSMAX))(layers)
    wanted = quantize_tree(layers, ABSMAX)
    assert_same(found[1]["kernel"], wanted[1]["kernel"])
    assert np.array_equal(found[1]["bias"], layers[1]["bias"])


@pytest.mark.parametrize("kind", ["int8", "fp16"])
def test_a_tree_of_shapes_becomes_the_shapes_of_the_tree(kind: str, params: dict) -> None:
    layers = params["layers"]
    found = quantize_tree(jax.eval_shape(lambda p: p, layers), kind)
    wanted = quantize_tree(layers, kind)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert isinstance(ours, jax.ShapeDtypeStruct)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


ODD = [
    QuantizationConfig("int4", group_size=24, solver="absmax"),
    QuantizationConfig("int3", group_size=17, solver="absmax"),
    QuantizationConfig("int2", per_channel=False, solver="absmax"),
]


@pytest.mark.parametrize("config", ODD, ids=lambda c: c.quant_type)
def test_a_tree_of_many_odd_shapes_compiles_few_programs(
    config: QuantizationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are no whole bytes, too, are cut up without a program for each shape."""
    monkeypatch.setenv(VARIABLE, "xla")
    tree = {str(i): np.ones((5 + i, 7 + 2 * i), np.float32) for i in range(12)}
    jax.clear_caches()
    with compilations() as programs:
        quantized = quantize_tree(tree, config)
    assert not any(q.packed for q in quantized.values())
    assert 1 <= len(programs) <= 3


def test_errors_name_the_leaf(params: dict) -> None:
    params["layers"][1]["kernel"] = params["layers"][1]["kernel"].at[3, 7].set(jnp.nan)
    with pytest.raises(AqError, match=r"^layers\.1\.kernel: 1 of 384 values are not finite \(first at \[3, 7\]\)"):
        quantize_tree(params, ABSMAX)
    tree = quantize_tree(params, dataclasses.replace(ABSMAX, on_nonfinite="keep"))
    assert tree["layers"][1]["kernel"] is params["layers"][1]["kernel"]
    assert isinstance(tree["layers"][0]["kernel"], QTensor)


# What weights may come as


def test_weights_of_other_libraries_and_orders_are_taken(weight: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    wanted = quantize(weight, ABSMAX)
    for given in (torch.tensor(weight), torch.tensor(weight.T.copy()).T, weight.astype(">f4"), nnx.Param(weight)):
        assert_same(quantize(given, ABSMAX), wanted)
        assert_same(
            jax.tree.leaves(quantize_tree([given], ABSMAX), is_leaf=lambda x: isinstance(x, QTensor))[0], wanted
        )
    assert_same(quantize(weight.tolist(), ABSMAX), wanted)
    assert_same(quantize([jnp.asarray(row) for row in weight], ABSMAX), wanted)
    half = torch.tensor(weight).to(torch.bfloat16)
    assert_same(quantize(half, ABSMAX), quantize(jnp.asarray(weight, jnp.bfloat16), ABSMAX))
    assert_same(quantize_tree({"w": half}, ABSMAX)["w"], quantize(half, ABSMAX))
    assert (
        quantize(torch.tensor(weight), "fp16").dtype == quantize_tree(torch.tensor(weight), "fp16").dtype == "float16"
    )
    numbers = torch.arange(6).reshape(2, 3)
    assert quantize_tree({"n": numbers}, ABSMAX)["n"] is numbers


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.ma.masked_less(np.ones((2, 32), np.float32), 0), "^w: is a masked array, whose mask would be lost; wanted"),
        (jax.ShapeDtypeStruct((2, 32), np.float32), "^w: is a ShapeDtypeStruct, which has a shape and no values; want"),
        ([[1.0, 2.0], [3.0]], "^w: list is no array"),
        ([[1, 2], [3, 4]], "^w: dtype int32 is not floating"),
        ("text", "^w: str is no array"),
    ],
    ids=["mask", "shape", "ragged", "integers", "text"],
)
def test_what_is_no_weight_is_refused_by_name(given: Any, message: str) -> None:
    with pytest.raises(AqError, match=message):
        quantize(given, ABSMAX, "w")
    if isinstance(given, np.ndarray):
        with pytest.raises(AqError, match=message):
            quantize_tree({"w": given}, ABSMAX)


def test_a_state_s_parameters_have_the_names_of_the_model(weight: np.ndarray) -> None:
    """Whatever holds them; a dictionary's key "value" is a name like any other."""
    config = dataclasses.replace(ABSMAX, overrides=(Override(r"^a\.kernel$", "none"), Override(r"^b\.value$", "none")))
    tree = {"a": {"kernel": nnx.Param(weight)}, "b": {"value": weight, "key": nnx.Param({"value": weight})}}
    found = quantize_tree(tree, config)
    assert found["a"]["kernel"].get_value() is weight
    assert found["b"]["value"] is weight
    assert isinstance(found["b"]["key"].get_value()["value"], QTensor)
    layer = nnx.Linear(32, 4, rngs=nnx.Rngs(0))
    for holds in (nnx.state(layer), nnx.to_pure_dict(nnx.state(layer)), layer):
        kept = quantize_tree(holds, dataclasses.replace(ABSMAX, overrides=(Override("^kernel$", "none"),)))
        assert not any(
            isinstance(leaf, QTensor) for leaf in jax.tree.leaves(kept, is_leaf=lambda x: isinstance(x, QTensor))
        )


def test_kernels_of_inputs_and_outputs_are_turned_first(rng: np.random.Generator) -> None:
    """Groups lie along the inputs; embeddings, floats and abstract leaves keep or take their axes alike."""
    kernel = rng.normal(size=(2, 32, 6)).astype(np.float32)
    tree = {"a": {"kernel": kernel, "bias": kernel[0, 0]}, "embed": {"embedding": kernel[0]}, "half": kernel[1]}
    config = QuantizationConfig("int4", group_size=16, solver="absmax", mixed_precision_layers=("half",))
    found = quantize_tree(tree, config, layout="in_out")
    wanted = quantize(kernel.swapaxes(-1, -2), config)
    assert found["a"]["kernel"].spec == wanted.spec
    np.testing.assert_array_equal(dequantize(found["a"]["kernel"]), dequantize(wanted))
    assert found["embed"]["embedding"].shape == (32, 6)
    assert (found["half"].dtype, found["half"].shape) == (np.float16, (32, 6))
    assert found["a"]["bias"] is tree["a"]["bias"]
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    abstract = quantize_tree(shapes, config, layout="in_out")
    assert jax.tree.structure(abstract) == jax.tree.structure(found)
    assert jax.tree.map(lambda leaf: leaf.shape, abstract) == jax.tree.map(lambda leaf: leaf.shape, found)
    with pytest.raises(ConfigError, match="layout = 'in-out'"):
        quantize_tree(tree, config, layout="in-out")


@pytest.mark.slow
def test_a_module_of_equinox_holds_packed_weights() -> None:
    equinox = pytest.importorskip("equinox")
    mlp = equinox.nn.MLP(32, 8, 16, 1, key=jax.random.key(0))
    config = dataclasses.replace(ABSMAX, overrides=(Override("bias", "none"),))
    found, x = quantize_tree(mlp, config), jax.random.normal(jax.random.key(1), (3, 32))
    for layer, before in zip(found.layers, mlp.layers, strict=True):
        assert isinstance(layer.weight, QTensor)
        assert layer.weight.shape == (before.out_features, before.in_features)
        assert layer.bias is before.bias
        dense = equinox.tree_at(lambda each: each.weight, before, dequantize(layer.weight))
        np.testing.assert_allclose(qdot(x, layer.weight) + layer.bias, jax.vmap(dense)(x), rtol=0, atol=1e-5)
        x = jax.nn.relu(jax.vmap(before)(x))
