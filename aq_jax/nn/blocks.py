"""What the layers of models are made of, beside linear layers, norms and attention: rotary positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rotations(
    positions: Int[Array, "tokens"], size: int, theta: float, scaling: Sequence[float] = ()
) -> tuple[Array, Array]:
    """Cosines and sines, [tokens, 1, size / 2], by which the pairs (i, i + size / 2) of a head are turned.

    Args:
        positions: of the tokens.
        size: of a head.
        theta: the slowest pair takes about 2 pi theta tokens for a turn.
        scaling: the numbers of the llama3 rule, in the order of `LLAMA3`, or none.
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


def rotate(
    x: Float[Array, "batch tokens heads size"], rope: tuple[Array, Array]
) -> Float[Array, "batch tokens heads size"]:
    """Turn the pairs (i, i + size / 2), as Hugging Face's weights have them."""
    cos, sin = rope[0][None], rope[1][None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
