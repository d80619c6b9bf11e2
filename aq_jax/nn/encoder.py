"""Sentences to embeddings: tokenize, pad to few lengths, run, and put the results into the caller's order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from aq_jax.core.dispatch import TOKENS, backend
from aq_jax.errors import AqError
from aq_jax.nn.bert import Bert, Pooling, pool
from aq_jax.nn.compiled import Compiled, padded_length, token_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Sentences:
    """What a folder says of sentences, beside the model.

    Args:
        pooling: "mean" over the tokens, or "cls", the first token.
        normalize: whether embeddings have length 1.
        max_tokens: what is longer is cut.
        lower_case: whether the tokenizer, which may not do so itself, is given lower-case text.
    """

    pooling: Pooling = "mean"
    normalize: bool = False
    max_tokens: int = 512
    lower_case: bool = False


class Encoder:
    """A sentence encoder: `aq_jax.load_model` makes one.

    Args:
        model: a concrete Bert.
        tokenizer: of the model.
        sentences: how its hidden states become embeddings.
    """

    def __init__(self, model: Bert, tokenizer: Tokenizer, sentences: Sentences) -> None:
        self.model, self.tokenizer, self.sentences = model, tokenizer, sentences
        tokenizer.no_padding()
        tokenizer.enable_truncation(sentences.max_tokens)
        self._embed = Compiled(model, partial(embeddings, sentences=sentences))

    @property
    def compiles(self) -> int:
        """How many programs were compiled so far: one for each padded length, and for each of single sentences."""
        return self._embed.compiles

    def encode(
        self, texts: Iterable[str], progress: Callable[[str, int, int], None] | None = None
    ) -> Float[Array, "texts width"]:
        """One embedding for each text, in the order of the texts.

        A text's embedding does not depend on what the others say, but for the last bits where they change the shape in
        which it runs. Longer texts than the model takes are cut, with a warning.

        Args:
            texts: any strings, empty ones too.
            progress: called with a word, how many texts were just done, and how many there are.

        Raises:
            AqError: if one of the texts is no string, or `texts` is one.
        """
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise AqError(f"encode: wanted a list of strings, found {type(texts).__name__}")
        texts = list(texts)  # once: it may be a generator
        if not all(isinstance(text, str) for text in texts):
            raise AqError("encode: wanted a list of strings, found others")
        encodings = self.tokenizer.encode_batch(
            [valid(text.lower() if self.sentences.lower_case else text) for text in texts]
        )
        cut = sum(1 for encoding in encodings if encoding.overflowing)
        if cut:
            note = f"{cut} of {len(texts)} texts are longer than {self.sentences.max_tokens} tokens, and were cut"
            warnings.warn(note, stacklevel=2)
        return self.encode_ids([encoding.ids for encoding in encodings], progress)

    def encode_ids(
        self, ids: Sequence[Sequence[int]], progress: Callable[[str, int, int], None] | None = None
    ) -> Float[Array, "texts width"]:
        """As `encode`, from token ids, each text's with its special tokens.

        Raises:
            AqError: for ids that are no integers or no tokens of the model, and for more of them than it takes.
        """
        vocabulary = self.model.config.vocab_size
        texts = [token_ids(text, vocabulary, f"encode_ids: text {i}") for i, text in enumerate(ids)]
        longest = max(map(len, texts), default=0)
        if longest > self.sentences.max_tokens:
            raise AqError(f"encode_ids: {longest} tokens in a text; wanted at most {self.sentences.max_tokens}")
        parts: list[tuple[list[int], Array]] = []
        for members, rows, length in batches(list(map(len, texts)), self.sentences.max_tokens, TOKENS[backend()]):
            padded, lengths = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
            for row, member in enumerate(members):
                lengths[row] = len(texts[member])
                padded[row, : lengths[row]] = texts[member]
            parts.append((members, self._embed(padded, lengths)))
            if progress is not None:
                parts[-1][1].block_until_ready()
                progress("embedding", len(members), len(texts))
        out = np.zeros((len(texts), self.model.config.hidden_size), np.float32)
        for members, part in parts:
            out[members] = np.asarray(part)[: len(members)]
        return jax.device_put(out)


def embeddings(
    model: Bert, ids: Int[Array, "batch tokens"], lengths: Int[Array, "batch"], *, sentences: Sentences
) -> Float[Array, "batch width"]:
    """Of sentences of these lengths; what stands behind them in `ids` means nothing."""
    mask = jnp.arange(ids.shape[1]) < lengths[:, None]
    return pool(model(ids, mask), mask, sentences.pooling, sentences.normalize)


def batches(lengths: Sequence[int], longest: int, tokens: int) -> Iterator[tuple[list[int], int, int]]:
    """(members, rows, padded length): which sentences run together, longest first.

    Padded lengths are powers of two, and each goes with one number of rows, so that programs are few. Only a call of so
    few sentences that they fill less than half a batch runs them one by one.

    Args:
        lengths: of the sentences, in tokens.
        longest: the longest padded length.
        tokens: in a batch, with padding.

    >>> list(batches([3, 40, 5], 256, 512))
    [([1], 1, 64), ([2], 1, 16), ([0], 1, 16)]
    >>> [(len(members), rows, length) for members, rows, length in batches([10] * 40, 256, 512)]
    [(32, 32, 16), (8, 32, 16)]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    padded = [padded_length(length, longest) for length in lengths]
    if 2 * sum(padded) <= tokens:
        yield from (([member], 1, padded[member]) for member in order)
        return
    while order:
        length = padded[order[0]]
        rows = max(1, tokens // length)
        yield order[:rows], rows, length
        order = order[rows:]


def valid(text: str) -> str:
    """Lone surrogates, which no tokenizer takes, as the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
