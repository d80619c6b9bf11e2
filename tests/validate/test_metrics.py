"""Figures of merit against slow oracles, and the laws that they keep."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from aq_jax.validate.metrics import NextTokens, cosines, distribution, mean_over_texts, ranks, spearman

few_values = st.lists(st.integers(0, 4), min_size=1, max_size=12)  # with many ties


@given(few_values)
def test_ranks_agree_with_the_oracle(values: list[int]) -> None:
    slow = [sum(b < a for b in values) + (sum(b == a for b in values) + 1) / 2 for a in values]
    assert ranks(values).tolist() == slow


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=12))
def test_spearman_agrees_with_scipy(pairs: list[tuple[int, int]]) -> None:
    a, b = zip(*pairs, strict=True)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(spearman(a, b))
    else:
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_spearman_sees_only_the_order(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(2, 50))
    differences = ranks(a) - ranks(b)
    assert spearman(a, b) == pytest.approx(1 - 6 * np.sum(differences**2) / (50 * (50**2 - 1)))
    assert spearman(np.exp(a), b**3) == pytest.approx(spearman(a, b))
    assert spearman(-a, b) == pytest.approx(-spearman(a, b))


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50))
def test_a_distribution_agrees_with_the_oracle(values: list[float]) -> None:
    found = distribution(values)
    assert found is not None
    assert found["count"] == len(values)
    assert found["mean"] == pytest.approx(statistics.fmean(values))
    assert found["std"] == pytest.approx(statistics.pstdev(values), abs=1e-9)
    assert (found["min"], found["max"]) == (min(values), max(values))
    assert found["p99"] == pytest.approx(np.percentile(values, 99))
    assert min(values) <= found["p1"] <= found["mean"] + 1e-9
    edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
    assert len(edges) == len(counts) + 1
    assert sum(counts) == len(values)
    assert edges == sorted(edges)


def test_a_distribution_of_nothing_is_none() -> None:
    assert distribution([]) is None


def test_cosines_are_summed_in_float64() -> None:
    a = np.full((1, 3 << 20), 0.1, np.float32)
    assert cosines(a, a)[0] == pytest.approx(1, abs=1e-12)
    assert np.isnan(cosines(np.zeros((1, 3)), np.ones((1, 3)))).all()


def test_the_standard_error_is_that_of_texts(rng: np.random.Generator) -> None:
    """Of texts of one length it is that of their means; and saying a text twice as long says nothing new."""
    means = rng.normal(size=30)
    found = mean_over_texts(means * 7, np.full(30, 7))
    assert found.mean == pytest.approx(means.mean())
    assert found.standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(30))
    assert mean_over_texts(means * 14, np.full(30, 14)).standard_error == pytest.approx(found.standard_error)
    assert math.isnan(mean_over_texts([3.0], [2]).standard_error)


def test_the_standard_error_is_how_far_means_scatter(rng: np.random.Generator) -> None:
    tokens = rng.integers(2, 20, size=(500, 40))
    sums = tokens * rng.normal(1, 0.5, size=tokens.shape)
    found = [mean_over_texts(s, n) for s, n in zip(sums, tokens, strict=True)]
    scatter = np.std([each.mean for each in found])
    assert np.mean([each.standard_error for each in found]) == pytest.approx(scatter, rel=0.1)


def logs(rng: np.random.Generator, tokens: int, vocabulary: int = 6) -> np.ndarray:
    logits = rng.normal(size=(tokens, vocabulary))
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


def test_next_tokens_agree_with_the_oracle(rng: np.random.Generator) -> None:
    both, own, other, kl, same = NextTokens(), [], [], [], []
    for tokens in (3, 5, 2):
        p, q, targets = logs(rng, tokens), logs(rng, tokens), rng.integers(6, size=tokens)
        both.add(p, q, targets)
        for i in range(tokens):
            own.append(-float(p[i, targets[i]]))
            other.append(-float(q[i, targets[i]]))
            kl.append(sum(math.exp(a) * (float(a) - float(b)) for a, b in zip(p[i], q[i], strict=True)))
            same.append(int(p[i].argmax()) == int(q[i].argmax()))
    found = both.report()
    assert found["tokens"] == 10
    assert found["perplexity"]["float"] == pytest.approx(math.exp(statistics.fmean(own)))
    assert found["perplexity"]["quantized"] == pytest.approx(math.exp(statistics.fmean(other)))
    assert found["perplexity"]["ratio"] == pytest.approx(math.exp(statistics.fmean(other) - statistics.fmean(own)))
    assert found["kl"]["mean"] == pytest.approx(statistics.fmean(kl))
    assert found["same_top"]["rate"] == pytest.approx(statistics.fmean(same))


def test_a_model_is_like_itself(rng: np.random.Generator) -> None:
    both = NextTokens()
    for tokens in (3, 5):
        p = logs(rng, tokens)
        p[:, 0] = -np.inf  # tokens that are impossible take no part
        both.add(p, p, np.full(tokens, 1))
    found = both.report()
    assert found["kl"] == {"mean": 0, "standard_error": 0}
    assert found["same_top"] == {"rate": 1, "standard_error": 0}
    assert (found["perplexity"]["ratio"], found["perplexity"]["ratio_standard_error"]) == (1, 0)


def test_a_model_that_rules_out_what_comes_is_infinitely_surprised() -> None:
    both = NextTokens()
    both.add(np.log([[0.5, 0.5]]), np.array([[0, -1e4]]), [1])
    assert both.report()["perplexity"]["quantized"] == math.inf
