"""Rotated weights: the matrix, quantizing what was rotated, and products and rows of it, against what is not packed."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax

from aq_jax import AqError, QTensor, QuantizationConfig, dequantize, fake_quant, qdot, qembed, quantize, quantize_tree
from aq_jax.codes.rotation import rotate_rows, rotation_matrix, unrotate_rows
from aq_jax.codes.rotation_jax import rotate, unrotate
from aq_jax.core.dispatch import ACTIVATIONS, Activations
from aq_jax.store.schema import ROTATIONS

ROWS = QuantizationConfig("int4", group_size=16, solver="absmax", rotate=True)
CROSS = QuantizationConfig("int3", group_size=40, symmetric=False, solver="minmax", rotate=True)
CHANNELS = QuantizationConfig("int4", per_channel=True, solver="absmax", rotate=True)
MSE = QuantizationConfig("int2", group_size=32, rotate=True)
CONFIGS = [
    pytest.param(ROWS, id="int4 groups by row"),
    pytest.param(CROSS, id="int3 groups cross rows"),
    pytest.param(CHANNELS, id="int4 channels"),
    pytest.param(MSE, id="int2 mse"),
]
BY_ROW = [CONFIGS[0], *CONFIGS[2:]]


def without(config: QuantizationConfig) -> QuantizationConfig:
    return QuantizationConfig(config.quant_type, config.per_channel, config.group_size, config.symmetric, config.solver)


def packed(w: np.ndarray, config: QuantizationConfig) -> QTensor:
    q = quantize(w, config)
    assert isinstance(q, QTensor)
    return q


@functools.cache
def made(config: QuantizationConfig, seed: int = 0, shape: tuple[int, ...] = (6, 96)) -> tuple[np.ndarray, QTensor]:
    """Normal weights whose rows differ in size, and what becomes of them: compiled once a config."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=shape) * np.geomspace(0.1, 2, shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
    w = w.astype(np.float32)
    return w, packed(w, config)


def dense(q: QTensor) -> np.ndarray:
    return np.asarray(dequantize(q), np.float64)


def change(found: object, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted))


# The matrix


@pytest.mark.parametrize("block", ROTATIONS)
def test_the_matrix_is_orthogonal_and_the_oracle_s(block: int) -> None:
    matrix = rotation_matrix(block)
    assert matrix.dtype == np.float32
    assert not matrix.flags.writeable
    assert np.allclose(matrix.astype(np.float64) @ matrix.T, np.eye(block), rtol=0, atol=1e-6)
    assert np.allclose(matrix.T, oracle.unrotate(np.eye(block), block), rtol=1e-7, atol=0)
    # All elements alike, which a Hadamard matrix without signs would gather in one.
    assert np.abs(np.ones(block) @ matrix).max() < 1.4143


@pytest.mark.parametrize("block", [2, 32, 128])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
def test_rotations_undo_each_other_in_numpy_and_jax(
    lead: tuple[int, ...], block: int, rng: np.random.Generator
) -> None:
    x = rng.normal(size=(*lead, 128)).astype(np.float32)
    cases: list[Any] = [(rotate, unrotate, jnp.asarray(x)), (rotate_rows, unrotate_rows, x)]
    for there, back, values in cases:
        turned = there(values, block)
        assert (turned.shape, turned.dtype) == (x.shape, np.float32)
        assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(x), rel=1e-6)
        assert change(back(turned, block), x) < 1e-6
        assert change(there(back(values, block), block), x) < 1e-6
        assert change(back(values, block), oracle.unrotate(x, block)) < 1e-6
    assert change(rotate(jnp.asarray(x), block), rotate_rows(x.astype(np.float64), block)) < 1e-6


# Quantizing


@pytest.mark.parametrize("config", CONFIGS)
def test_normal_weights_are_as_close_as_without(config: QuantizationConfig) -> None:
    w, q = made(config)
    assert (q.spec.rotation, q.spec.quant_type) == (32, config.quant_type + "h")
    codes = (oracle.codes_of(q), np.asarray(q.scale), np.asarray(q.zero_point), q.shape)
    grids = oracle.dequantize(*codes, bool(config.per_channel), config.group_size)
    assert change(dequantize(q), oracle.unrotate(grids, 32)) < 1e-6
    assert change(dequantize(q), w) < 1.1 * change(dequantize(quantize(w, without(config))), w)
    assert dequantize(q, dtype="bfloat16").dtype == jnp.bfloat16


def test_outliers_cost_much_less(rng: np.random.Generator) -> None:
    w = rng.normal(size=(6, 96)).astype(np.float32)
    w[:, [5, 77]] *= 30
    turned, plain = (dense(packed(w, config)) for config in (CHANNELS, without(CHANNELS)))
    assert change(turned, w) < 0.5 * change(plain, w)
    # Of the weights beside the outliers, nothing is left without rotation.
    rest = np.delete(np.arange(96), [5, 77])
    assert change(turned[:, rest], w[:, rest]) < 0.5 < 0.9 < change(plain[:, rest], w[:, rest])


