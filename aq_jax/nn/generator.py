"""A prompt to its continuation: one jitted scan over the tokens to come."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from numbers import Integral, Real
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from aq_jax.errors import AqError, ConfigError
from aq_jax.nn.compiled import Compiled, nbytes, padded_length, token_ids
from aq_jax.nn.models import LanguageModel
from aq_jax.nn.tokenizer import encoded

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Generator:
    """A language model with its tokenizer: `aq_jax.load_model` makes one.

    Args:
        model: a concrete one.
        tokenizer: of the model.
        ends: the ids that end a text.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, ends: tuple[int, ...] = ()) -> None:
        self.model, self.tokenizer, self.ends = model, tokenizer, ends
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._continue = Compiled(model, partial(continuation, ends=ends), ("steps",))
        self._score = Compiled(model, log_likelihoods)
        self._every = Compiled(model, log_probabilities)

    @property
    def compiles(self) -> int:
        """How many programs were compiled so far: one for each padded length of a prompt and of a continuation."""
        return self._continue.compiles + self._score.compiles + self._every.compiles

    @property
    def nbytes(self) -> int:
        """Bytes of the model's arrays in memory: weights as they are packed, or as kernels have prepared them."""
        return nbytes(self.model)

    def generate(
        self, prompt: str, max_tokens: int = 128, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> str:
        """The prompt's continuation, without the prompt.

        Args:
            prompt: any text. Of one that leaves none of the model's positions free, the first token, which tells the
                model where texts begin, and the end are kept, with a warning.
            max_tokens: of the continuation, which may end sooner, and does where the model has no more positions.
            temperature: 0 takes the likeliest token each time; 1 draws by the model's probabilities, less is more
                careful.
            top_p: draw among the likeliest tokens that have this probability together (arXiv:1904.09751).
            seed: of the draws: the same seed draws the same text.

        Raises:
            AqError: for a prompt that is no text.
            ConfigError: for what is no number, or out of its range, by name.
        """
        ids = self._ids(prompt, "generate: the prompt")
        new = self._following(ids, max_tokens, temperature, top_p, seed)
        before, whole = self.tokenizer.decode(ids), self.tokenizer.decode([*ids, *new])
        # Decoders drop a space that a text begins with: the continuation is what follows the decoded prompt. Only bytes
        # that are no UTF-8 change what stands before them.
        return whole.removeprefix(before) if whole.startswith(before) else self.tokenizer.decode(new)

    def generate_ids(
        self, ids: Sequence[int], max_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> list[int]:
        """As `generate`, from token ids to the token ids that follow, without the one that ends the text."""
        return self._following(ids, max_tokens, temperature, top_p, seed)

    def _following(self, ids: Sequence[int], max_tokens: int, temperature: float, top_p: float, seed: int) -> list[int]:
        """What both of them do, called by each of them directly: the warning names the line that called them."""
        limit = self.model.config.max_position_embeddings
        for name, value, kind, least, most, wanted in (
            ("max_tokens", max_tokens, Integral, 1, 2**31, "an integer, 1 or more"),
            ("temperature", temperature, Real, 0, 1e38, "a finite number, 0 or more"),
            ("top_p", top_p, Real, 1e-30, 1, "a number above 0, at most 1"),
            ("seed", seed, Integral, 0, 2**32 - 1, f"an integer from 0 to {2**32 - 1}"),
        ):
            if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
                raise ConfigError(f"generate: {name} = {value!r}; wanted {wanted}")
        ids = token_ids(ids, self.model.config.vocab_size, "generate").tolist()
        if not ids:
            raise AqError("generate: found no ids; wanted one or more, such as the one that begins a text")
        if len(ids) >= limit:
            kept = max(limit - max_tokens, limit // 2)
            note = f"the prompt has {len(ids)} tokens, of which the first and the last {kept - 1} are kept"
            warnings.warn(note, stacklevel=3)
            ids = [ids[0], *ids[len(ids) - kept + 1 :]]
        max_tokens = min(int(max_tokens), limit - len(ids))
        tokens = self._continue(
            _padded(ids, limit), np.int32(len(ids)), np.int32(max_tokens), np.float32(temperature), np.float32(top_p),
            jax.random.key(int(seed)), steps=padded_length(max_tokens, limit),
        )  # fmt: skip
        found = np.asarray(tokens).tolist()[:max_tokens]
        return found[: next((i for i, token in enumerate(found) if token in self.ends), len(found))]

    def score(self, text: str) -> Float[Array, "tokens"]:
        """The natural logarithm of the probability of each token of a text, the first excepted, given those before it.

        Raises:
            AqError: for what is no text, for fewer than two tokens, and for more than the model takes.
        """
        ids, limit = self._ids(text, "score: the text"), self.model.config.max_position_embeddings
        if not 1 < len(ids) <= limit:
            raise AqError(f"score: the text has {len(ids)} tokens; wanted 2 to {limit}")
        # Cut on the host: a slice of another length would be another program.
        return jax.device_put(np.asarray(self._score(_padded(ids, limit)))[: len(ids) - 1])

    def log_probabilities(self, ids: Sequence[int]) -> Float[np.ndarray, "following vocabulary"]:
        """The natural logarithm of the probability of every token, after each of these ids but the last.

        Raises:
            AqError: for ids that are no tokens of the model, for fewer than two, and for more than it takes.
        """
        limit = self.model.config.max_position_embeddings
        ids = token_ids(ids, self.model.config.vocab_size, "log_probabilities").tolist()
        if not 1 < len(ids) <= limit:
            raise AqError(f"log_probabilities: found {len(ids)} ids; wanted 2 to {limit}")
        return np.asarray(self._every(_padded(ids, limit)))[: len(ids) - 1]

    def _ids(self, text: str, what: str) -> list[int]:
        if not isinstance(text, str):
            raise AqError(f"{what} is {type(text).__name__}; wanted a string")
        return encoded(self.tokenizer, [text], self.model.config.vocab_size, what)[0].ids


def continuation(
    model: LanguageModel,
    ids: Int[Array, "1 tokens"],
    length: Int[Array, ""],
    count: Int[Array, ""],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    key: Key[Array, ""],
    *,
    steps: int,
    ends: tuple[int, ...],
) -> Int[Array, "steps"]:
    """The tokens that follow the first `length` of `ids`; after `count`, or an end, nothing is computed any more."""
    hidden, cache = model.extend(ids, model.empty_cache(1, ids.shape[1] + steps), 0)
    first = model.logits(lax.dynamic_index_in_dim(hidden[0], length - 1, keepdims=False))

    def draw(logits: Float[Array, "vocabulary"], step: Int[Array, ""]) -> Int[Array, ""]:
        return lax.cond(
            temperature > 0,
            lambda: sample(logits / jnp.maximum(temperature, 1e-6), top_p, jax.random.fold_in(key, step)),
            lambda: jnp.argmax(logits).astype(jnp.int32),
        )

    def advance(carry: tuple, step: Int[Array, ""]) -> tuple[tuple, Int[Array, ""]]:
        token, cache = carry
        # What the padding of the prompt left in the cache is overwritten before it is seen.
        hidden, cache = model.extend(token[None, None], cache, length + step - 1)
        token = draw(model.logits(hidden[0, 0]), step)
        return (token, cache), token

    def skip(carry: tuple, step: Int[Array, ""]) -> tuple[tuple, Int[Array, ""]]:
        return carry, carry[0]

    def body(carry: tuple, step: Int[Array, ""]) -> tuple[tuple, Int[Array, ""]]:
        over = (step >= count) | jnp.isin(carry[0], jnp.array(ends, jnp.int32))
        return lax.cond(over, skip, advance, carry, step)

    start = draw(first, jnp.int32(0))
    _, tokens = lax.scan(body, (start, cache), jnp.arange(1, steps, dtype=jnp.int32))
    return jnp.concatenate([start[None], tokens])


def sample(logits: Float[Array, "vocabulary"], top_p: Float[Array, ""], key: Key[Array, ""]) -> Int[Array, ""]:
    """Draw among the likeliest tokens that have the probability `top_p` together, the likeliest always among them."""
    order = jnp.argsort(-logits)
    share = jax.nn.softmax(logits[order])
    before = jnp.cumsum(share) - share
    drawn = jax.random.categorical(key, jnp.where(before < top_p, logits[order], -jnp.inf))
    return order[drawn].astype(jnp.int32)


def log_likelihoods(model: LanguageModel, ids: Int[Array, "1 tokens"]) -> Float[Array, "following"]:
    """log p(ids[i + 1] | ids[: i + 1])."""
    return jnp.take_along_axis(log_probabilities(model, ids), ids[0, 1:, None], axis=1)[:, 0]


def log_probabilities(model: LanguageModel, ids: Int[Array, "1 tokens"]) -> Float[Array, "following vocabulary"]:
    """log p(token | ids[: i + 1]), for every token of the vocabulary."""
    hidden, _ = model.extend(ids, model.empty_cache(1, ids.shape[1]), 0)
    return jax.nn.log_softmax(model.logits(hidden[0, :-1]))


def _padded(ids: Sequence[int], limit: int) -> Int[np.ndarray, "1 tokens"]:
    padded = np.zeros((1, padded_length(len(ids), limit)), np.int32)
    padded[0, : len(ids)] = ids
    return padded
