"""The native kernels of trellis codes: XLA's values bit for bit, NumPy's products, and nothing that is held twice."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import inputs_of

import aq_jax as aq
from aq_jax import native
from aq_jax.codes import CODES
from aq_jax.config import QuantSpec
from aq_jax.core.bitstream import from_stream
from aq_jax.core.prepared import to_qtensor
from aq_jax.ops import xla
from aq_jax.ops.native_panels import to_panels

STATUS = native.load()
pytestmark = [
    pytest.mark.skipif(not STATUS.available, reason=f"no native kernels: {STATUS.reason}"),
    pytest.mark.usefixtures("unforced"),
]
# Of each code: outputs of whole tiles and not, of no whole panels; streams of no whole bytes; inputs of no whole words.
SOME = [("tcq5", (300, 17)), ("tcq1.5", (290, 9))]
OTHERS = [("tcq4", (16, 5)), ("tcq3", (35, 50)), ("tcq2", (257, 24))]
CASES = [*SOME, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]
EPSILON = np.float32(2.0**-23)


def weight(kind: str, shape: tuple[int, int], rotation: int = 0) -> aq.QTensor:
    code, rng = CODES[kind], np.random.default_rng(shape[0])
    stream = rng.integers(0, 256, code.data_bytes(int(np.prod(shape)), shape), dtype=np.uint8)
    scales = rng.uniform(0.5, 1.5, shape[0]).astype(np.float32)
    return jax.device_put(from_stream(stream, scales, scales[:0], shape, QuantSpec(code.bits, True, 0, rotation, kind)))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_values_rows_and_products(kind: str, shape: tuple[int, int]) -> None:
    q, x = weight(kind, shape), inputs_of(7, shape[1])
    value = np.asarray(xla.decode_qtensor(q))
    np.testing.assert_array_equal(aq.dequantize(q, kernel="native"), value)
    w = aq.prepare(q)
    assert (w.kernel, w.weight) == ("native", None)
    found = aq.qembed(w, jnp.array([shape[0] - 1, 0, shape[0], 5]))
    np.testing.assert_array_equal(found[jnp.array([0, 1, 3])], value[[-1, 0, 5]])
    assert np.isnan(found[2]).all()
    exact = value.astype(np.float64)
    largest = np.abs(x).astype(np.float64) @ np.abs(exact).T
    np.testing.assert_array_less(np.abs(aq.qdot(x, w) - x @ exact.T), 4 * EPSILON * largest)
    codes, scale, offset = (np.asarray(part, np.float64) for part in jax.jit(xla.quantize_rows)(jnp.asarray(x)))
    largest = np.abs(scale * codes).max() * np.abs(exact).sum(1) + np.abs(offset * exact.sum(1))
    np.testing.assert_array_less(
        np.abs(aq.qdot(x, w, "int8") - (scale * codes + offset) @ exact.T), 4 * EPSILON * largest
    )


def test_codes_are_held_once_and_given_back_bit_for_bit() -> None:
    q = weight("tcq2", (300, 24), rotation=8)
    w = aq.prepare(q)
    assert w.nbytes < q.nbytes + 3 * 4 * 320
    again = to_qtensor(w)
    assert jax.tree.structure(again) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, again, q)
    traced = jax.jit(lambda q: to_panels(dataclasses.replace(q, spec=dataclasses.replace(q.spec, rotation=0))))(q)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3), traced, w.arrays)


def test_programs_for_others_have_no_call() -> None:
    q, x = aq.prepare(weight("tcq1.5", (290, 9))), jnp.asarray(inputs_of(3, 9))
    program = jax.jit(lambda x, q: aq.qdot(x, q) + aq.qembed(q, jnp.zeros(3, jnp.int32)).sum())
    assert "custom_call @aq_product" in program.lower(x, q).as_text()
    assert "custom_call @aq_rows" in program.lower(x, q).as_text()
    exported = jax.export.export(program)(x, q)
    assert "custom_call @aq_" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(x, q), program(x, q), rtol=1e-5, atol=1e-3)
