"""Native attention over a cache of keys and values: its numbers, what they depend on, and what it leaves to XLA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aq_jax import native
from aq_jax.ops import Cached, Scores, cached_attention, xla_attention
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


def floats(x: Any) -> Cached:
    return Cached(jnp.asarray(x), jnp.zeros((x.shape[0], 0, x.shape[2])))


def attend(query: Any, keys: Any, values: Any, at: Any, how: Scores = PLAIN, first: Any = None) -> np.ndarray:
    keys, values = (x if isinstance(x, Cached) else floats(x) for x in (keys, values))
    begin = None if first is None else jnp.asarray(first)
    return np.asarray(cached_attention(jnp.asarray(query), keys, values, jnp.asarray(at), jnp.float32, how, begin))


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
            def run(q: Any, k: Any, v: Any, at: Any) -> Any:
                return kernel.run(q, floats(k), floats(v), at, jnp.float32, PLAIN, jnp.array([0, 2]))

            return (jax.vmap(run, (0, 0, 0, dims))(*qkv, positions) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))

    for dims in (None, 0):
        found, wanted = (of(kernel, dims)(*several) for kernel in (CachedAttention(), xla_attention.CachedAttention()))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


def test_other_numbers_are_xlas() -> None:
    query, keys, *_ = map(jnp.asarray, numbers(1, 2, 4))
    refusal = "multiplies in float32 only, found bfloat16"
    assert CachedAttention().refuses(query, floats(keys), jnp.bfloat16) == refusal


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("reach", [None, 9])
def test_a_text_that_begins_later_is_what_it_is_alone(reach: int | None) -> None:
    query, keys, values, at = numbers(19, 60, 16)
    how, first = Scores(reach=reach), np.array([0, 45], np.int32)
    found = attend(query, keys, values, at, how=how, first=first)
    for text, begin in enumerate(first):
        one = [x[text : text + 1, begin:] for x in (keys, values)]
        own = at >= begin
        alone = attend(query[text : text + 1, own], *one, at[own] - begin, how=how)
        np.testing.assert_array_equal(found[text, own], alone[0])
    assert np.isfinite(found).all()  # of what is before a text, too


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("size", [20, 64])
def test_stored_numbers_are_what_they_stand_for(dtype: Any, size: int) -> None:
    query, keys, values, at = numbers(5, 40, size)
    stored = [Cached.empty(x.shape, dtype).put(jnp.asarray(x), jnp.int32(0)) for x in (keys, values)]
    decoded = [np.asarray(x.values()) for x in stored]
    first = np.array([3, 0], np.int32)
    found = attend(query, *stored, at, how=Scores(reach=30), first=first)
    wanted = attend(query, *decoded, at, how=Scores(reach=30), first=first)
    np.testing.assert_array_equal(found, wanted)
    exact = attend(query, keys, values, at, how=Scores(reach=30), first=first)
    assert 1e-4 < abs(found - exact).max() < 0.05
    by_xla = xla_attention.CachedAttention().run(
        jnp.asarray(query), *stored, jnp.asarray(at), jnp.float32, Scores(reach=30), jnp.asarray(first)
    )
    np.testing.assert_allclose(by_xla, wanted, rtol=0, atol=2e-6)
