"""Compute figures of merit in NumPy, summed in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

BINS = 20


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, and the standard error that texts drawn anew would give it; NaN of one text."""

    mean: float
    standard_error: float


def distribution(values: ArrayLike) -> dict[str, Any] | None:
    """Describe values: count, mean, standard deviation (of these, not of a population), both ends, histogram.

    The ends are the first percentile and the least, the 99th and the greatest. Of no values, it is None.

    >>> found = distribution([1, 2, 3])
    >>> found["mean"], found["min"], found["histogram"]["counts"][:2]
    (2.0, 1.0, [1, 0])
    """
    x = np.asarray(values, np.float64)
    if not x.size:
        return None
    counts, edges = np.histogram(x, BINS)
    return {
        "count": x.size, "mean": float(x.mean()), "std": float(x.std()),
        "p1": float(np.percentile(x, 1)), "min": float(x.min()),
        "p99": float(np.percentile(x, 99)), "max": float(x.max()),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }  # fmt: skip


def cosines(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Compute the cosine of each row with the same row of the other; NaN where one is all zeros.

    >>> cosines([[1, 0], [1, 1]], [[2, 0], [1, 0]]).round(3)
    array([1.   , 0.707])
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    with np.errstate(invalid="ignore"):
        return np.sum(x * y, axis=-1) / np.sqrt(np.sum(x * x, axis=-1) * np.sum(y * y, axis=-1))


def ranks(values: ArrayLike) -> np.ndarray:
    """Rank values from 1; equal values share the mean of their ranks.

    >>> ranks([10, 30, 20, 20])
    array([1. , 4. , 2.5, 2.5])
    """
    _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Compute Spearman's correlation: Pearson's, of the ranks; NaN if one of both is constant.

    >>> spearman([1, 2, 3, 4], [1, 10, 100, 1000])
    1.0
    """
    x, y = ranks(a), ranks(b)
    return float(cosines(x - x.mean(), y - y.mean()))


def mean_over_texts(sums: ArrayLike, tokens: ArrayLike) -> Estimate:
    """Estimate a mean a token from each text's sum, as a ratio of sums; texts are what was drawn.

    The tokens of one text are not independent: taken as if they were, they would promise too much. Source: the ratio
    estimator, Cochran, Sampling Techniques, 6.

    Args:
        sums: sums over the tokens of each text.
        tokens: numbers of those tokens.

    >>> mean_over_texts([2.0, 4.0], [1, 2])
    Estimate(mean=2.0, standard_error=0.0)
    """
    x, n = np.asarray(sums, np.float64), np.asarray(tokens, np.float64)
    mean = x.sum() / n.sum()
    if len(x) < 2:
        return Estimate(float(mean), float("nan"))
    spread = np.sum((x - mean * n) ** 2) * len(x) / (len(x) - 1)
    return Estimate(float(mean), float(np.sqrt(spread) / n.sum()))


class NextTokens:
    """Two language models' predictions of the same tokens, text after text; sums are kept, and not the predictions.

    >>> both = NextTokens()
    >>> both.add(np.log([[0.5, 0.5]]), np.log([[0.75, 0.25]]), [1])
    >>> both.report()["perplexity"]["float"], both.report()["perplexity"]["quantized"]
    (2.0, 4.0)
    """

    def __init__(self) -> None:
        self._sums: list[tuple[float, float, float, int, int]] = []

    def add(self, reference: ArrayLike, quantized: ArrayLike, targets: ArrayLike) -> None:
        """Add a text.

        Args:
            reference: log-probabilities of the float model, [tokens, vocabulary].
            quantized: log-probabilities of the quantized model.
            targets: tokens that followed.
        """
        p, q, t = np.asarray(reference, np.float64), np.asarray(quantized, np.float64), np.asarray(targets)
        at = (np.arange(len(t)), t)
        # Where p is 0, so is its part: 0 * -inf would be NaN.
        kl = np.sum(np.exp(p) * np.subtract(p, q, where=p > -np.inf, out=np.zeros_like(p)))
        same = np.sum(p.argmax(1) == q.argmax(1))
        self._sums.append((-p[at].sum(), -q[at].sum(), float(kl), int(same), len(t)))

    def report(self) -> dict[str, Any]:
        """Compute perplexity, divergence and agreement, each with its standard error over texts.

        That of the perplexities' ratio is smaller than theirs: both models read the same texts.
        """
        own, other, kl, same, tokens = np.array(self._sums, np.float64).T
        a, b, rise = (mean_over_texts(sums, tokens) for sums in (own, other, other - own))
        divergence, agreement = mean_over_texts(kl, tokens), mean_over_texts(same, tokens)
        with np.errstate(over="ignore"):  # infinite, and said to be so
            perplexity, ratio = float(np.exp(b.mean)), float(np.exp(rise.mean))
            perplexity = {
                "float": float(np.exp(a.mean)),
                "quantized": perplexity, "standard_error": perplexity * b.standard_error,
                "ratio": ratio, "ratio_standard_error": ratio * rise.standard_error,
            }  # fmt: skip
        return {
            "kind": "tokens", "tokens": int(tokens.sum()), "perplexity": perplexity,
            "kl": {"mean": divergence.mean, "standard_error": divergence.standard_error},
            "same_top": {"rate": agreement.mean, "standard_error": agreement.standard_error},
        }  # fmt: skip
