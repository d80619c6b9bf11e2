"""Values for codes: `dequantize` and `assemble`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from aq_jax import QTensor, QuantSpec, dequantize
from aq_jax.core.qtensor import assemble_qtensor, scale_shape, to_groups

CASES = [
    pytest.param((4, 8), {"group_size": 4}, id="groups by row"),
    pytest.param((4, 8), {"group_size": 12}, id="groups cross rows, the last is short"),
    pytest.param((3, 5), {"group_size": 4}, id="rows are no whole bytes"),
    pytest.param((4, 8), {"per_channel": True}, id="channels"),
    pytest.param((3, 2, 8), {"per_channel": True}, id="channels of two axes"),
    pytest.param((4, 8), {}, id="tensor"),
    pytest.param((2, 3), {"group_size": 128}, id="a group larger than the tensor"),
    pytest.param((1, 1), {"group_size": 1}, id="one element"),
    pytest.param((0, 8), {"group_size": 4}, id="no rows"),
    pytest.param((7,), {"group_size": 3}, id="one axis"),
]


def made(shape: tuple[int, ...], spec: QuantSpec, rng: np.random.Generator) -> tuple[np.ndarray, QTensor]:
    """Random codes, and the QTensor that holds them."""
    qmin, qmax = oracle.code_range(spec.bits)
    codes = rng.integers(qmin, qmax + 1, shape)
    grids = scale_shape(shape, spec)
    scale = rng.uniform(0.1, 2, grids).astype(np.float32)
    zero_point = rng.uniform(-2, 2, grids).astype(np.float32)

    @jax.jit  # one program, where operations one by one would be a dozen
    def of(codes: jax.Array, scale: jax.Array, zero_point: jax.Array) -> QTensor:
        grouped = jnp.zeros((*grids, 1)) if not codes.size else to_groups(codes, spec)[0]
        return assemble_qtensor(grouped, scale, zero_point, shape, spec)

    return codes, of(codes.astype(np.float32), scale, zero_point)


@pytest.mark.parametrize("bits", [8, 3, 2])
@pytest.mark.parametrize(("shape", "granularity"), CASES)
def test_dequantize_is_the_oracle(
    shape: tuple[int, ...], granularity: dict[str, int], bits: int, rng: np.random.Generator
) -> None:
    codes, q = made(shape, QuantSpec(bits, **granularity), rng)
    assert q.shape == shape
    assert np.array_equal(oracle.codes_of(q), codes)
    values = jax.jit(dequantize)(q)
    assert values.dtype == jnp.float32
    wanted = oracle.dequantize(codes, np.asarray(q.scale), np.asarray(q.zero_point), shape, **granularity)
    assert np.array_equal(values, wanted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_dtype_rounds_at_the_end(dtype: str, rng: np.random.Generator) -> None:
    _, q = made((4, 8), QuantSpec(4, group_size=4), rng)
    values = dequantize(q, dtype=dtype)
    assert values.dtype == jnp.dtype(dtype)
    assert np.array_equal(values, dequantize(q).astype(dtype))


def test_jit_and_vmap_change_nothing(rng: np.random.Generator) -> None:
    _, q = made((3, 8), QuantSpec(2, group_size=12), rng)
    assert np.array_equal(jax.jit(dequantize)(q), dequantize(q))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), q, q)
    assert np.array_equal(jax.vmap(dequantize)(stacked), jnp.stack([dequantize(q)] * 2))


def test_gradients_reach_scales(rng: np.random.Generator) -> None:
    codes, q = made((2, 8), QuantSpec(4, group_size=8), rng)
    grads = jax.grad(lambda scale: dequantize(QTensor(q.codes, scale, q.zero_point, q.spec, q.length)).sum())(q.scale)
    assert np.allclose(grads, (codes - np.asarray(q.zero_point)).sum(axis=1, keepdims=True), rtol=1e-6)
