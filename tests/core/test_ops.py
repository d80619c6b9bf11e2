"""Multiplying by a quantized weight and looking rows up in it, against dense float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aq_jax import QuantizationConfig, dequantize, qdot, qembed, quantize

CONFIGS = [
    pytest.param(QuantizationConfig(quant_type="int8"), id="int8 channels"),
    pytest.param(QuantizationConfig(quant_type="int8", per_channel=False), id="int8 tensor"),
    pytest.param(QuantizationConfig(quant_type="int2", group_size=16, solver="absmax"), id="int2 groups by row"),
    pytest.param(QuantizationConfig(quant_type="int4", group_size=24, solver="absmax"), id="int4 groups cross rows"),
    pytest.param(QuantizationConfig(quant_type="int3", group_size=100, symmetric=False, solver="minmax"),
                 id="int3 groups of more than a row"),
]  # fmt: skip


def dense(q: object) -> np.ndarray:
    return np.asarray(dequantize(q), np.float64)


@pytest.mark.parametrize("config", CONFIGS)
def test_qdot_is_the_dense_product(config: QuantizationConfig, weight: np.ndarray, rng: np.random.Generator) -> None:
    q = quantize(weight, config)
    x = rng.normal(size=(2, 3, 64)).astype(np.float32)
    y = qdot(jnp.asarray(x), q)
    assert (y.shape, y.dtype) == ((2, 3, 6), jnp.float32)
    # Summed in float32: the error is relative to the sum of magnitudes, not to the result.
    bound = 1e-6 * (np.abs(x).astype(np.float64) @ np.abs(dense(q)).T)
    assert (np.abs(y - x.astype(np.float64) @ dense(q).T) <= bound).all()


def test_qdot_of_one_vector_in_half_precision_has_its_dtype(weight: np.ndarray, rng: np.random.Generator) -> None:
    q = quantize(weight, "int8")
    x = jnp.asarray(rng.normal(size=64), jnp.bfloat16)
    y = qdot(x, q)
    assert (y.shape, y.dtype) == ((6,), jnp.bfloat16)
    # Only the result is rounded: the sum is not.
    assert np.allclose(np.asarray(y, np.float64), np.asarray(x, np.float64) @ dense(q).T, rtol=2**-8, atol=0)


def test_qdot_of_integers_is_float32(weight: np.ndarray) -> None:
    q = quantize(weight, "int8")
    x = jnp.arange(64) % 5 - 2
    y = qdot(x, q)
    assert y.dtype == jnp.float32
    assert jnp.array_equal(y, qdot(x.astype(jnp.float32), q))
    assert jnp.array_equal(qdot(x.astype(jnp.uint8) % 2, q), qdot(jnp.asarray(x % 2, jnp.float32), q))


@pytest.mark.parametrize("x_shape", [(63,), (64, 1)], ids=str)
def test_qdot_refuses_other_lengths(x_shape: tuple[int, ...], weight: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"qdot: x of shape .* and W of shape \[6, 64\]: wanted \[\.\.\., n\]"):
        qdot(jnp.ones(x_shape), quantize(weight, "int8"))


def test_qdot_and_qembed_refuse_other_than_two_axes(weight: np.ndarray) -> None:
    q = quantize(weight.reshape(2, 3, 64), "int8")
    with pytest.raises(ValueError, match=r"W of shape \[2, 3, 64\]"):
        qdot(jnp.ones(64), q)
    with pytest.raises(ValueError, match=r"qembed: table of shape \[2, 3, 64\]: wanted \[rows, width\]"):
        qembed(q, jnp.array(0))


def test_qdot_under_jit_vmap_and_grad(weight: np.ndarray, rng: np.random.Generator) -> None:
    q = quantize(weight, "int8")
    x = jnp.asarray(rng.normal(size=(3, 64)), jnp.float32)
    assert jnp.array_equal(jax.jit(qdot)(x, q), qdot(x, q))
    assert np.allclose(jax.vmap(qdot, in_axes=(0, None))(x, q), qdot(x, q), rtol=1e-5, atol=1e-5)
    experts = jax.tree.map(lambda *leaves: jnp.stack(leaves), q, quantize(-weight, "int8"))
    assert np.allclose(jax.vmap(qdot, in_axes=(None, 0))(x, experts)[1], -qdot(x, q), rtol=1e-5, atol=1e-5)
    assert np.allclose(jax.grad(lambda x: qdot(x, q).sum())(x), dense(q).sum(axis=0)[None], rtol=1e-5, atol=1e-5)


# Every kind of id in one list: ends, negative ones, and ones outside the table on both sides.
IDS = [0, 5, 2, -1, -6, 6, 7, 100, -7, -9, -100]
INSIDE = [-6 <= i < 6 for i in IDS]


@pytest.mark.parametrize("config", CONFIGS)
def test_qembed_takes_rows(config: QuantizationConfig, weight: np.ndarray) -> None:
    q = quantize(weight, config)
    rows = np.asarray(qembed(q, jnp.array(IDS)))
    assert (rows.shape, rows.dtype) == ((len(IDS), 64), np.float32)
    values = np.asarray(dequantize(q))
    for i, inside, row in zip(IDS, INSIDE, rows, strict=True):
        assert np.array_equal(row, values[i]) if inside else np.isnan(row).all(), i


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("shape", [(), (2, 2), (1, 3, 2)], ids=str)
def test_qembed_of_any_batch(config: QuantizationConfig, shape: tuple[int, ...], weight: np.ndarray) -> None:
    q = quantize(weight, config)
    ids = np.array([3, 9, -2, 0, -8, 5])[: int(np.prod(shape))].reshape(shape)
    rows = np.asarray(qembed(q, jnp.asarray(ids)))
    assert rows.shape == (*shape, 64)
    values = np.asarray(dequantize(q))
    for at in np.ndindex(*shape):
        inside = -6 <= ids[at] < 6
        assert np.array_equal(rows[at], values[ids[at]]) if inside else np.isnan(rows[at]).all(), at


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_qembed_takes_ids_of_any_integer_dtype(dtype: str, rng: np.random.Generator) -> None:
    # More rows than the smallest dtypes can count.
    table = quantize(rng.normal(size=(300, 8)).astype(np.float32), "int8")
    signed = dtype.startswith("int")
    ids = np.array([0, 7, 100, -1 if signed else 255], dtype)
    assert jnp.array_equal(qembed(table, jnp.asarray(ids)), dequantize(table)[ids.astype(int)])


def test_qembed_under_jit_and_vmap(weight: np.ndarray) -> None:
    q = quantize(weight, QuantizationConfig(quant_type="int4", group_size=24, solver="absmax"))
    ids = jnp.array([[1, 2], [5, -3]])
    assert jnp.array_equal(jax.jit(qembed)(q, ids), qembed(q, ids))
    assert jnp.array_equal(jax.vmap(qembed, in_axes=(None, 0))(q, ids), qembed(q, ids))
