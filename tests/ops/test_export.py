"""Functions that are exported for any number of rows, with QTensors among their arguments, through their bytes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from aq_jax import QTensor, QuantizationConfig, dequantize, qdot, qembed, quantize
from aq_jax.core.dispatch import ACTIVATIONS

KINDS = {
    "channels": QuantizationConfig("int8", solver="absmax"),
    "4 bits": QuantizationConfig("int4", group_size=32, symmetric=False, solver="minmax"),
    "3 bits": QuantizationConfig("int3", group_size=32, symmetric=False, solver="minmax"),
    "2 bits": QuantizationConfig("int2", group_size=32, symmetric=False, solver="minmax"),
    "rotated": QuantizationConfig("int4", group_size=32, symmetric=False, solver="minmax", rotate=True),
}


def products(x: jax.Array, ids: jax.Array, weights: dict[str, QTensor]) -> dict[str, Any]:
    found = {f"{kind}, {how}": qdot(x, w, how) for kind, w in weights.items() for how in ACTIVATIONS}
    return found | {f"{kind}, rows": qembed(w, ids) for kind, w in weights.items()}


@pytest.fixture(scope="module")
def weights() -> dict[str, QTensor]:
    w = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    return {kind: quantize(w, config) for kind, config in KINDS.items()}  # type: ignore[misc]


@pytest.fixture(scope="module")
def exported(weights: dict[str, QTensor]) -> export.Exported:
    """One program of all kinds."""
    (rows,) = export.symbolic_shape("rows")
    x, ids = jax.ShapeDtypeStruct((rows, 2, 64), np.float32), jax.ShapeDtypeStruct((rows,), np.int32)
    return export.export(jax.jit(products))(x, ids, jax.eval_shape(lambda: weights))


@pytest.mark.parametrize("rows", [1, pytest.param(9, marks=pytest.mark.slow)])
def test_any_number_of_rows_is_multiplied_as_directly(
    rows: int, exported: export.Exported, weights: dict[str, QTensor], rng: np.random.Generator
) -> None:
    x, ids = rng.normal(size=(rows, 2, 64)).astype(np.float32), rng.integers(-6, 6, rows).astype(np.int32)
    found = exported.call(x, ids, weights)
    for kind, w in weights.items():
        values = np.asarray(dequantize(w))
        np.testing.assert_allclose(found[f"{kind}, float32"], x @ values.T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found[f"{kind}, bfloat16"], x @ values.T, rtol=0.02, atol=0.1)
        np.testing.assert_array_equal(found[f"{kind}, rows"], qembed(w, jnp.asarray(ids)))
        # Sums of integers: the rows that fill up a small batch are in none.
        np.testing.assert_allclose(found[f"{kind}, int8"], qdot(x, w, "int8"), rtol=1e-5, atol=1e-5)


def test_a_qtensor_is_an_argument_of_what_is_read_from_bytes(
    exported: export.Exported, weights: dict[str, QTensor], rng: np.random.Generator
) -> None:
    pytest.importorskip("flatbuffers")
    again = export.deserialize(exported.serialize())
    assert again.in_tree == exported.in_tree
    x, ids = rng.normal(size=(3, 2, 64)).astype(np.float32), np.array([5, 0, 2], np.int32)
    found, wanted = again.call(x, ids, weights), exported.call(x, ids, weights)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_qtensor_is_a_result_of_what_is_read_from_bytes(rng: np.random.Generator) -> None:
    pytest.importorskip("flatbuffers")
    w = rng.normal(size=(4, 32)).astype(np.float32)
    whole = export.export(jax.jit(lambda w: quantize(w, KINDS["2 bits"])))(w)
    found, wanted = export.deserialize(whole.serialize()).call(w), quantize(w, KINDS["2 bits"])
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
