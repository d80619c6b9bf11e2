"""Embed sentences: tokenize, pad to few lengths, run, and put the results into the caller's order."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from aq_jax.core.dispatch import FEW_TOKENS, backend
from aq_jax.errors import AqError
from aq_jax.nn.compiled import BoundProgram, check_token_ids, nbytes, padded_length
from aq_jax.nn.layers import batch_tokens
from aq_jax.nn.models import Model
from aq_jax.nn.precision import Precision, check_precision, quantize_embeddings
from aq_jax.nn.sentences import SentenceSettings, prompt_tokens
from aq_jax.nn.tokenizer import set_truncation, tokenize_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Encoder:
    """A sentence encoder, as `aq_jax.load_model` returns it.

    Args:
        model: A model with its weights.
        tokenizer: The model's tokenizer.
        sentences: How hidden states become embeddings.
    """

    about: ClassVar = "an encoder"

    def __init__(self, model: Model, tokenizer: Tokenizer, sentences: SentenceSettings) -> None:
        self.model, self.tokenizer, self.sentences = model, tokenizer, sentences
        set_truncation(tokenizer, sentences.max_tokens)
        whole = dataclasses.replace(sentences, truncate_dim=None)
        self._embed = BoundProgram(model, partial(embed_batch, sentences=whole))
        self._tokens = batch_tokens(model)

    @property
    def compiles(self) -> int:
        """Count the programs compiled so far: one for each padded length, and for each of single sentences."""
        return self._embed.compiles

    @property
    def nbytes(self) -> int:
        """Count the bytes of the model's arrays in memory: weights as they are packed, or as kernels prepared them."""
        return nbytes(self.model)

    def encode(
        self,
        texts: Iterable[str],
        progress: Callable[[str, int, int], None] | None = None,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        precision: Precision = "float32",
        truncate_dim: int | None = None,
    ) -> Real[Array, "texts width"]:
        """Embed each text, in the order of the texts.

        A text's embedding does not depend on the other texts, except in its last bits if they change the shape in which
        it runs. Texts that are too long for the model are cut, with a warning.

        Args:
            texts: Any strings, empty ones too.
            progress: A callback that gets a word, how many texts were just done, and how many there are.
            prompt_name: The name of the prompt to put before each text; by default the folder's default prompt, if any.
            prompt: The text to put before each text, instead of a prompt by name; "" for none.
            precision: What embeddings are rounded to (see `quantize_embeddings`): "float32" for nothing, "int8" and
                "uint8" for 256 levels of the range that each dimension has in this call, "binary" and "ubinary" for a
                bit that says whether a number is above 0, eight in a byte.
            truncate_dim: The number of dimensions that are kept; by default the folder's, if it says one.

        Raises:
            AqError: if one of the texts is no string, or `texts` is one; for an unknown prompt; for a text with a token
                that the model has no row for; for another precision, for ranges of fewer than two embeddings, and for
                a number of dimensions that is none.
        """
        check_precision(precision)
        if truncate_dim is not None and (type(truncate_dim) is not int or not 1 <= truncate_dim <= self._width):
            raise AqError(f"encode: truncate_dim = {truncate_dim!r}; wanted 1 to {self._width}, or None")
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise AqError(f"encode: wanted a list of strings, found {type(texts).__name__}")
        texts = list(texts)  # once: it may be a generator
        if not all(isinstance(text, str) for text in texts):
            raise AqError("encode: wanted a list of strings, found others")
        before = self.sentences.prompt(prompt_name, prompt)
        most = self.sentences.max_letters
        whole = [(before + text)[:most] for text in texts]
        encodings = tokenize_texts(self.tokenizer, whole, self.model.config.vocab_size, "encode")
        cut = sum(
            1 for text, found in zip(texts, encodings, strict=True)
            if found.overflowing or (most is not None and len(before + text) > most)
        )  # fmt: skip
        if cut:
            note = f"{cut} of {len(texts)} texts are longer than {self.sentences.max_tokens} tokens, and were cut"
            warnings.warn(note, stacklevel=2)
        skipped = 0 if self.sentences.includes_prompt else prompt_tokens(self.tokenizer, before)
        ids = [self.sentences.counted(encoding.ids) for encoding in encodings]
        found = self._run(ids, skipped, progress, truncate_dim)
        return found if precision == "float32" else jnp.asarray(quantize_embeddings(np.asarray(found), precision))

    def encode_ids(
        self, ids: Sequence[Sequence[int]], progress: Callable[[str, int, int], None] | None = None
    ) -> Float[Array, "texts width"]:
        """Embed as `encode`, from token ids, each text's with its special tokens, and with its prompt, which counts.

        Raises:
            AqError: for ids that are no integers or outside the vocabulary, and for more of them than the model takes.
        """
        return self._run(ids, 0, progress)

    def _run(
        self,
        ids: Sequence[Sequence[int]],
        skipped: int,
        progress: Callable[[str, int, int], None] | None,
        truncate_dim: int | None = None,
    ) -> Float[Array, "texts width"]:
        vocabulary = self.model.config.vocab_size
        texts = [check_token_ids(text, vocabulary, f"encode_ids: text {i}") for i, text in enumerate(ids)]
        longest = max(map(len, texts), default=0)
        if longest > self.sentences.max_tokens:
            raise AqError(f"encode_ids: {longest} tokens in a text; wanted at most {self.sentences.max_tokens}")
        prompt = () if self.sentences.includes_prompt else (np.int32(skipped),)
        parts = run_in_batches(
            lambda padded, lengths: self._embed(padded, lengths, *prompt), [texts], self.sentences.max_tokens,
            self._tokens, progress,
        )  # fmt: skip
        width = self._width
        kept = min(width, truncate_dim or self.sentences.truncate_dim or width)
        if kept == width and len(parts) == len(texts) == 1 and len(parts[0][1].devices()) == 1:
            return parts[0][1]  # to copy one text there and back takes as long as a tenth of its layers
        return jax.device_put(in_order(parts, len(texts), width)[:, :kept])

    @property
    def _width(self) -> int:
        """The numbers of an embedding before any are left out."""
        return dataclasses.replace(self.sentences, truncate_dim=None).width(self.model.config.hidden_size)


