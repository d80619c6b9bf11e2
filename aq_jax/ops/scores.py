"""Describe how an attention turns products of queries and keys into scores, and which keys a token sees."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True)
class Scores:
    """cap * tanh(scale * q k / cap), for keys that are at most `reach` positions away.

    Args:
        scale: The factor of products; None for 1 / sqrt(size).
        cap: The bound of scores; 0 for none.
        reach: The largest distance of a key that a token sees; None for any.
    """

    scale: float | None = None
    cap: float = 0.0
    reach: int | None = None

    def factor(self, size: int) -> float:
        """Return the factor of products, for heads of this size."""
        return size**-0.5 if self.scale is None else self.scale

    def bound(self, scores: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Bound scores smoothly, if there is a cap.

        >>> Scores(cap=2.0).bound(jnp.array([0.0, 1e3])).tolist()
        [0.0, 2.0]
        """
        return self.cap * jnp.tanh(scores / self.cap) if self.cap else scores

    def near(self, queries: Int[Array, "tokens"], keys: Int[Array, "keys"]) -> Bool[Array, "tokens keys"]:
        """Tell which keys are near enough, by the positions of both.

        >>> Scores(reach=1).near(jnp.array([2]), jnp.arange(5)).tolist()
        [[False, True, True, True, False]]
        """
        distance = jnp.abs(queries[:, None] - keys[None])
        return distance <= (jnp.iinfo(jnp.int32).max if self.reach is None else self.reach)


PLAIN = Scores()
