"""QTensors and Qwix's QArrays stand for the same values."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aq_jax as aq
from aq_jax.codes import CODES
from aq_jax.config import QuantizationConfig, QuantSpec
from aq_jax.converters.qarrays import from_qarray, to_qarray
from aq_jax.core.bitstream import from_stream
from aq_jax.store import DTYPES


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize(
    "config",
    [
        QuantizationConfig("int8"),
        QuantizationConfig("int4", group_size=16),
        QuantizationConfig("int2", group_size=16),  # half a level
        QuantizationConfig("int3", group_size=32, solver="absmax"),
    ],
    ids=lambda config: config.quant_type,
)
def test_values_are_the_same_there_and_back(config: QuantizationConfig, layout: Any, rng: np.random.Generator) -> None:
    qwix = pytest.importorskip("qwix")
    w = jnp.asarray(rng.normal(size=(6, 32)), jnp.float32)
    q = aq.quantize(w, config)
    array = to_qarray(q, layout)
    found = qwix.dequantize(array)
    np.testing.assert_array_equal(found if layout == "out_in" else found.T, aq.dequantize(q))
    np.testing.assert_array_equal(aq.dequantize(from_qarray(array, layout)), aq.dequantize(q))
    if layout == "in_out":  # as it is served
        x = jnp.asarray(rng.normal(size=(3, 32)), jnp.float32)
        np.testing.assert_allclose(qwix.dot(x, array), aq.qdot(x, q), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int4_f16", "int8_bf16i", "int4_f32", "int2_f32i"])
def test_weights_as_other_programs_scale_them_have_a_qarray(kind: str, rng: np.random.Generator) -> None:
    qwix = pytest.importorskip("qwix")
    code = CODES[kind]
    scale = rng.normal(size=12).astype(DTYPES[code.grid_dtype])
    zeros = rng.integers(-9, 9, 12).astype(np.int8) if code.zero_points else np.empty(0, scale.dtype)
    stream = rng.integers(0, 256, 6 * 32 * code.bits // 8).astype(np.uint8)
    q = from_stream(stream, scale, zeros, (6, 32), QuantSpec(code.bits, False, 16, code=kind))
    np.testing.assert_array_equal(qwix.dequantize(to_qarray(jax.device_put(q))), aq.dequantize(q))


@pytest.mark.slow
def test_qarrays_of_qwix_become_qtensors(rng: np.random.Generator) -> None:
    qwix = pytest.importorskip("qwix")
    w = jnp.asarray(rng.normal(size=(32, 6)), jnp.float32)
    for kind, tiles in (("int8", {}), ("int4", {0: 16})):
        array = qwix.quantize(w, kind, channelwise_axes=(1,), tiled_axes=tiles)
        q = from_qarray(array, "in_out")
        assert (q.shape, q.spec.bits) == ((6, 32), int(kind[3:]))
        np.testing.assert_array_equal(aq.dequantize(q).T, qwix.dequantize(array))


def test_what_has_no_qarray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    q = aq.quantize(np.ones((2, 8), np.float32), "int8")
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(aq.ConfigError, match="needs Qwix"):
        to_qarray(q)
    monkeypatch.setitem(sys.modules, "qwix", type("Qwix", (), {"QArray": tuple}))  # type: ignore[arg-type]
    with pytest.raises(aq.ConfigError, match="layout = 'rows': wanted out_in or in_out"):
        to_qarray(q, "rows")  # type: ignore[arg-type]
    with pytest.raises(aq.AqError, match="got ArrayImpl; wanted a QArray"):
        from_qarray(jnp.ones((2, 8)))
    levels = aq.quantize(np.ones((2, 8), np.float32), QuantizationConfig("nf4", group_size=8))
    with pytest.raises(aq.AqError, match="wanted evenly spaced levels"):
        to_qarray(levels)
    uneven = np.arange(16, dtype=np.float32).reshape(2, 8) ** 2
    asymmetric = aq.quantize(uneven, QuantizationConfig("int4", group_size=8, symmetric=False, solver="minmax"))
    with pytest.raises(aq.AqError, match="no small integers"):
        to_qarray(asymmetric)