def test_the_grid_is_that_of_the_rotated_weights() -> None:
    w, q = made(CROSS)
    codes, scales, zeros = oracle.quantize(rotate_rows(w, 32), 3, "minmax", group_size=40)
    assert np.allclose(np.ravel(q.scale), scales, rtol=1e-5, atol=0)
    assert np.allclose(np.ravel(q.zero_point), zeros, rtol=1e-4, atol=1e-4)
    assert (oracle.codes_of(q).ravel() != codes).mean() < 0.01


@pytest.mark.parametrize("config", CONFIGS)
def test_tiles_give_what_quantize_gives(config: QuantizationConfig) -> None:
    w, q = made(config)
    tiled = quantize_tree({"w": w}, config)["w"]
    assert jax.tree.structure(tiled) == jax.tree.structure(q)
    assert tiled.scale.shape == q.scale.shape
    if config.solver is None:  # rounds its scales, so that a tie may move one by a step
        assert change(dequantize(tiled), w) == pytest.approx(change(dequantize(q), w), rel=0.01)
        return
    # NumPy and JAX add in different orders: what lies between two levels may go to either.
    off = np.abs(oracle.codes_of(tiled) - oracle.codes_of(q))
    assert off.max() <= 1
    assert off.mean() < 0.01
    assert np.allclose(tiled.scale, q.scale, rtol=1e-5, atol=0)


def test_what_cannot_be_rotated_is_quantized_as_it_is(rng: np.random.Generator) -> None:
    w = rng.normal(size=(4, 5)).astype(np.float32)
    with pytest.warns(UserWarning, match="not rotated, as their last axis is odd: w"):
        tree = quantize_tree({"w": w}, ROWS)
    for q in (packed(w, ROWS), tree["w"]):
        assert (q.spec.rotation, q.spec.quant_type) == (0, "int4")
        assert np.array_equal(q.codes, packed(w, without(ROWS)).codes)
    assert [ROWS.spec_for(shape, "w").rotation for shape in ((), (3, 0), (3, 1))] == [0, 0, 0]
    assert [ROWS.spec_for((3, n), "w").rotation for n in (2, 6, 8, 384, 4096)] == [2, 2, 8, 128, 128]


