"""Train quantized weights: hold their codes as floats, which the forward pass rounds and the backward pass does not.

A weight is w = scale * (clip(round(u)) - zero_point), of which u, log(scale) and zero_point are trained. The gradient
with respect to u is that of u itself where it lies on the grid, and none where it is clipped (Y. Bengio et al.,
arXiv:1308.3432); scale and zero point have their own (S. Esser et al., arXiv:1902.08153), through their rounding to
the bits that are stored.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from aq_jax.codes import bits_jax
from aq_jax.codes.affine import code_range
from aq_jax.codes.rotation_jax import rotate, unrotate
from aq_jax.config import QuantSpec
from aq_jax.core.grid import SCALE_MAX, SCALE_MIN, round_mantissa
from aq_jax.core.qtensor import QTensor, assemble_qtensor
from aq_jax.quantizers.mse import STORED_MANTISSA

START_RADIUS = 0.4  # how far from its code a latent starts, at most: half a step is where the code changes
CLIP_MARGIN = 0.6  # how far beyond the outermost codes latents may go


class Latent(NamedTuple):
    """The trainable form of a matrix whose groups lie in rows.

    Args:
        codes: The codes as floats, in units of the grid's step; rotated, if the weight's spec says so.
        log_scale: The logarithm of each group's scale.
        zero_point: Each group's zero point; on a symmetric grid it is not trained.
    """

    codes: Float[Array, "rows inputs"]
    log_scale: Float[Array, "rows groups"]
    zero_point: Float[Array, "rows groups"]


@jax.jit
def init_latent(q: QTensor, w: Float[Array, "rows inputs"]) -> Latent:
    """Build the latent weight to start from: the float weight, clipped to where it has the quantized one's codes.

    The levels of the codes must be evenly spaced.

    >>> from aq_jax import QuantizationConfig, dequantize, quantize
    >>> w = jax.random.normal(jax.random.key(0), (4, 8))
    >>> q = quantize(w, QuantizationConfig("int2", group_size=8))
    >>> bool((latent_to_float(init_latent(q, w), q.spec) == dequantize(q)).all())
    True
    """
    codes = bits_jax.unpack_float(q.codes, q.spec.bits) if q.packed else q.codes.astype(jnp.float32)
    w = (rotate(w, q.spec.rotation) if q.spec.rotation else w).reshape(*q.scale.shape, -1)
    wanted = (w / q.scale[..., None] + q.zero_point[..., None]).reshape(codes.shape)
    # The scale of a group of zeros is 1, and a code that moved would be a weight like no other.
    scale = jnp.where((w == 0).all(-1), jnp.median(q.scale), q.scale)
    return Latent(jnp.clip(wanted, codes - START_RADIUS, codes + START_RADIUS), jnp.log(scale), q.zero_point)


@partial(jax.jit, static_argnames="spec")
def latent_to_float(weight: Latent, spec: QuantSpec) -> Float[Array, "rows inputs"]:
    """Compute the values that the codes stand for, with straight-through gradients."""
    scale, zero_point = _grid(weight)
    low, high = code_range(spec.bits)
    inside = (weight.codes > low - 0.5) & (weight.codes < high + 0.5)
    codes = _codes(weight, spec) + jnp.where(inside, weight.codes - lax.stop_gradient(weight.codes), 0.0)
    values = spec.coding.decode(codes.reshape(*scale.shape, -1), scale, zero_point).reshape(codes.shape)
    return unrotate(values, spec.rotation) if spec.rotation else values


def clip_latent(weight: Latent, spec: QuantSpec) -> Latent:
    """Clip latents that went too far to where a small step brings them back."""
    low, high = code_range(spec.bits)
    return weight._replace(codes=jnp.clip(weight.codes, low - CLIP_MARGIN, high + CLIP_MARGIN))


@partial(jax.jit, static_argnames="spec")
def latent_to_qtensor(weight: Latent, spec: QuantSpec) -> QTensor:
    """Build the quantized tensor that `latent_to_float` computes with."""
    scale, zero_point = _grid(weight)
    return assemble_qtensor(_codes(weight, spec).reshape(*scale.shape, -1), scale, zero_point, weight.codes.shape, spec)


def _grid(weight: Latent) -> tuple[Float[Array, "rows groups"], Float[Array, "rows groups"]]:
    return stored_scale(weight.log_scale), _round_as_stored(weight.zero_point)


def stored_scale(log_scale: Float[Array, "rows groups"]) -> Float[Array, "rows groups"]:
    """Compute scales within their bounds and rounded as they are stored, with straight-through gradients."""
    return _round_as_stored(jnp.clip(jnp.exp(log_scale), SCALE_MIN, SCALE_MAX))


def _round_as_stored(x: Array) -> Array:
    """Round to the bits that are stored, with straight-through gradients."""
    return x + lax.stop_gradient(round_mantissa(x, STORED_MANTISSA) - x)


def _codes(weight: Latent, spec: QuantSpec) -> Float[Array, "rows inputs"]:
    return jnp.clip(jnp.round(lax.stop_gradient(weight.codes)), *code_range(spec.bits))
