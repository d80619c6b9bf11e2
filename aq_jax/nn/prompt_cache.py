"""Keep what a model computed for a text, so that the next one that begins alike is read from where it differs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from aq_jax.errors import ConfigError

if TYPE_CHECKING:
    from aq_jax.nn.models import Cache, LanguageModel
    from aq_jax.ops import CacheType


class Known(NamedTuple):
    """A text that a model has read.

    Args:
        model: The model.
        kind: The type of the cache.
        ids: The ids of the text.
        first: The position at which it begins.
        cache: Its keys and values; what is behind it is another text's.
    """

    model: LanguageModel
    kind: CacheType
    ids: Sequence[int]
    first: int
    cache: Cache

    def shared(self, ids: Sequence[int]) -> int:
        """Count the ids with which another text begins alike."""
        pairs = zip(self.ids, ids, strict=False)
        return next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self.ids), len(ids)))


class PromptCache:
    """The keys and values of the last text that was generated with it.

    Given to each call of a chat, as `generate(messages=messages, prompt_cache=cache)`, it lets the model read only what
    is new. The answers are those that it gives without, but for what rounding decides: keys and values of tokens that
    were drawn one by one may differ in their last digits (or, of 8 bits, by a level) from those that are read together.

    >>> PromptCache().nbytes
    0
    """

    def __init__(self) -> None:
        self._known: Known | None = None

    @property
    def nbytes(self) -> int:
        """Count the bytes that it keeps in memory, or on the device."""
        return 0 if self._known is None else sum(each.nbytes for each in jax.tree.leaves(self._known.cache))

    def take(self, model: LanguageModel, kind: CacheType) -> Known | None:
        """Take out what is known, if its type is this one: programs write over it.

        Raises:
            ConfigError: if it is a text of another model.
        """
        if self._known is not None and self._known.model is not model:
            raise ConfigError("generate: prompt_cache holds a text of another model; wanted one cache for each model")
        known, self._known = self._known, None
        return known if known is not None and known.kind == kind else None

    def keep(self, known: Known) -> None:
        """Keep a text, unless a program that was interrupted has its memory, or Python ends."""
        if not sys.is_finalizing() and not any(each.is_deleted() for each in jax.tree.leaves(known.cache)):
            self._known = known


def grown(cache: Cache, positions: int) -> Cache:
    """Return a cache with room for so many positions, or more."""

    def grow(part: Array) -> Array:
        more = max(0, positions - part.shape[1]) if part.shape[1] else 0  # there may be no scales
        return jnp.pad(part, ((0, 0), (0, more), *((0, 0),) * (part.ndim - 2))) if more else part

    return jax.tree.map(grow, cache)
