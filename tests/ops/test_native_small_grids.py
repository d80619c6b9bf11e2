"""The native kernels of small grids: XLA's values bit for bit, NumPy's products, and panels that are no larger."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import inputs_of
from jax import export

import aq_jax as aq
from aq_jax import native
from aq_jax.codes import CODES
from aq_jax.codes.records import Records
from aq_jax.codes.small_grids import PlainGrids
from aq_jax.config import QuantSpec
from aq_jax.core.bitstream import from_stream
from aq_jax.core.prepared import to_qtensor
from aq_jax.core.qtensor import QTensor
from aq_jax.ops import xla
from aq_jax.store import DTYPES

STATUS = native.load()
pytestmark = [
    pytest.mark.skipif(not STATUS.available, reason=f"no native kernels: {STATUS.reason}"),
    pytest.mark.usefixtures("unforced"),
]
# (code, shape, elements of a group, rows of inputs): either half, zero points of a byte, whole rows, groups whose codes
# get more bits, and records; few rows and many.
SOME = [
    ("int4_f16m", (35, 96), 32, 7),
    ("int4_f16i", (35, 96), 32, 7),
    ("int4_bf16a", (35, 96), 32, 7),
    ("int2_f16p", (35, 128), 32, 7),
    ("q3_k", (19, 512), 16, 1),
]
OTHERS = [
    ("int4_f32", (35, 96), 32, 7),
    ("int2_bf16p", (20, 96), 24, 7),
    ("int2_f32p", (17, 512), 32, 1),
    ("int3_f32i", (20, 64), 16, 7),
    ("int8_f16a", (17, 50), 50, 1),
    ("int5_bf16a", (40, 64), 32, 1),
    ("int3_bf16z", (20, 64), 16, 7),
    ("int8_f16", (17, 50), 50, 7),
    ("int8_bf16m", (40, 96), 16, 1),
    ("int5_f16m", (40, 64), 32, 1),
    ("int4_f16u", (40, 64), 32, 7),
    ("int8_bf16u", (17, 50), 50, 1),
    ("int8_bf16i", (17, 50), 50, 1),
    ("int3_bf16i", (20, 64), 16, 7),
    ("int6_bf16", (5, 60), 20, 7),
    ("q2_k", (33, 256), 16, 1),
    ("q2_k", (33, 256), 16, 7),
    ("q3_k", (19, 512), 16, 7),
    ("q4_k", (35, 768), 32, 7),
    ("q5_k", (16, 256), 32, 1),
    ("q6_k", (40, 512), 16, 7),
]
CASES = [*SOME, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]
EPSILON = np.float32(2.0**-23)


def weight(kind: str, shape: tuple[int, int], size: int) -> QTensor:
    """Any codes, and grids of any signs, of subnormal halves, and of zeros."""
    code, rng = CODES[kind], np.random.default_rng(shape[0])
    stream = rng.integers(0, 256, code.data_bytes(int(np.prod(shape)), shape), dtype=np.uint8)
    elements = code.grid_count(int(np.prod(shape)) // size)

    def grids() -> np.ndarray:
        if isinstance(code, Records):
            found = rng.integers(0, 256, (elements // code.grid_block[1], code.grid_block[1]), dtype=np.uint8)
            found[:, 1] &= 0xB3  # less than 1/4
            return found.reshape(-1)
        return (rng.normal(size=elements) * rng.choice([0, 1, 2.0**-18], elements)).astype(DTYPES[code.grid_dtype])

    scale, zeros = grids(), grids() if code.zero_points else np.empty(0, DTYPES[code.zero_dtype])
    if code.zero_dtype == "int8":
        zeros = rng.integers(-128, 128, elements, dtype=np.int8)
    if isinstance(code, PlainGrids) and code.packs_zeros:
        zeros = rng.integers(0, 256, code.zero_count(elements), dtype=np.uint8)
    spec = QuantSpec(code.bits, size == shape[1], 0 if size == shape[1] else size, 0, kind)
    return jax.device_put(from_stream(stream, scale, zeros, shape, spec))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("kind", "shape", "size", "rows"), CASES)
def test_values_rows_and_products(kind: str, shape: tuple[int, int], size: int, rows: int) -> None:
    q = weight(kind, shape, size)
    value = np.asarray(xla.decode_qtensor(q))
    assert np.asarray(aq.dequantize(q, kernel="native")).tobytes() == value.tobytes()
    w = aq.prepare(q)
    assert (w.kernel, w.weight) == ("native", None)
    found = np.asarray(aq.qembed(w, jnp.array([shape[0] - 1, 0, shape[0], 2])))
    assert found[[0, 1, 3]].tobytes() == value[[-1, 0, 2]].tobytes()
    assert np.isnan(found[2]).all()
    exact = value.astype(np.float64)
    grids = q.spec.coding.float_grids(q.scale, q.zero_point)
    grids = [np.float32(0) if grid is None else np.asarray(grid) for grid in grids]
    terms = np.abs(grids[0]) * 2.0**q.spec.bits + np.abs(grids[0] * grids[1]) + np.abs(grids[2])
    terms = np.repeat(terms, size, axis=-1).reshape(shape)
    x = inputs_of(rows, shape[1])
    largest = np.abs(x).astype(np.float64) @ terms.T
    np.testing.assert_array_less(np.abs(aq.qdot(x, w) - x @ exact.T), 4 * EPSILON * largest + 1e-30)
    codes, step, offset = (np.asarray(part, np.float64) for part in jax.jit(xla.quantize_rows)(jnp.asarray(x)))
    largest = (np.abs(step * codes) + np.abs(offset)) @ terms.T
    for each in (w, q) if kind == "int4_f16m" else (w,):  # and XLA's, which takes long to compile
        away = np.abs(aq.qdot(x, each, "int8") - (step * codes + offset) @ exact.T)
        np.testing.assert_array_less(away, 4 * EPSILON * largest + 1e-30)


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize(("kind", "shape", "size"), [("q6_k", (90, 256), 16), ("tcq3", (290, 24), 24)])
def test_a_rows_result_depends_on_no_other_row(kind: str, shape: tuple[int, int], size: int, activations: Any) -> None:
    """With trellis codes, too."""
    w, x = aq.prepare(weight(kind, shape, size)), inputs_of(70, shape[1])
    assert w.kernel == "native"
    all_of_them = np.asarray(aq.qdot(x, w, activations))
    for some in (slice(0, 1), slice(7, 9), slice(40, 61)):
        np.testing.assert_array_equal(aq.qdot(x[some], w, activations), all_of_them[some])


@pytest.mark.parametrize(("kind", "shape", "size", "rows"), [*CASES[:4], *CASES[5:]])
def test_panels_give_the_weight_back_bit_for_bit(kind: str, shape: tuple[int, int], size: int, rows: int) -> None:
    q = weight(kind, shape, size)
    for back in (jax.jit(to_qtensor)(aq.prepare(q)), jax.jit(lambda q: to_qtensor(aq.prepare(q)))(q)):
        assert jax.tree.structure(back) == jax.tree.structure(q)
        for ours, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(q), strict=True):
            assert (ours.dtype, ours.shape) == (wanted.dtype, wanted.shape)
            assert np.asarray(ours).tobytes() == np.asarray(wanted).tobytes()


@pytest.mark.parametrize(("kind", "size"), [("int4_f16m", 32), ("int8_f16", 32), ("q2_k", 16), ("q6_k", 16)])
def test_panels_are_no_larger_than_what_was_read(kind: str, size: int) -> None:
    q = weight(kind, (48, 512), size)
    assert aq.prepare(q).nbytes == q.nbytes + 8 * 48


def test_products_are_mapped_differentiated_cast_and_exported() -> None:
    q, x = weight("int4_f16m", (20, 64), 32), jnp.asarray(inputs_of(4, 64)).reshape(2, 2, 64)
    w = aq.prepare(q)
    y = aq.qdot(x, w)
    np.testing.assert_array_equal(jax.vmap(lambda x: aq.qdot(x, w))(x), y)

    def loss(x: Any, scale: Any, kernel: str) -> Any:
        w = dataclasses.replace(q, scale=scale)
        return (aq.qdot(x, w, kernel=kernel) ** 2).mean() / 100

    for ours, wanted in zip(*(jax.grad(loss, (0, 1))(x, q.scale, kernel) for kernel in ("native", "xla")), strict=True):
        a, b = (np.asarray(slope, np.float32) for slope in (ours, wanted))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max())
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float16 else leaf, w)
    np.testing.assert_allclose(aq.qdot(x, cast), y, rtol=0, atol=0.02 * np.abs(y).max())
    exported = export.export(jax.jit(aq.qdot))(x, q)
    assert "aq_product" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(x, q), y, rtol=0, atol=1e-6 * np.abs(y).max())


def test_levels_of_a_table_are_xlas() -> None:
    code = CODES["nf4"]
    q = QTensor(np.zeros((4, 32), np.uint8), np.ones((4, 1), np.float32), None, QuantSpec(4, True, 0, 0, "nf4"), 64)
    assert (code.integral, aq.prepare(q).kernel) == (False, "xla")
    with pytest.raises(aq.ConfigError, match=r"^product: kernel 'native': has trellis codes"):
        aq.prepare(q, kernel="native")
