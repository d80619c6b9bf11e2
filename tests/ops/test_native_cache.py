"""Native attention over a cache of keys and values: its numbers, what they depend on, and what it leaves to XLA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aq_jax import native
from aq_jax.ops import Scores, cached_attention, xla_attention
from aq_jax.ops.native import CachedAttention
from aq_jax.ops.scores import PLAIN

STATUS = native.load()
pytestmark = [
    pytest.mark.skipif(not STATUS.available, reason=f"no native kernels: {STATUS.reason}"),
    pytest.mark.usefixtures("unforced"),
]


def numbers(tokens: int, positions: int, size: int, shared: int = 2) -> tuple[np.ndarray, ...]:
    """Make queries of `shared` heads for each of two heads of keys and values, for two texts."""
    rng = np.random.default_rng(tokens)
    query = rng.normal(size=(2, tokens, 2 * shared, size)).astype(np.float32)
    keys, values = rng.normal(size=(2, 2, positions, 2, size)).astype(np.float32)
    return query, keys, values, np.arange(positions - tokens - 1, positions - 1, dtype=np.int32)


def attend(*args: np.ndarray, how: Scores = PLAIN) -> np.ndarray:
    return np.asarray(cached_attention(*map(jnp.asarray, args), jnp.float32, how))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("how", [Scores(), Scores(scale=0.5, cap=1.5, reach=6)], ids=["plain", "bounded"])
@pytest.mark.parametrize(("tokens", "positions", "size", "shared"), [(1, 2, 4, 1), (1, 70, 64, 4), (19, 40, 20, 3)])
def test_it_is_that_of_float64(tokens: int, positions: int, size: int, shared: int, how: Scores) -> None:
    query, keys, values, at = numbers(tokens, positions, size, shared)
    q = query.astype(np.float64).reshape(2, tokens, 2, shared, size)
    scores = np.einsum("btgsd,bpgd->bgstp", q, keys) * (how.scale or 1 / np.sqrt(size))
    weights = np.exp(how.cap * np.tanh(scores / how.cap) if how.cap else scores)
    distance = at[:, None] - np.arange(positions)
    weights *= (distance >= 0) & (distance <= (positions if how.reach is None else how.reach))
    wanted = np.einsum("bgstp,bpgd->btgsd", weights / weights.sum(-1, keepdims=True), values)
    np.testing.assert_allclose(attend(query, keys, values, at, how=how), wanted.reshape(query.shape), rtol=0, atol=2e-6)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("reach", [None, 9])
def test_a_token_depends_on_no_other_and_not_on_what_follows_it(reach: int | None) -> None:
    query, keys, values, at = numbers(19, 60, 16)
    how = Scores(reach=reach)
    whole = attend(query, keys, values, at, how=how)
    for t in (0, 7, 18):
        seen = at[t] + 1
        one = attend(query[:, t : t + 1], keys[:, :seen], values[:, :seen], at[t : t + 1], how=how)
        np.testing.assert_array_equal(one[:, 0], whole[:, t])
    keys[:, at[-1] + 1 :], values[:, at[-1] + 1 :] = np.nan, np.nan  # nobody has written there yet
    np.testing.assert_array_equal(attend(query, keys, values, at, how=how), whole)


def test_it_maps_and_differentiates_as_xlas() -> None:
    query, keys, values, at = map(jnp.asarray, numbers(5, 9, 8))
    several = [jnp.stack([x, x[::-1]]) for x in (query, keys, values)]

    def of(kernel: Any, dims: int | None) -> Callable[..., Any]:
        positions = at if dims is None else jnp.stack([at, at - 1])

        def loss(*qkv: Any) -> Any:
            run = jax.vmap(lambda *each: kernel.run(*each, jnp.float32), (0, 0, 0, dims))
            return (run(*qkv, positions) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))

    for dims in (None, 0):
        found, wanted = (of(kernel, dims)(*several) for kernel in (CachedAttention(), xla_attention.CachedAttention()))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


def test_other_numbers_are_xlas() -> None:
    query, keys, *_ = map(jnp.asarray, numbers(1, 2, 4))
    refusal = "multiplies in float32 only, found bfloat16"
    assert CachedAttention().refuses(query, keys, jnp.bfloat16) == refusal
