"""Compare what a quantized model gives with what the float model gives, and time both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from aq_jax.errors import ConfigError, FormatError
from aq_jax.nn import Encoder, Generator, Reranker
from aq_jax.nn.tokenizer import tokenize_texts
from aq_jax.validate.data import HeldOut
from aq_jax.validate.metrics import NextTokens, cosines, distribution, spearman

ROUNDS, TIMED = 3, 64  # the best of so many rounds over so many texts
TIMED_TOKENS = 2048  # of a language model, whose texts may be long


class Judge(Protocol):
    """The float model, to which quantized ones are compared."""

    def outputs(self, model: Any) -> dict[str, Any]:
        """Measure how near a model's outputs are: `outputs` of the report."""
        ...

    def speeds(self, model: Any) -> dict[str, float]:
        """Time a model and the float model in turns, in sentences a second."""
        ...


def make_judge(reference: Encoder | Generator | Reranker, held: HeldOut, max_tokens: int | None = None) -> Judge:
    """Choose the judge for this kind of model.

    Args:
        reference: float model.
        held: texts that no case has seen.
        max_tokens: number of tokens at which a language model's texts are cut; None cuts them where the model ends.

    Raises:
        FormatError: for a sequence classifier, for which there is none.
    """
    if isinstance(reference, Reranker):
        raise FormatError(f"the model is {reference.about}; wanted an encoder or a language model, which can be judged")
    if isinstance(reference, Encoder):
        return EncoderJudge(reference, held)
    return GeneratorJudge(reference, held, max_tokens)


class EncoderJudge:
    """Sentence embeddings beside the float model's, whose own are computed once."""

    def __init__(self, reference: Encoder, held: HeldOut) -> None:
        self._reference, self._lines = reference, held.text.lines
        pairs = held.pairs.rows if held.pairs else ()
        self._scores = [score for *_, score in pairs]
        self._texts = [*self._lines, *(a for a, *_ in pairs), *(b for _, b, _ in pairs)]
        self._embeddings = np.asarray(reference.encode(self._texts))

    def outputs(self, model: Encoder) -> dict[str, Any]:
        found, count = np.asarray(model.encode(self._texts)), len(self._lines)
        agreement = None
        if self._scores:
            own, other = self._spearman(self._embeddings), self._spearman(found)
            agreement = {"float": own, "quantized": other, "loss": own - other}
        each = cosines(found[:count], self._embeddings[:count])
        # A model that gives nothing for a text is as far from the float one as can be told.
        return {"kind": "embeddings", "cosine": distribution(np.nan_to_num(each)), "spearman": agreement}

    def _spearman(self, embeddings: np.ndarray) -> float:
        pairs = embeddings[len(self._lines) :].reshape(2, len(self._scores), -1)
        return 100 * spearman(np.nan_to_num(cosines(pairs[0], pairs[1])), self._scores)

    def speeds(self, model: Encoder) -> dict[str, float]:
        lines = self._lines[:TIMED]
        return time_in_turns(lambda: model.encode(lines), lambda: self._reference.encode(lines), len(lines))


class GeneratorJudge:
    """Next tokens beside the float model's, of texts that are cut where the model ends, or before."""

    def __init__(self, reference: Generator, held: HeldOut, max_tokens: int | None = None) -> None:
        self._reference, limit = reference, reference.model.config.max_position_embeddings
        limit = min(limit, max_tokens or limit)
        found = tokenize_texts(reference.tokenizer, held.text.lines, reference.model.config.vocab_size, held.text.name)
        self._ids = [encoding.ids[:limit] for encoding in found if len(encoding.ids) > 1]
        if not self._ids:
            raise ConfigError(f"text: the tokenizer finds no line of two tokens in {held.text.name}")

    def outputs(self, model: Generator) -> dict[str, Any]:
        both = NextTokens()
        for ids in self._ids:
            both.add(self._reference.log_probabilities(ids), model.log_probabilities(ids), ids[1:])
        return both.report()

    def speeds(self, model: Generator) -> dict[str, float]:
        def score(scored: Generator, texts: Sequence[Sequence[int]]) -> None:
            for ids in texts:
                scored.log_probabilities(ids)

        ends = np.cumsum([len(ids) for ids in self._ids[:TIMED]])
        texts = self._ids[: max(1, int(np.sum(ends <= TIMED_TOKENS)))]
        return time_in_turns(lambda: score(model, texts), lambda: score(self._reference, texts), len(texts))


def time_in_turns(one: Callable[[], Any], other: Callable[[], Any], count: int) -> dict[str, float]:
    """Time two calls in turns, in sentences a second; the first call of each, which compiles, does not count."""
    best = [float("inf"), float("inf")]
    for call in (one, other) * (ROUNDS + 1):
        start = time.perf_counter()
        np.asarray(call())
        which = int(call is other)
        best[which] = min(best[which], time.perf_counter() - start)
    return {"sentences_a_second": count / best[0], "float_sentences_a_second": count / best[1]}
