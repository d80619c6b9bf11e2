"""Inputs that the native kernels round have the codes of XLA's programs, compiled as users have them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aq_jax import native
from aq_jax.ops import xla
from aq_jax.ops.native_calls import quantize_rows

STATUS = native.load()
pytestmark = [
    pytest.mark.skipif(not STATUS.available, reason=f"no native kernels: {STATUS.reason}"),
    pytest.mark.usefixtures("unforced", "isa"),
]


@pytest.mark.parametrize(("rows", "inputs"), [(7, 1), (1, 17), (33, 50), (7, 96)])
def test_inputs_have_the_codes_that_xla_gives_them(rows: int, inputs: int) -> None:
    rng = np.random.default_rng(rows)
    x = (rng.normal(size=(rows, inputs)) * rng.lognormal(size=(rows, 1)) + rng.normal()).astype(np.float32)
    x[0] = 3.0  # a range of one number
    x[rows // 2] = np.arange(inputs) * 0.25 - 3.75  # halfway between codes
    codes, scale, offset = quantize_rows(jnp.asarray(x))
    wanted = jax.jit(xla.quantize_rows)(jnp.asarray(x))
    np.testing.assert_array_equal(codes, wanted[0])
    np.testing.assert_array_equal(scale, wanted[1][:, 0])
    np.testing.assert_array_max_ulp(np.asarray(offset), np.asarray(wanted[2][:, 0]), 1)


def test_ties_have_the_codes_that_xla_gives_them() -> None:
    x = (np.random.default_rng(0).integers(0, 511, (64, 96)) * 0.185).astype(np.float32)
    wanted = jax.jit(xla.quantize_rows)(jnp.asarray(x))[0]
    np.testing.assert_array_equal(quantize_rows(jnp.asarray(x))[0], wanted)