@pytest.mark.parametrize("shape", [(0, 96), (3, 0), (96,), (2, 3, 96)], ids=str)
def test_other_shapes(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    w = rng.normal(size=shape).astype(np.float32)
    q = packed(w, CHANNELS if shape == (2, 3, 96) else ROWS)
    assert (q.shape, q.spec.rotation) == (shape, 32 if shape[-1] else 0)
    assert dequantize(q).shape == shape
    assert np.linalg.norm(dequantize(q) - w) <= 0.15 * np.linalg.norm(w)


def test_numbers_that_are_not_finite_are_named_where_they_were() -> None:
    w = np.random.default_rng(0).normal(size=(4, 96)).astype(np.float32)
    w[3, 77] = np.nan
    w[3, 80] = np.inf
    for call in (functools.partial(quantize, w, ROWS), functools.partial(quantize_tree, {"weight": w}, ROWS)):
        with pytest.raises(AqError, match=r"^weight: 2 of 384 values are not finite \(first at \[3, 77\]\)"):
            call()
    # A sum that no float32 holds, of numbers that are finite.
    large = np.full((4, 96), 3e38, np.float32)
    for call in (functools.partial(quantize, large, ROWS), functools.partial(quantize_tree, {"weight": large}, ROWS)):
        with pytest.raises(AqError, match=r"^weight: .*outside \[2\^-126, 2\^126\]"):
            call()


def test_types_without_a_grid_ignore_rotation(rng: np.random.Generator) -> None:
    config = QuantizationConfig("int4", group_size=16, solver="absmax", rotate=True, mixed_precision_layers=("half",))
    w = rng.normal(size=(6, 96)).astype(np.float32)
    tree = quantize_tree({"half": w, "turned": w, "bias": w[0]}, config)
    assert np.array_equal(tree["half"], w.astype(np.float16))
    assert tree["turned"].spec.rotation == 32
    assert tree["bias"] is not w
    assert np.array_equal(tree["bias"], w[0])
    for kind, wanted in (("fp16", w.astype(np.float16)), ("none", w)):
        found = quantize(w, QuantizationConfig(kind, rotate=True))
        assert isinstance(found, jax.Array)
        assert np.array_equal(found, wanted)


def test_fake_quant_sees_the_rotation() -> None:
    w, q = made(ROWS)
    value, grads = jax.value_and_grad(lambda w: (fake_quant(w, ROWS) ** 2).sum())(jnp.asarray(w))
    assert np.isclose(value, (dense(q) ** 2).sum(), rtol=1e-5)
    assert np.allclose(grads, 2 * dense(q), rtol=0, atol=1e-4)


# Using


@pytest.mark.parametrize("how", ACTIVATIONS)
@pytest.mark.parametrize("config", BY_ROW)
def test_qdot_is_the_dense_product(config: QuantizationConfig, how: Activations, rng: np.random.Generator) -> None:
    _, q = made(config)
    x = rng.normal(size=(2, 9, 96)).astype(np.float32)
    y = qdot(jnp.asarray(x), q, how)
    assert (y.shape, y.dtype) == ((2, 9, 6), jnp.float32)
    assert change(y, x.astype(np.float64) @ dense(q).T) < {"float32": 1e-6, "bfloat16": 5e-3, "int8": 1.5e-2}[how]


def test_qdot_of_other_x(rng: np.random.Generator) -> None:
    _, q = made(CROSS)
    x = rng.normal(size=(9, 96)).astype(np.float32)
    assert change(qdot(jnp.asarray(x), q), x @ dense(q).T) < 1e-6  # float32: integers cannot be had
    with pytest.raises(ValueError, match="grids that each lie in one row of W"):
        qdot(jnp.asarray(x), q, "int8")
    half = qdot(jnp.asarray(x[0], jnp.bfloat16), q, "float32")
    assert (half.shape, half.dtype) == ((6,), jnp.bfloat16)
    whole = jnp.arange(96) % 5 - 2
    assert np.array_equal(qdot(whole, q, "float32"), qdot(whole.astype(jnp.float32), q, "float32"))


def test_outliers_of_x_are_spread_too(rng: np.random.Generator) -> None:
    """Integers hold a rotated x better, which is the other half of what rotation is for."""
    _, q = made(ROWS)
    x = rng.normal(size=(32, 96)).astype(np.float32)
    x[:, 40] *= 100
    x[:, 41] = x[:, 40]
    wanted = x.astype(np.float64) @ dense(q).T
    plain = packed(np.asarray(dequantize(q)), QuantizationConfig("int8"))
    assert change(qdot(jnp.asarray(x), q, "int8"), wanted) < change(qdot(jnp.asarray(x), plain, "int8"), wanted)


@pytest.mark.parametrize("how", ACTIVATIONS)
def test_derivatives_are_those_of_the_dense_product(how: Activations, rng: np.random.Generator) -> None:
    _, q = made(ROWS)
    x, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((9, 96), (9, 6)))
    grads = jax.grad(lambda x: (qdot(x, q, how) * dy).sum())(x)
    assert change(grads, np.asarray(dy, np.float64) @ dense(q)) < 1e-5


@pytest.mark.parametrize("config", [ROWS, CROSS], ids=["by row", "groups cross rows"])
def test_qembed_is_rows_of_the_dense_table(config: QuantizationConfig) -> None:
    _, q = made(config)
    ids = jnp.array([[0, 5], [3, -1]])
    rows = qembed(q, ids)
    assert rows.shape == (2, 2, 96)
    assert change(rows, dense(q)[np.asarray(ids)]) < 1e-6
    assert np.isnan(qembed(q, jnp.array([6, -7]))).all()


@pytest.mark.parametrize("config", [ROWS, CROSS], ids=["by row", "groups cross rows"])
def test_vmap_jit_and_scan_change_nothing(config: QuantizationConfig, rng: np.random.Generator) -> None:
    layers = [made(config, seed)[1] for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    dot = functools.partial(qdot, activations="float32")
    x = jnp.asarray(rng.normal(size=(5, 96)), jnp.float32)
    y, values = np.stack([dot(x, q) for q in layers]), np.stack([dequantize(q) for q in layers])
    close = functools.partial(np.allclose, rtol=1e-5, atol=1e-5)
    assert close(jax.vmap(dequantize)(stacked), values)
    assert close(jax.vmap(dot, (None, 0))(x, stacked), y)
    assert close(jax.vmap(dot, (0, None))(x, layers[0]), y[0])
    assert close(jax.jit(dot)(x, layers[0]), y[0])
    assert close(lax.scan(lambda carry, q: (carry, dot(x, q)), None, stacked)[1], y)
    weights = jnp.stack([jnp.asarray(made(config, seed)[0]) for seed in range(3)])
    found = jax.vmap(lambda w: quantize(w, config))(weights)
    assert jax.tree.structure(found) == jax.tree.structure(stacked)
    assert change(jax.vmap(dequantize)(found), values) < 0.02
    abstract = jax.eval_shape(lambda w: quantize(w, config), weights[0])
    assert jax.tree.structure(abstract) == jax.tree.structure(layers[0])
