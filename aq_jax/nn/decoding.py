"""Decode the tokens that follow prompts: prompts in chunks, then token by token, with the cache in place.

Prompts of a batch are padded on their left to one length, and so to whole chunks: they all end at one position of the
cache, and each begins at its own, before which nothing is seen. So programs depend on how many prompts there are, and
on the size of the cache, a power of two; not on the length of a prompt, nor on the number of tokens. A prompt whose
beginning is known (`prompt_cache`) begins where that did; chunks are counted from its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from aq_jax.errors import AqError
from aq_jax.nn.compiled import BoundProgram
from aq_jax.nn.models import Cache, LanguageModel
from aq_jax.nn.prompt_cache import Known, PromptCache, grown
from aq_jax.nn.sampling import Sampling, draw
from aq_jax.ops import CacheType

CHUNK, SMALL_CHUNK = 256, 32
"""Tokens of a prompt that are computed at once, and the fewest."""
PIECE = 32
"""Tokens of a continuation that are computed in one call, at most."""
OVER = -1  # instead of the tokens that follow an end


class Texts(NamedTuple):
    """The texts that programs write, as far as they are told of them.

    Args:
        first: The positions at which the prompts begin.
        counts: How many tokens may follow each.
        numbers: How they are chosen (see `sampling.draw`).
        seed: The seed of the draws.
    """

    first: Int[Array, "batch"]
    counts: Int[Array, "batch"]
    numbers: Float[Array, "settings"]
    seed: UInt32[Array, ""]


class Decoding:
    """The programs that decode with a model.

    Args:
        model: A model with its weights.
        eos_ids: The ids that end a text.
    """

    def __init__(self, model: LanguageModel, eos_ids: tuple[int, ...]) -> None:
        self._model = model
        self._empty = jax.jit(model.empty_cache, static_argnums=(0, 1, 2))  # array by array it takes 1 ms
        self._read = BoundProgram(model, read_chunk, reuses=True)
        self._begin = BoundProgram(model, partial(begin, eos_ids=eos_ids))
        self._decode = BoundProgram(model, partial(decode_tokens, eos_ids=eos_ids), reuses=True)

    @property
    def compiles(self) -> int:
        """Count the programs compiled so far."""
        return self._read.compiles + self._begin.compiles + self._decode.compiles

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        counts: Sequence[int],
        sampling: Sampling,
        seed: int,
        cache: CacheType = "float32",
        piece: int = PIECE,
        prompt_cache: PromptCache | None = None,
    ) -> Iterator[list[list[int]]]:
        """Yield the tokens that follow each prompt, the first alone, and then some at a time.

        The ids that end texts are among them; a text that is over has no more.

        Args:
            prompts: The ids of prompts, of at least one.
            counts: The most tokens of each.
            sampling: How tokens are chosen.
            seed: The seed of the draws, which each text has for itself.
            cache: The type of the cache.
            piece: How many tokens are yielded at a time.
            prompt_cache: What may know the beginning of a single prompt, and gets the text for the next.

        Raises:
            AqError: for a prompt cache and several prompts, or with a text of another model.
        """
        if prompt_cache is not None and len(prompts) != 1:
            raise AqError(f"generate: found a prompt_cache and {len(prompts)} prompts; wanted one prompt")
        state, length, chunks = self._place(max(prompts, key=len), max(counts), len(prompts), cache, prompt_cache)
        ids = np.zeros((len(prompts), length), np.int32)
        seen = np.zeros((len(prompts), self._model.config.vocab_size), bool)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = prompt
            seen[row, list(prompt)] = True
        first = np.array([length - len(prompt) for prompt in prompts], np.int32)
        of_numpy: Any = first, np.array(counts, np.int32), sampling.numbers(), np.uint32(seed)
        texts = Texts(*of_numpy)  # whose arrays become JAX's in a call
        start = inside = length - sum(chunks)  # inside: where what the cache holds of the first text ends
        text = list(prompts[0])
        try:
            hidden = None
            for chunk in chunks:
                state, hidden = self._read(state, ids[:, start : start + chunk], np.int32(start), first)
                start = inside = start + chunk
            token, seen, over = self._begin(hidden, seen, texts)
            found = [[int(each)] for each in np.asarray(token)]
            text += found[0]
            yield found
            done, last = 1, max(counts)
            while done < last and not np.asarray(over).all():
                steps = min(piece, last - done)
                at = np.int32(start + done - 1)
                (state, token, seen, over), tokens = self._decode(
                    (state, token, seen, over), texts, at, np.int32(done), np.int32(steps)
                )
                found = [[token for token in row if token != OVER] for row in np.asarray(tokens)[:, :steps].tolist()]
                text += found[0]
                inside += len(found[0])
                yield found
                done += steps
        finally:
            if prompt_cache is not None:
                begin = int(first[0])
                prompt_cache.keep(Known(self._model, cache, text[: max(0, inside - begin)], begin, state))

    def _place(
        self, prompt: Sequence[int], count: int, batch: int, kind: CacheType, prompt_cache: PromptCache | None
    ) -> tuple[Cache, int, list[int]]:
        """Find room for prompts, of which this is the longest.

        Returns:
            The cache, the position at which the prompts end, and the lengths of the chunks that are read before it.
        """
        known = prompt_cache.take(self._model, kind) if prompt_cache is not None else None
        if known is not None:
            # The last token is read anew, and others where the rest is no whole chunk.
            chunks = split_prompt(len(prompt) - min(known.shared(prompt), len(prompt) - 1))
            length = known.first + len(prompt)
            if sum(chunks) <= length:
                return grown(known.cache, cache_size(length + count)), length, chunks
        known = None  # whose memory may be needed
        chunks = split_prompt(len(prompt))
        length = sum(chunks)
        return self._empty(batch, cache_size(length + count), kind), length, chunks


def split_prompt(length: int) -> list[int]:
    """Split a prompt into chunks of two lengths, which together are hardly longer.

    >>> [split_prompt(length) for length in (1, 100, 200, 300)]
    [[32], [32, 32, 32, 32], [256], [256, 32, 32]]
    """
    whole, rest = divmod(length, CHUNK)
    small = -(-rest // SMALL_CHUNK)
    return [CHUNK] * whole + ([SMALL_CHUNK] * small if small <= 4 else [CHUNK])


def cache_size(positions: int) -> int:
    """Return the size of a cache for so many positions: a power of two, so that programs are few.

    >>> [cache_size(positions) for positions in (1, 65, 256)]
    [64, 128, 256]
    """
    return max(64, 1 << (positions - 1).bit_length())


def read_chunk(
    model: LanguageModel,
    cache: Cache,
    ids: Int[Array, "batch chunk"],
    start: Int[Array, ""],
    first: Int[Array, "batch"],
) -> tuple[Cache, Float[Array, "batch width"]]:
    """Read a chunk of prompts into the cache; return it, and the last hidden states."""
    hidden, cache = model.extend(ids, cache, start, first)
    return cache, hidden[:, -1]


def begin(
    model: LanguageModel,
    hidden: Float[Array, "batch width"],
    seen: Bool[Array, "batch vocabulary"],
    texts: Texts,
    *,
    eos_ids: tuple[int, ...],
) -> tuple[Int[Array, "batch"], Bool[Array, "batch vocabulary"], Bool[Array, "batch"]]:
    """Choose the first tokens; return them, with the tokens that were there, and which texts are over."""
    return _next(model, hidden, seen, jnp.int32(0), texts, eos_ids)


State = tuple[Cache, Int[Array, "batch"], Bool[Array, "batch vocabulary"], Bool[Array, "batch"]]


def decode_tokens(
    model: LanguageModel,
    state: State,
    texts: Texts,
    start: Int[Array, ""],
    done: Int[Array, ""],
    steps: Int[Array, ""],
    *,
    eos_ids: tuple[int, ...],
) -> tuple[State, Int[Array, "batch piece"]]:
    """Decode some tokens more; nothing is computed once all texts are over.

    Args:
        model: The model.
        state: The cache, the last tokens, those that were there, and which texts are over.
        texts: What is known of the texts.
        start: The position of the last tokens, which the cache does not have yet.
        done: How many tokens there were.
        steps: How many are decoded, at most PIECE.
        eos_ids: The ids that end a text.
    """

    def goes_on(carry: tuple) -> Bool[Array, ""]:
        step, (*_, over), _ = carry
        return (step < steps) & ~over.all()

    def advance(carry: tuple) -> tuple:
        step, (cache, token, seen, over), tokens = carry
        hidden, cache = model.extend(token[:, None], cache, start + step, texts.first)
        token, seen, ends = _next(model, hidden[:, 0], seen, done + step, texts, eos_ids)
        tokens = lax.dynamic_update_slice_in_dim(tokens, jnp.where(over, OVER, token)[:, None], step, axis=1)
        return step + 1, (cache, token, seen, over | ends), tokens

    tokens = jnp.full((len(texts.first), PIECE), OVER, jnp.int32)
    _, state, tokens = lax.while_loop(goes_on, advance, (jnp.int32(0), state, tokens))
    return state, tokens


def _next(
    model: LanguageModel,
    hidden: Float[Array, "batch width"],
    seen: Bool[Array, "batch vocabulary"],
    step: Int[Array, ""],
    texts: Texts,
    eos_ids: tuple[int, ...],
) -> tuple[Int[Array, "batch"], Bool[Array, "batch vocabulary"], Bool[Array, "batch"]]:
    """Choose the tokens of a step; tell which texts it ends."""
    token = draw(model.logits(hidden), seen, texts.numbers, texts.seed, step)
    seen |= jnp.arange(seen.shape[1], dtype=jnp.int32)[None] == token[:, None]  # a scatter takes longer
    return token, seen, jnp.isin(token, jnp.array(eos_ids, jnp.int32)) | (step + 1 >= texts.counts)
