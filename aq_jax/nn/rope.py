"""Rotary positions (arXiv:2104.09864), and the rules that stretch them over more positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from aq_jax.config.fields import Fields

TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class Rope:
    """The rotation of each pair (i, i + n / 2) of a head's first n numbers.

    Args:
        speeds: The angle of each pair from one position to the next.
        factor: The factor of the turned numbers.
    """

    speeds: tuple[float, ...]
    factor: float = 1.0

    def cos_sin(self, positions: Int[Array, "*batch"]) -> tuple[Array, Array]:
        """Compute the cosines and sines, [*batch, 1, n / 2], of all heads of tokens at these positions."""
        speeds = jnp.asarray(self.speeds, jnp.float32)
        angles = positions[..., None, None].astype(jnp.float32) * speeds.reshape((1,) * (positions.ndim + 1) + (-1,))
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return (cos, sin) if self.factor == 1 else (self.factor * cos, self.factor * sin)


def apply_rope(
    x: Float[Array, "batch tokens heads size"], rope: tuple[Array, Array]
) -> Float[Array, "batch tokens heads size"]:
    """Turn the pairs (i, i + n / 2), which is the order of Hugging Face's weights; what follows the n stays."""
    cos, sin = (part if part.ndim == 4 else part[None] for part in rope)
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1)


def read_rope(said: Mapping[str, Any], where: str, theta: float, size: int, positions: int) -> Rope:
    """Read `rope_parameters`, or `rope_scaling`, of transformers 4 or 5.

    Args:
        said: Its fields.
        where: The file's name, and the field's, for errors.
        theta: The base of the frequencies, unless it says another: the slowest pair takes about 2 pi theta positions
            for a turn.
        size: How many numbers of a head are turned.
        positions: The number of the model's positions.

    Raises:
        FormatError: for other rules, and for numbers that are missing or no numbers.

    >>> read_rope({"type": "linear", "factor": 2}, "config.json: rope_scaling", 100.0, 4, 64)
    Rope(speeds=(0.5, 0.05), factor=1.0)
    """
    fields = Fields(said, where)
    theta = fields.take("rope_theta", float, theta)
    kind = fields.choose("rope_type", TYPES, fields.choose("type", TYPES, "default"))
    speed, scale = theta ** -(np.arange(size // 2) / (size // 2)), 1.0
    match kind:
        case "linear":
            speed = speed / fields.take("factor", float)
        case "dynamic":
            # Nothing changes up to the model's positions, and longer texts are not taken.
            fields.take("factor", float)
            fields.leave("original_max_position_embeddings")
        case "llama3":
            speed = _llama3(fields, speed, positions)
        case "yarn":
            speed, scale = _yarn(fields, speed, theta, positions)
        case _:  # transformers leaves these there
            fields.leave("factor", "original_max_position_embeddings")
    fields.finish()
    return Rope(tuple(map(float, speed)), scale)


def _llama3(fields: Fields, speed: np.ndarray, positions: int) -> np.ndarray:
    """Slow slow pairs down by a factor, those of many turns not at all, and the others in between (Llama 3.1)."""
    factor, low, high = (fields.take(name, float) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = fields.take("original_max_position_embeddings", int, positions) * speed / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return speed / factor * (1 - smooth) + speed * smooth


def _yarn(fields: Fields, speed: np.ndarray, theta: float, positions: int) -> tuple[np.ndarray, float]:
    """Slow pairs down in a ramp over them, and return the factor of cosines and sines (arXiv:2309.00071)."""
    original = fields.take("original_max_position_embeddings", int, positions)
    factor = fields.take("factor", float, positions / original)
    fast, slow = fields.take("beta_fast", float, 32.0), fields.take("beta_slow", float, 1.0)
    over, under = fields.take("mscale", float, None), fields.take("mscale_all_dim", float, None)
    size = 2 * len(speed)
    first, last = (size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow))
    if fields.take("truncate", bool, True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    ramp = np.clip((np.arange(len(speed)) - first) / (last - first or 0.001), 0, 1)

    def strength(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    usual = strength(over) / strength(under) if over and under else strength(1.0)
    return speed / factor * ramp + speed * (1 - ramp), fields.take("attention_factor", float, usual)
