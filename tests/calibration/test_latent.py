"""Latents begin at the quantized weight, round forwards, pass gradients backwards, and settle as what they were."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aq_jax import QTensor, QuantSpec, dequantize
from aq_jax.calibration.latent import (
    CLIP_MARGIN,
    START_RADIUS,
    Latent,
    clip_latent,
    init_latent,
    latent_to_float,
    latent_to_qtensor,
)
from aq_jax.codes.affine import code_range
from aq_jax.codes.rotation_jax import rotate
from aq_jax.quantizers.gptq import gptq
from aq_jax.quantizers.hessian import prepare_hessian

SPECS = [
    QuantSpec(2, group_size=16),
    QuantSpec(2, group_size=16, rotation=32),
    QuantSpec(3, group_size=32),
    QuantSpec(4, per_channel=True, rotation=16),
]
EACH = [SPECS[1], SPECS[2], *(pytest.param(spec, marks=pytest.mark.slow) for spec in (SPECS[0], SPECS[3]))]


def solved(spec: QuantSpec) -> tuple[jax.Array, QTensor]:
    w = jax.random.normal(jax.random.key(spec.bits), (6, 32))
    return w, gptq(w, prepare_hessian(jnp.eye(32)), spec, False, 1)


@pytest.mark.parametrize("spec", EACH)
def test_it_begins_and_ends_at_the_quantized_weight(spec: QuantSpec) -> None:
    w, q = solved(spec)
    weight = init_latent(q, w)
    np.testing.assert_allclose(latent_to_float(weight, spec), dequantize(q), atol=1e-6)
    again = latent_to_qtensor(weight, spec)
    for before, after in zip(jax.tree.leaves(q), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(before, after)
    # As near to the float weight as the code lets it be.
    there = rotate(w, spec.rotation) if spec.rotation else w
    wanted = np.asarray(there).reshape(*q.scale.shape, -1) / q.scale[..., None] + q.zero_point[..., None]
    assert np.abs(weight.codes - np.round(weight.codes)).max() <= START_RADIUS + 1e-6
    near = np.abs(wanted.reshape(6, 32) - np.round(weight.codes)) < START_RADIUS
    np.testing.assert_allclose(weight.codes[near], wanted.reshape(6, 32)[near], atol=1e-5)


@pytest.mark.parametrize("spec", EACH)
def test_what_is_stored_is_what_was_computed_with(spec: QuantSpec) -> None:
    _, q = solved(spec)
    rng = np.random.default_rng(0)
    low, high = code_range(spec.bits)
    weight = Latent(
        jnp.asarray(rng.uniform(low - CLIP_MARGIN, high + CLIP_MARGIN, (6, 32)), jnp.float32),
        jnp.asarray(rng.normal(size=q.scale.shape), jnp.float32),
        q.zero_point + jnp.asarray(rng.normal(size=q.scale.shape), jnp.float32),
    )
    np.testing.assert_allclose(
        latent_to_float(weight, spec), dequantize(latent_to_qtensor(weight, spec)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("spec", EACH)
def test_gradients_are_those_of_the_grid(spec: QuantSpec) -> None:
    """Of scale and zero point as by differences; of codes as if nothing were rounded, inside the grid only."""
    w, q = solved(spec)
    low, high = code_range(spec.bits)
    weight = init_latent(q, w)
    weight = weight._replace(codes=weight.codes.at[0, :2].set(jnp.array([low - 0.55, high + 0.55])))
    slope = jax.random.normal(jax.random.key(9), w.shape)
    gradient = jax.grad(lambda weight: jnp.vdot(latent_to_float(weight, spec), slope))(weight)
    turned = np.asarray(rotate(slope, spec.rotation) if spec.rotation else slope)
    size = 32 // q.scale.shape[1]
    grouped = turned.reshape(*q.scale.shape, size)
    wide = np.repeat(np.asarray(q.scale), size, axis=1)
    inside = (np.asarray(weight.codes) > low - 0.5) & (np.asarray(weight.codes) < high + 0.5)
    assert not inside[0, :2].any()
    np.testing.assert_allclose(gradient.codes, np.where(inside, turned * wide, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient.zero_point, -grouped.sum(-1) * q.scale, rtol=1e-4, atol=1e-4)
    rotated = np.asarray(
        rotate(latent_to_float(weight, spec), spec.rotation) if spec.rotation else latent_to_float(weight, spec)
    )
    by_scale = (rotated.reshape(grouped.shape) * grouped).sum(-1)  # d/d log(scale) of scale * (q - z)
    np.testing.assert_allclose(gradient.log_scale, by_scale, rtol=1e-3, atol=1e-4)


def test_a_latent_that_went_too_far_comes_back() -> None:
    spec = QuantSpec(2, group_size=4)
    weight = Latent(jnp.array([[-9.0, -2.3, 0.2, 9.0]]), jnp.zeros((1, 1)), jnp.zeros((1, 1)))
    np.testing.assert_allclose(clip_latent(weight, spec).codes, [[-2 - CLIP_MARGIN, -2.3, 0.2, 1 + CLIP_MARGIN]])


def test_a_group_of_zeros_stays_zero_and_has_a_scale_like_the_others() -> None:
    spec = SPECS[0]
    w = solved(spec)[0].at[2, :16].set(0.0)
    q = gptq(w, prepare_hessian(jnp.eye(32)), spec, False, 0)
    weight = init_latent(q, w)
    assert q.scale[2, 0] == 1
    np.testing.assert_allclose(jnp.exp(weight.log_scale[2, 0]), jnp.median(q.scale), rtol=1e-6)
    assert not np.asarray(latent_to_float(weight, spec)[2, :16]).any()
    np.testing.assert_allclose(latent_to_float(weight, spec), dequantize(q), atol=1e-6)
