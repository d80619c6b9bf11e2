"""Generate the continuation of a prompt: one jitted scan over the new tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from numbers import Integral, Real
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from aq_jax.errors import AqError, ConfigError
from aq_jax.nn.compiled import BoundProgram, check_token_ids, nbytes, padded_length
from aq_jax.nn.models import LanguageModel
from aq_jax.nn.tokenizer import tokenize_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Generator:
    """A language model with its tokenizer, as `aq_jax.load_model` returns it.

    Args:
        model: A model with its weights.
        tokenizer: The model's tokenizer.
        eos_ids: The ids that end a text.
    """

    about: ClassVar = "a language model"

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, eos_ids: tuple[int, ...] = ()) -> None:
        self.model, self.tokenizer, self.eos_ids = model, tokenizer, eos_ids
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._continue = BoundProgram(model, partial(decode_tokens, eos_ids=eos_ids), ("steps",))
        self._score = BoundProgram(model, log_likelihoods)
        self._log_probabilities = BoundProgram(model, log_probabilities)

    @property
    def compiles(self) -> int:
        """Count the programs compiled so far: one for each padded length of a prompt and of a continuation."""
        return self._continue.compiles + self._score.compiles + self._log_probabilities.compiles

    @property
    def nbytes(self) -> int:
        """Count the bytes of the model's arrays in memory: weights as they are packed, or as kernels prepared them."""
        return nbytes(self.model)

    def generate(
        self, prompt: str, max_tokens: int = 128, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> str:
        """Generate the prompt's continuation, without the prompt.

        Args:
            prompt: Any text. If it leaves none of the model's positions free, only its first token, which tells the
                model where texts begin, and its end are kept, with a warning.
            max_tokens: The most tokens of the continuation, which also ends where the model has no more positions.
            temperature: 0 takes the likeliest token each time; 1 draws by the model's probabilities, less is more
                careful.
            top_p: The probability that the likeliest tokens to draw from have together (arXiv:1904.09751).
            seed: The random seed: the same seed draws the same text.

        Raises:
            AqError: for a prompt that is no string.
            ConfigError: for an argument that is no number, or out of its range, by name.
        """
        ids = self._tokenize(prompt, "generate: the prompt")
        new = self._generate_ids(ids, max_tokens, temperature, top_p, seed)
        before, whole = self.tokenizer.decode(ids), self.tokenizer.decode([*ids, *new])
        # Decoders drop a text's leading space: so the continuation is the part after the decoded prompt. Only bytes
        # that are not UTF-8 change the text before them.
        return whole.removeprefix(before) if whole.startswith(before) else self.tokenizer.decode(new)

    def generate_ids(
        self, ids: Sequence[int], max_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> list[int]:
        """Generate as `generate`, from token ids to the ids that follow, without the one that ends the text."""
        return self._generate_ids(ids, max_tokens, temperature, top_p, seed)

    def _generate_ids(
        self, ids: Sequence[int], max_tokens: int, temperature: float, top_p: float, seed: int
    ) -> list[int]:
        """Do the work of both; each calls it directly, so that the warning names the line that called them."""
        limit = self.model.config.max_position_embeddings
        for name, value, kind, least, most, wanted in (
            ("max_tokens", max_tokens, Integral, 1, 2**31, "an integer, 1 or more"),
            ("temperature", temperature, Real, 0, 1e38, "a finite number, 0 or more"),
            ("top_p", top_p, Real, 1e-30, 1, "a number above 0, at most 1"),
            ("seed", seed, Integral, 0, 2**32 - 1, f"an integer from 0 to {2**32 - 1}"),
        ):
            if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
                raise ConfigError(f"generate: {name} = {value!r}; wanted {wanted}")
        ids = check_token_ids(ids, self.model.config.vocab_size, "generate").tolist()
        if not ids:
            raise AqError("generate: found no ids; wanted one or more, such as the one that begins a text")
        if len(ids) >= limit:
            kept = max(limit - max_tokens, limit // 2)
            note = f"the prompt has {len(ids)} tokens, of which the first and the last {kept - 1} are kept"
            warnings.warn(note, stacklevel=3)
            ids = [ids[0], *ids[len(ids) - kept + 1 :]]
        max_tokens = min(int(max_tokens), limit - len(ids))
        tokens = self._continue(
            _pad_prompt(ids, limit), np.int32(len(ids)), np.int32(max_tokens), np.float32(temperature),
            np.float32(top_p), jax.random.key(int(seed)), steps=padded_length(max_tokens, limit),
        )  # fmt: skip
        found = np.asarray(tokens).tolist()[:max_tokens]
        return found[: next((i for i, token in enumerate(found) if token in self.eos_ids), len(found))]

    def score(self, text: str) -> Float[Array, "tokens"]:
        """Compute the log-probability of each token of a text but the first, given those before it.

        Raises:
            AqError: for a text that is no string, for fewer than two tokens, and for more than the model takes.
        """
        ids, limit = self._tokenize(text, "score: the text"), self.model.config.max_position_embeddings
        if not 1 < len(ids) <= limit:
            raise AqError(f"score: the text has {len(ids)} tokens; wanted 2 to {limit}")
        # Cut on the host: on the device, each length would be another program.
        return jax.device_put(np.asarray(self._score(_pad_prompt(ids, limit)))[: len(ids) - 1])

    def log_probabilities(self, ids: Sequence[int]) -> Float[np.ndarray, "following vocabulary"]:
        """Compute the log-probability of every token of the vocabulary, after each of these ids but the last.

        Raises:
            AqError: for ids outside the vocabulary, for fewer than two, and for more than the model takes.
        """
        limit = self.model.config.max_position_embeddings
        ids = check_token_ids(ids, self.model.config.vocab_size, "log_probabilities").tolist()
        if not 1 < len(ids) <= limit:
            raise AqError(f"log_probabilities: found {len(ids)} ids; wanted 2 to {limit}")
        return np.asarray(self._log_probabilities(_pad_prompt(ids, limit)))[: len(ids) - 1]

    def _tokenize(self, text: str, what: str) -> list[int]:
        if not isinstance(text, str):
            raise AqError(f"{what} is {type(text).__name__}; wanted a string")
        return tokenize_texts(self.tokenizer, [text], self.model.config.vocab_size, what)[0].ids


def decode_tokens(
    model: LanguageModel,
    ids: Int[Array, "1 tokens"],
    length: Int[Array, ""],
    count: Int[Array, ""],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    key: Key[Array, ""],
    *,
    steps: int,
    eos_ids: tuple[int, ...],
) -> Int[Array, "steps"]:
    """Decode the tokens that follow the first `length` of `ids`; after `count`, or an end, nothing is computed."""
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
        # The cache of the prompt's padding is overwritten before it is read.
        hidden, cache = model.extend(token[None, None], cache, length + step - 1)
        token = draw(model.logits(hidden[0, 0]), step)
        return (token, cache), token

    def skip(carry: tuple, step: Int[Array, ""]) -> tuple[tuple, Int[Array, ""]]:
        return carry, carry[0]

    def body(carry: tuple, step: Int[Array, ""]) -> tuple[tuple, Int[Array, ""]]:
        over = (step >= count) | jnp.isin(carry[0], jnp.array(eos_ids, jnp.int32))
        return lax.cond(over, skip, advance, carry, step)

    start = draw(first, jnp.int32(0))
    _, tokens = lax.scan(body, (start, cache), jnp.arange(1, steps, dtype=jnp.int32))
    return jnp.concatenate([start[None], tokens])


def sample(logits: Float[Array, "vocabulary"], top_p: Float[Array, ""], key: Key[Array, ""]) -> Int[Array, ""]:
    """Draw from the likeliest tokens that have the probability `top_p` together, the likeliest always among them."""
    order = jnp.argsort(-logits)
    share = jax.nn.softmax(logits[order])
    before = jnp.cumsum(share) - share
    drawn = jax.random.categorical(key, jnp.where(before < top_p, logits[order], -jnp.inf))
    return order[drawn].astype(jnp.int32)


def log_likelihoods(model: LanguageModel, ids: Int[Array, "1 tokens"]) -> Float[Array, "following"]:
    """Compute log p(ids[i + 1] | ids[: i + 1])."""
    return jnp.take_along_axis(log_probabilities(model, ids), ids[0, 1:, None], axis=1)[:, 0]


def log_probabilities(model: LanguageModel, ids: Int[Array, "1 tokens"]) -> Float[Array, "following vocabulary"]:
    """Compute log p(token | ids[: i + 1]) for every token of the vocabulary."""
    hidden, _ = model.extend(ids, model.empty_cache(1, ids.shape[1]), 0)
    return jax.nn.log_softmax(model.logits(hidden[0, :-1]))


def _pad_prompt(ids: Sequence[int], limit: int) -> Int[np.ndarray, "1 tokens"]:
    padded = np.zeros((1, padded_length(len(ids), limit)), np.int32)
    padded[0, : len(ids)] = ids
    return padded
