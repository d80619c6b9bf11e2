"""Building blocks of layers, beside linear layers, norms and attention: what follows a layer, rotary positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from aq_jax.nn.layers import QLinear
from aq_jax.ops import Epilogue

LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rope_cos_sin(
    positions: Int[Array, "tokens"], size: int, theta: float, scaling: Sequence[float] = ()
) -> tuple[Array, Array]:
    """Compute the cosines and sines, [tokens, 1, size / 2], that rotate the pairs (i, i + size / 2) of a head.

    Args:
        positions: The positions of the tokens.
        size: The size of a head.
        theta: The base of the frequencies: the slowest pair takes about 2 pi theta tokens for a turn.
        scaling: The numbers of the llama3 rule, in the order of `LLAMA3_SCALING`, or none.
    """
    half = size // 2
    speed = theta ** -(np.arange(half) / half)
    if scaling:  # slow pairs are slowed down further, so that more positions fit (Llama 3.1)
        factor, low, high, original = scaling
        turns = original * speed / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        speed = speed / factor * (1 - smooth) + speed * smooth
    angles = positions[:, None, None].astype(jnp.float32) * jnp.asarray(speed, jnp.float32)[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "batch tokens heads size"], rope: tuple[Array, Array]
) -> Float[Array, "batch tokens heads size"]:
    """Rotate the pairs (i, i + size / 2), which is the order of Hugging Face's weights."""
    cos, sin = rope[0][None], rope[1][None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def follow(layer: nnx.Linear | QLinear, x: Float[Array, "*batch inputs"], after: Epilogue) -> Array:
    """Compute a layer and what follows it; a quantized layer does it in one call."""
    return layer(x, after=after) if isinstance(layer, QLinear) else after.apply(layer(x))


def add_and_normalize(
    layer: nnx.Linear | QLinear,
    x: Float[Array, "*batch inputs"],
    residual: Float[Array, "*batch outputs"],
    norm: nnx.LayerNorm,
) -> Float[Array, "*batch outputs"]:
    """Compute norm(residual + layer(x)); a quantized layer does it in one call."""
    if not isinstance(layer, QLinear) or norm.scale is None or norm.bias is None:
        return norm(residual + layer(x))
    gain, shift = norm.scale.get_value(), norm.bias.get_value()
    return layer(x, after=Epilogue(residual=residual, gain=gain, shift=shift, epsilon=norm.epsilon))
