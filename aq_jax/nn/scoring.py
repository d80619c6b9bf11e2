"""Score texts with a language model: the log-probabilities of their tokens, or of all tokens at each place."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from aq_jax.errors import AqError
from aq_jax.nn.compiled import BoundProgram, check_token_ids, padded_length
from aq_jax.nn.models import LanguageModel
from aq_jax.ops import CacheType, check_cache_type


class Scoring:
    """The programs that score texts with a model.

    Args:
        model: A model with its weights.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._vocabulary, self._limit = model.config.vocab_size, model.config.max_position_embeddings
        self._likelihoods = BoundProgram(model, log_likelihoods)
        self._probabilities = BoundProgram(model, log_probabilities, ("cache",))

    @property
    def compiles(self) -> int:
        """Count the programs compiled so far."""
        return self._likelihoods.compiles + self._probabilities.compiles

    def likelihoods(self, ids: Sequence[int]) -> Float[Array, "following"]:
        """Compute what `Generator.score` returns, of a text's ids.

        Raises:
            AqError: for fewer than two, and for more than the model takes.
        """
        if not 1 < len(ids) <= self._limit:
            raise AqError(f"score: the text has {len(ids)} tokens; wanted 2 to {self._limit}")
        # Cut on the host: on the device, each length would be another program.
        return jax.device_put(np.asarray(self._likelihoods(self._pad(ids)))[: len(ids) - 1])

    def probabilities(self, ids: Sequence[int], cache: CacheType) -> Float[np.ndarray, "following vocabulary"]:
        """Compute what `Generator.log_probabilities` returns.

        Raises:
            AqError: for ids outside the vocabulary, for fewer than two, and for more than the model takes.
            ConfigError: for another type of cache.
        """
        check_cache_type(cache)
        ids = check_token_ids(ids, self._vocabulary, "log_probabilities").tolist()
        if not 1 < len(ids) <= self._limit:
            raise AqError(f"log_probabilities: found {len(ids)} ids; wanted 2 to {self._limit}")
        return np.asarray(self._probabilities(self._pad(ids), cache=cache))[: len(ids) - 1]

    def _pad(self, ids: Sequence[int]) -> Int[np.ndarray, "1 tokens"]:
        padded = np.zeros((1, padded_length(len(ids), self._limit)), np.int32)
        padded[0, : len(ids)] = ids
        return padded


def log_likelihoods(model: LanguageModel, ids: Int[Array, "1 tokens"]) -> Float[Array, "following"]:
    """Compute log p(ids[i + 1] | ids[: i + 1])."""
    return jnp.take_along_axis(log_probabilities(model, ids), ids[0, 1:, None], axis=1)[:, 0]


def log_probabilities(
    model: LanguageModel, ids: Int[Array, "1 tokens"], *, cache: CacheType = "float32"
) -> Float[Array, "following vocabulary"]:
    """Compute log p(token | ids[: i + 1]) for every token of the vocabulary."""
    hidden, _ = model.extend(ids, model.empty_cache(1, ids.shape[1], cache), 0)
    return jax.nn.log_softmax(model.logits(hidden[0, :-1]))
