"""Codes that number levels: the nearest level is chosen, and float8 is what ml_dtypes says."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import aq_jax as aq
from aq_jax.codes import CODES, Levels

NAMES = ("nf4", "fp4", "f8_e4m3")


@pytest.mark.parametrize("name", NAMES)
def test_the_nearest_level_is_chosen(name: str, rng: np.random.Generator) -> None:
    code = CODES[name]
    assert isinstance(code, Levels)
    levels = np.float32([level for level in code.table if level == level])
    assert {-1, 0, 1} < set(levels.tolist())
    w = rng.normal(size=(4, 96)).astype(np.float32)
    w[1, :32] = 0
    w[2, :32] = -3
    q = aq.quantize(w, aq.QuantizationConfig(name, group_size=32))
    groups, found = w.reshape(-1, 32), np.asarray(aq.dequantize(q)).reshape(-1, 32)
    scale = np.abs(groups).max(1, keepdims=True) / np.float32(code.max_level)
    scale[scale == 0] = 1
    scale[6] = 3
    nearest = levels[np.abs(groups[..., None] / scale[..., None] - levels).argmin(-1)] * scale
    np.testing.assert_allclose(found, nearest, rtol=1e-5, atol=1e-6)
    assert (found[[3, 6]] == groups[[3, 6]]).all()


def test_float8_is_that_of_ml_dtypes() -> None:
    code = CODES["f8_e4m3"]
    codes = np.arange(-128, 128).astype(np.int8)
    found = code.decode(codes.astype(np.float32)[None], np.ones(1, np.float32), None)[0]
    np.testing.assert_array_equal(found, codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert code.max_level == 448
