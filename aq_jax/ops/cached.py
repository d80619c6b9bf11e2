"""Keep the keys or the values of the tokens so far, in float32, bfloat16, or 8 bits with a scale a head and token."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from aq_jax.errors import ConfigError

CacheType = Literal["float32", "bfloat16", "int8"]
LEVELS = 127  # on each side of zero


class Cached(NamedTuple):
    """Keys or values of tokens, by position.

    Args:
        numbers: The numbers: float32, the bits of bfloat16 (XLA would compute a whole cache anew to write a token of
            bfloat16 into it), or int8 codes.
        scale: The scales of codes: code * scale ~ number. Of other numbers there are none.

    >>> cache = Cached.empty((1, 2, 1, 4), "int8").put(jnp.array([[[[0.0, 1.0, 2.0, -4.0]]]]), jnp.int32(1))
    >>> cache.numbers[0, :, 0].tolist(), cache.values()[0, 1, 0].round(2).tolist()
    ([[0, 0, 0, 0], [0, 32, 64, -127]], [0.0, 1.0099999904632568, 2.0199999809265137, -4.0])
    """

    numbers: Num[Array, "batch positions heads size"]
    scale: Float[Array, "batch scales heads"]

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], dtype: CacheType = "float32") -> Cached:
        """Allocate a cache of a shape [batch, positions, heads, size]."""
        batch, positions, heads, _ = shape
        scales = positions if dtype == "int8" else 0
        stored = jnp.uint16 if dtype == "bfloat16" else dtype
        return cls(jnp.zeros(shape, stored), jnp.zeros((batch, scales, heads), jnp.float32))

    def put(self, x: Float[Array, "batch tokens heads size"], at: Int[Array, ""]) -> Cached:
        """Write tokens from a position on; they must fit: compiled code refuses nothing, and would write earlier."""
        put = jax.lax.dynamic_update_slice_in_dim
        if self.numbers.dtype == jnp.uint16:
            bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
            return Cached(put(self.numbers, bits, at, axis=1), self.scale)
        if self.numbers.dtype == jnp.float32:
            return Cached(put(self.numbers, x, at, axis=1), self.scale)
        scale = jnp.abs(x).max(-1) * np.float32(1 / LEVELS)
        codes = jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None]).astype(jnp.int8)
        return Cached(put(self.numbers, codes, at, axis=1), put(self.scale, scale, at, axis=1))

    def values(self) -> Float[Array, "batch positions heads size"]:
        """Return the numbers in float32."""
        if self.numbers.dtype == jnp.uint16:
            return jax.lax.bitcast_convert_type(self.numbers, jnp.bfloat16).astype(jnp.float32)
        found = self.numbers.astype(jnp.float32)
        return found * self.scale[..., None] if self.numbers.dtype == jnp.int8 else found


def check_cache_type(cache: str) -> None:
    """Check the name of a type of caches.

    Raises:
        ConfigError: for another.
    """
    if cache not in get_args(CacheType):
        raise ConfigError(f"cache = {cache!r}; wanted one of {', '.join(get_args(CacheType))}")