def run_in_batches(
    run: Callable[..., Array],
    numbers: Sequence[Sequence[Int[np.ndarray, "tokens"]]],
    longest: int,
    tokens: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[tuple[list[int], Array]]:
    """Run texts in batches (see `make_batches`); return each batch's members, and its results, with those of padding.

    Args:
        run: A function of arrays [rows, padded length], one for each of `numbers`, and of the rows' lengths.
        numbers: For each array the numbers of each text, such as the ids of its tokens, all of one length.
        longest: The longest padded length.
        tokens: The number of tokens in a batch, with padding.
        progress: A callback that gets a word, how many texts were just done, and how many there are.
    """
    texts = numbers[0]
    parts: list[tuple[list[int], Array]] = []
    for members, rows, length in make_batches(list(map(len, texts)), longest, tokens, FEW_TOKENS[backend()]):
        padded, lengths = np.zeros((len(numbers), rows, length), np.int32), np.zeros(rows, np.int32)
        for row, member in enumerate(members):
            lengths[row] = len(texts[member])
            for array, each in zip(padded, numbers, strict=True):
                array[row, : lengths[row]] = each[member]
        parts.append((members, run(*padded, lengths)))
        if progress is not None:
            parts[-1][1].block_until_ready()
            progress("embedding", len(members), len(texts))
    return parts


def in_order(parts: Sequence[tuple[list[int], Array]], texts: int, width: int) -> Float[np.ndarray, "texts width"]:
    """Put the results of batches into the order of the texts."""
    out = np.zeros((texts, width), np.float32)
    for members, part in parts:
        out[members] = np.asarray(part)[: len(members)]
    return out


def embed_batch(
    model: Model,
    ids: Int[Array, "batch tokens"],
    lengths: Int[Array, "batch"],
    skipped: Int[Array, ""] | None = None,
    *,
    sentences: SentenceSettings,
) -> Float[Array, "batch width"]:
    """Embed a padded batch of sentences."""
    mask = jnp.arange(ids.shape[1], dtype=lengths.dtype)[None] < lengths[:, None]
    return sentences.embed(model(ids, mask), mask, skipped)


def make_batches(
    lengths: Sequence[int], longest: int, tokens: int, few: int = 0
) -> Iterator[tuple[list[int], int, int]]:
    """Group sentences into batches, longest first: yield (members, rows, padded length).

    Padded lengths are powers of two, and 24 and 48, since most sentences are short; each has one number of rows, so
    that programs are few. Sentences so few that they fill less than half a batch run in smaller ones, or one by one.

    Args:
        lengths: The lengths of the sentences, in tokens.
        longest: The longest padded length.
        tokens: The number of tokens in a batch, with padding.
        few: The number of tokens in a smaller batch; with 0 it is one sentence.

    >>> list(make_batches([3, 40, 5], 256, 512))
    [([1], 1, 48), ([2], 1, 16), ([0], 1, 16)]
    >>> [(len(members), rows, length) for members, rows, length in make_batches([10] * 40, 256, 512)]
    [(32, 32, 16), (8, 32, 16)]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    padded = [_padded_length(length, longest) for length in lengths]
    if 2 * sum(padded) <= tokens:
        tokens = few
    while order:
        length = padded[order[0]]
        rows = max(1, tokens // length)
        yield order[:rows], rows, length
        order = order[rows:]


def _padded_length(count: int, longest: int) -> int:
    length = padded_length(count, longest)
    return length * 3 // 4 if length in (32, 64) and count <= length * 3 // 4 else length
