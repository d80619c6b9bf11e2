"""Choose the next token: the likeliest, or one that is drawn, by transformers' definitions and in their order.

A repetition penalty comes first, then temperature, top-k, top-p and min-p. No step sorts the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from aq_jax.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """The way in which tokens are chosen; by default the likeliest one each time.

    Args:
        temperature: 0 takes the likeliest token; 1 draws by the model's probabilities, less is more careful.
        top_k: The number of likeliest tokens to draw from; 0 for all.
        top_p: The probability that the likeliest tokens to draw from have together (arXiv:1904.09751).
        min_p: The least probability of a token to draw, as a part of the likeliest one's (arXiv:2407.01082).
        repetition_penalty: What scores of tokens that were there before are divided by, or multiplied with if they are
            negative (arXiv:1909.05858).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def check(self, where: str) -> Sampling:
        """Check all numbers, and return self.

        Raises:
            ConfigError: for one that is no number, or out of its range, by name.

        >>> Sampling(top_p=2).check("generate")
        Traceback (most recent call last):
        aq_jax.errors.ConfigError: generate: top_p = 2; wanted a number above 0, at most 1
        """
        for field in fields(self):
            check_number(field.name, getattr(self, field.name), where)
        return self

    def numbers(self) -> Float[np.ndarray, "settings"]:
        """Return the numbers in the order of the fields, as `draw` takes them."""
        return np.array([getattr(self, field.name) for field in fields(self)], np.float32)


RANGES: dict[str, tuple[type, float, float, str]] = {
    "max_tokens": (Integral, 1, 2**31, "an integer, 1 or more"),
    "seed": (Integral, 0, 2**32 - 1, f"an integer from 0 to {2**32 - 1}"),
    "temperature": (Real, 0, 1e38, "a finite number, 0 or more"),
    "top_k": (Integral, 0, 2**24, f"an integer from 0, for all tokens, to {2**24}"),
    "top_p": (Real, 1e-30, 1, "a number above 0, at most 1"),
    "min_p": (Real, 0, 1, "a number from 0 to 1"),
    "repetition_penalty": (Real, 1e-30, 1e30, "a finite number above 0"),
}


def check_number(name: str, value: Any, where: str) -> None:
    """Check a number by its name.

    Raises:
        ConfigError: if it is no number, or out of its range.
    """
    kind, least, most, wanted = RANGES[name]
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
        raise ConfigError(f"{where}: {name} = {repr(value)[:80]}; wanted {wanted}")


def draw(
    logits: Float[Array, "batch vocabulary"],
    seen: Bool[Array, "batch vocabulary"],
    numbers: Float[Array, "settings"],
    seed: UInt32[Array, ""],
    step: Int[Array, ""],
) -> Int[Array, "batch"]:
    """Choose a token of each row; rows draw with one seed, so that each draws what it would draw alone.

    Args:
        logits: The scores of the tokens.
        seen: Which tokens were there before.
        numbers: The numbers of a `Sampling`.
        seed: The seed of the text.
        step: The number of the token, which has a key of its own.
    """
    temperature, *_, penalty = numbers
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)

    def sample() -> Int[Array, "batch"]:
        left = filter_logits(logits, numbers)
        key = jax.random.fold_in(jax.random.key(seed), step)
        return jnp.argmax(left + jax.random.gumbel(key, (1, logits.shape[-1]), jnp.float32), axis=-1)

    found = lax.cond(temperature > 0, sample, lambda: jnp.argmax(logits, axis=-1))
    return found.astype(jnp.int32)


def filter_logits(
    logits: Float[Array, "batch vocabulary"], numbers: Float[Array, "settings"]
) -> Float[Array, "batch vocabulary"]:
    """Divide scores by the temperature, and make those of tokens that are not drawn minus infinity."""
    temperature, top_k, top_p, min_p, _ = numbers
    logits = logits / jnp.maximum(temperature, 1e-6)
    order = _ordered(logits)
    least = jnp.where(top_k > 0, _threshold(order, jnp.ones_like(logits), top_k), 0)
    logits = jnp.where(order >= least, logits, -jnp.inf)
    shares = jax.nn.softmax(logits, axis=-1)
    # A sum of all shares may be a little less than 1, or reach it before the last one.
    least = jnp.where(top_p < 1, _threshold(order, shares, top_p), 0)
    logits = jnp.where(order >= least, logits, -jnp.inf)
    return jnp.where(jnp.exp(logits - logits.max(-1, keepdims=True)) >= min_p, logits, -jnp.inf)


def _ordered(x: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Turn floats into integers of the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))


def _threshold(
    order: UInt32[Array, "batch vocabulary"], weights: Float[Array, "batch vocabulary"], bound: Float[Array, ""]
) -> UInt32[Array, "batch 1"]:
    """Find the largest number such that those of it and above weigh the bound together; 0 if there is none.

    It is found bit by bit: a sort of a large vocabulary takes longer than many models take for a token.
    """

    def narrow(i: Int[Array, ""], found: UInt32[Array, "batch 1"]) -> UInt32[Array, "batch 1"]:
        higher = found | (np.uint32(1 << 31) >> jnp.asarray(i, jnp.uint32))  # a number, where nothing is compiled
        weight = jnp.where(order >= higher, weights, 0).sum(-1, keepdims=True)
        return jnp.where(weight >= bound, higher, found)

    return lax.fori_loop(np.int32(0), np.int32(32), narrow, jnp.zeros((order.shape[0], 1), jnp.uint32))
