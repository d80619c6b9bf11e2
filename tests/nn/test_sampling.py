"""Which tokens are drawn, by transformers' processors of logits and by counting; and what an end cuts off."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import run_alone
from tokenizers import AddedToken, Tokenizer, decoders, models

from aq_jax.nn.continuation import Continuation
from aq_jax.nn.sampling import Sampling, draw, filter_logits

# The steps alone and together, on each row of logits; the second of them is flat.
CASES: list[dict[str, Any]] = [
    {}, {"temperature": 0.5}, {"top_k": 3}, {"top_k": 1}, {"top_k": 200}, {"top_p": 0.7}, {"top_p": 1e-6},
    {"top_p": 0.999}, {"min_p": 0.2}, {"min_p": 1.0}, {"repetition_penalty": 1.7}, {"repetition_penalty": 0.6},
    {"temperature": 2.0, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.2},
]  # fmt: skip
SEEN = [[3, 7, 7], [1, 3, 90]]
THEIRS = """
import json, sys
import numpy as np, torch
from transformers.generation.logits_process import *
logits, seen, cases = json.loads(sys.stdin.read())
found = []
for case in cases:
    scores, ids = torch.tensor(logits), torch.tensor(seen)
    steps = {"repetition_penalty": lambda x: RepetitionPenaltyLogitsProcessor(float(x)),
             "temperature": lambda x: TemperatureLogitsWarper(float(x)), "top_k": TopKLogitsWarper,
             "top_p": lambda x: TopPLogitsWarper(float(x)), "min_p": MinPLogitsWarper}
    for name, make in steps.items():
        if name in case:
            scores = make(case[name])(ids, scores)
    found.append(scores.tolist())
print(json.dumps(found))
"""


def logits() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([rng.normal(size=100) * 3, rng.normal(size=100) * 0.1]).astype(np.float32)


@jax.jit
def left(scores: jax.Array, seen: jax.Array, numbers: jax.Array) -> jax.Array:
    penalized = jnp.where(seen, jnp.where(scores > 0, scores / numbers[-1], scores * numbers[-1]), scores)
    return filter_logits(penalized, numbers)


def seen() -> np.ndarray:
    found = np.zeros((2, 100), bool)
    for row, ids in zip(found, SEEN, strict=True):
        row[ids] = True
    return found


def wanted(case: dict[str, Any]) -> np.ndarray:
    """By the definitions, with sorts, in float64; minus infinity for what is not drawn."""
    out = np.full((2, 100), -np.inf)
    for row, (scores, ids) in enumerate(zip(logits().astype(np.float64), SEEN, strict=True)):
        penalty = case.get("repetition_penalty", 1.0)
        for i in set(ids):
            scores[i] = scores[i] / penalty if scores[i] > 0 else scores[i] * penalty
        scores = scores / case.get("temperature", 1.0)
        order = [int(i) for i in np.argsort(-scores)][: case.get("top_k") or None]
        shares = np.exp(scores[order]) / np.exp(scores[order]).sum()
        before = np.cumsum(shares) - shares
        order = [i for i, mass in zip(order, before, strict=True) if mass < case.get("top_p", 1.0)]
        best = scores[order[0]]
        order = [i for i in order if np.exp(scores[i] - best) >= case.get("min_p", 0.0)]
        out[row, order] = scores[order]
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case) or "all")
def test_what_is_drawn_from_is_what_the_definitions_say(case: dict[str, Any]) -> None:
    numbers = Sampling(**({"temperature": 1.0} | case)).check("here").numbers()
    np.testing.assert_allclose(left(logits(), seen(), numbers), wanted(case), rtol=1e-5)


@pytest.mark.slow  # importing torch takes longer than all other tests here
def test_the_definitions_are_those_of_transformers(tmp_path: Path) -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch")
    said = run_alone(tmp_path, THEIRS, stdin=json.dumps([logits().tolist(), SEEN, CASES]))
    for case, theirs in zip(CASES, json.loads(said), strict=True):
        np.testing.assert_allclose(wanted(case), np.array(theirs, np.float64), rtol=1e-5)


def test_equal_scores_are_all_drawn_or_none() -> None:
    scores = np.log(np.array([[0.1, 0.3, 0.3, 0.2, 0.1]], np.float32))
    for how, kept in (
        ({"top_k": 1}, [1, 2]), ({"top_k": 3}, [1, 2, 3]), ({"top_p": 0.5}, [1, 2]), ({"top_p": 0.65}, [1, 2, 3]),
    ):  # fmt: skip
        found = filter_logits(jnp.asarray(scores), Sampling(1.0, **how).numbers())
        assert np.flatnonzero(np.isfinite(found[0])).tolist() == kept


SHARES = np.array([0.15, 0.5, 0.1, 0.25])


def test_draws_are_fair() -> None:
    scores, none = jnp.log(jnp.asarray(SHARES, jnp.float32))[None], jnp.zeros((1, 4), bool)
    steps = jnp.arange(4000)
    for top_p, kept in ((1.0, [0, 1, 2, 3]), (0.8, [0, 1, 3])):
        numbers = Sampling(1.0, top_p=top_p).numbers()
        found = jax.vmap(lambda step, numbers=numbers: draw(scores, none, numbers, jnp.uint32(0), step)[0])(steps)
        counts = np.bincount(np.asarray(found), minlength=4)
        assert np.flatnonzero(counts).tolist() == kept
        expected = 4000 * SHARES[kept] / SHARES[kept].sum()
        assert ((counts[kept] - expected) ** 2 / expected).sum() < 16.3  # one in a thousand is above


def test_the_likeliest_token_is_penalized_too() -> None:
    scores, before = jnp.array([[2.0, 1.9, -1.0]]), jnp.array([[True, False, False]])
    for penalty, token in ((1.0, 0), (1.2, 1)):
        numbers = Sampling(repetition_penalty=penalty).numbers()
        assert draw(scores, before, numbers, jnp.uint32(0), jnp.int32(0)).tolist() == [token]


# ------------------------------------------------------------------------------------------------ ends

WORDS = ["a", "b", "c", "ab", "bc", "<end>"]


@pytest.fixture
def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "a"))
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken("<end>", special=True)])
    return made


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ((), "abcabcc"), (("ca",), "ab"), (("b", "ca"), "a"), (("bcab", "c"), "a"), (("bcax", "cc"), "abcab"),
        (("abcabcc",), ""), (("ccc",), "abcabcc"), (("cc", "c"), "ab"), (("<end>",), "abc"),
    ],
)  # fmt: skip
def test_a_text_is_cut_before_the_first_stop_string(tokenizer: Tokenizer, stop: tuple[str, ...], text: str) -> None:
    tokens = [WORDS.index(word) for word in ("a", "bc", *(["<end>"] if "<end>" in stop else []), "ab", "c", "c")]
    for size in (1, 2, 5):
        found, parts = Continuation(tokenizer, [0], stop=stop), []
        for at in range(0, len(tokens), size):
            parts.append(found.add(tokens[at : at + size]))
            assert text.startswith("".join(parts))  # nothing is taken back
        assert "".join(parts) + found.end() == text
        assert found.over


def test_characters_come_whole() -> None:
    pieces = [f"<0x{byte:02X}>" for byte in "é😀".encode()]
    made = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate([*pieces, "n"])}, "n"))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    text = Continuation(made, [6])
    assert [text.add([i]) for i in (0, 1, 2, 3, 4, 5, 0, 6)] == ["", "é", "", "", "", "😀", "", "�n"]
    assert text.add([2]) + text.end() == "�"
