"""Quantized weights that can be trained: codes held as floats, rounded on the way forward and not on the way back.

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

from aq_jax.codes import bits_jax, check_even
from aq_jax.codes.affine import code_range
from aq_jax.codes.rotation_jax import rotate, unrotate
from aq_jax.config import QuantSpec
from aq_jax.core.grid import SCALE_MAX, SCALE_MIN, round_mantissa
from aq_jax.core.qtensor import QTensor
from aq_jax.core.quantize import assemble
from aq_jax.quantizers.mse import STORED_MANTISSA

START = 0.4  # how far from its code a latent begins, at most: half a step is where the code changes
BEYOND = 0.6  # how far beyond the outer codes latents may go


class Latent(NamedTuple):
    """A matrix whose groups lie in rows, as it is trained.

    Args:
        codes: as floats, on the grid's own scale; rotated, if the weight's spec says so.
        log_scale: of each group.
        zero_point: of each group; of a symmetric grid it is not trained.
    """

    codes: Float[Array, "rows inputs"]
    log_scale: Float[Array, "rows groups"]
    zero_point: Float[Array, "rows groups"]


@jax.jit
def latent(q: QTensor, w: Float[Array, "rows inputs"]) -> Latent:
    """Where training begins: at a float weight as far as that has the codes of its quantized one.

    Raises:
        ConfigError: for codes whose levels are not evenly spaced.

    >>> from aq_jax import QuantizationConfig, dequantize, quantize
    >>> w = jax.random.normal(jax.random.key(0), (4, 8))
    >>> q = quantize(w, QuantizationConfig("int2", group_size=8))
    >>> bool((value(latent(q, w), q.spec) == dequantize(q)).all())
    True
    """
    check_even(q.spec.coding, "training")
    codes = bits_jax.unpack_float(q.codes, q.spec.bits) if q.packed else q.codes.astype(jnp.float32)
    w = (rotate(w, q.spec.rotation) if q.spec.rotation else w).reshape(*q.scale.shape, -1)
    wanted = (w / q.scale[..., None] + q.zero_point[..., None]).reshape(codes.shape)
    # The scale of a group of zeros is 1, and a code that moved would be a weight like no other.
    scale = jnp.where((w == 0).all(-1), jnp.median(q.scale), q.scale)
    return Latent(jnp.clip(wanted, codes - START, codes + START), jnp.log(scale), q.zero_point)


@partial(jax.jit, static_argnames="spec")
def value(of: Latent, spec: QuantSpec) -> Float[Array, "rows inputs"]:
    """What the codes stand for, with straight-through gradients."""
    scale, zero_point = _grid(of)
    low, high = code_range(spec.bits)
    inside = (of.codes > low - 0.5) & (of.codes < high + 0.5)
    codes = _codes(of, spec) + jnp.where(inside, of.codes - lax.stop_gradient(of.codes), 0.0)
    values = spec.coding.decode(codes.reshape(*scale.shape, -1), scale, zero_point).reshape(codes.shape)
    return unrotate(values, spec.rotation) if spec.rotation else values


def bounded(of: Latent, spec: QuantSpec) -> Latent:
    """Latents that have gone too far are put where a small step brings them back."""
    low, high = code_range(spec.bits)
    return of._replace(codes=jnp.clip(of.codes, low - BEYOND, high + BEYOND))


@partial(jax.jit, static_argnames="spec")
def settled(of: Latent, spec: QuantSpec) -> QTensor:
    """The quantized tensor that `value` computes with."""
    scale, zero_point = _grid(of)
    return assemble(_codes(of, spec).reshape(*scale.shape, -1), scale, zero_point, of.codes.shape, spec)


def _grid(of: Latent) -> tuple[Float[Array, "rows groups"], Float[Array, "rows groups"]]:
    scale = jnp.clip(jnp.exp(of.log_scale), SCALE_MIN, SCALE_MAX)
    return _stored(scale), _stored(of.zero_point)


def _stored(x: Array) -> Array:
    """Rounded to the bits that are stored; not so on the way back."""
    return x + lax.stop_gradient(round_mantissa(x, STORED_MANTISSA) - x)


def _codes(of: Latent, spec: QuantSpec) -> Float[Array, "rows inputs"]:
    return jnp.clip(jnp.round(lax.stop_gradient(of.codes)), *code_range(spec.bits))
