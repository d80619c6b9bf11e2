"""Sentences to embeddings: order, batches, padding and what callers may hand over. The model is small and random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bert_oracle as oracle
import jax
import numpy as np
import pytest
import small_bert
from helpers import compilations
from hypothesis import given
from hypothesis import strategies as st

import aq_jax as aq
from aq_jax.core.dispatch import ACTIVATIONS, TOKENS, backend
from aq_jax.nn.encoder import Encoder, make_batches
from aq_jax.nn.layers import batch_tokens
from aq_jax.nn.load import load_model

# Every program is compiled for a second or more: there is one layer, and sentences are short or long.
CONFIG = {**oracle.CONFIG, "num_hidden_layers": 1}
LONGEST = CONFIG["max_position_embeddings"]
SHORT, LONG = (3, 16), (200, 250)
CLS, SEP = 2, 3


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With eight bits, one grid a channel."""
    return small_bert.make(tmp_path_factory.mktemp("bert"), "int8", CONFIG)


@pytest.fixture(scope="module")
def encoders(table: Path) -> dict[str, Encoder]:
    """One for each kind of activations, which all tests share: what one has compiled is there for the next."""
    return {how: load_model(table, how) for how in ACTIVATIONS}


@pytest.fixture
def encoder(encoders: dict[str, Encoder]) -> Encoder:
    return encoders["float32"]


@pytest.fixture(params=ACTIVATIONS)
def each(request: pytest.FixtureRequest, encoders: dict[str, Encoder]) -> Encoder:
    return encoders[request.param]


@pytest.fixture(scope="module")
def exact(table: Path) -> Callable[[list[str]], np.ndarray]:
    """Texts to embeddings by the oracle."""
    tensors, tokenizer = aq.load(table, "numpy"), oracle.tokenizer()
    tokenizer.enable_truncation(LONGEST)
    return lambda texts: oracle.embed(tensors, [tokenizer.encode(text).ids for text in texts], CONFIG)


def sentences(count: int, sizes: tuple[int, int], seed: int = 0) -> list[str]:
    """Of so many tokens, of which two are special; every length comes up about equally often."""
    rng = np.random.default_rng(seed)
    return [
        " ".join(rng.choice(oracle.WORDS, size=size - 2)) for size in rng.integers(sizes[0], sizes[1] + 1, size=count)
    ]


def by_hand(rows: list[list[int]], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and lengths as the encoder's program takes them; missing rows are empty."""
    ids, lengths = np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)], lengths[i] = row, len(row)
    return ids, lengths


def batch_of(length: int) -> tuple[int, int]:
    return max(1, TOKENS[backend()] // length), length


def test_embeddings_come_in_the_order_of_the_sentences(encoder: Encoder, exact: Callable) -> None:
    texts = [text for pair in zip(sentences(20, SHORT), sentences(20, LONG), strict=True) for text in pair]
    found = encoder.encode(texts)
    assert isinstance(found, jax.Array)
    assert (found.shape, found.dtype) == ((40, 32), np.float32)
    np.testing.assert_allclose(found, exact(texts), atol=2e-6)
    np.testing.assert_array_equal(encoder.encode(text for text in texts), found)
    few = texts[::8]  # these run one by one
    np.testing.assert_allclose(encoder.encode(few), exact(few), atol=2e-6)


def test_ids_are_embedded_as_their_texts(encoder: Encoder) -> None:
    texts = sentences(70, SHORT, seed=5)
    ids = [encoding.ids for encoding in oracle.tokenizer().encode_batch(texts)]
    np.testing.assert_array_equal(encoder.encode_ids(ids), encoder.encode(texts))


def test_a_sentence_does_not_depend_on_its_neighbours(each: Encoder) -> None:
    """Bit for bit: the same program, other sentences beside it, and another row."""
    rows, _ = batch_of(16)
    some, others, one = sentences(2 * rows, SHORT, 1), sentences(2 * rows, SHORT, 2), "the quick cats jump over"
    before = np.asarray(each.encode([*some[: rows + 4], one]))[-1]
    compiles = each.compiles
    for i in (0, 3, rows):
        after = np.asarray(each.encode([*others[:i], one, *others[i:]]))[i]
        assert after.tobytes() == before.tobytes()
    assert each.compiles == compiles


def test_rows_of_one_program_do_not_see_each_other(each: Encoder) -> None:
    """By hand, with neighbours that are empty, full, and the same once more."""
    one, full = [CLS, *range(20, 30), SEP], [CLS, *[40] * 14, SEP]
    alone = np.asarray(each._embed(*by_hand([one], batch_of(16))))
    beside = np.asarray(each._embed(*by_hand([one, full, one, [CLS, SEP]], batch_of(16))))
    moved = np.asarray(each._embed(*by_hand([full, [], full, one], batch_of(16))))
    assert alone[0].tobytes() == beside[0].tobytes() == beside[2].tobytes() == moved[3].tobytes()
    assert np.isfinite(alone).all()  # rows that only fill up the batch too


def test_padding_changes_rounding_only(each: Encoder) -> None:
    rows = [[CLS, *range(20, 20 + n), SEP] for n in (0, 1)] + [[CLS, *range(50, 50 + n), SEP] for n in (7, 13)]
    short = np.asarray(each._embed(*by_hand(rows, batch_of(16))))[:4]
    pairs = [each._embed(*by_hand(rows[i : i + 2], batch_of(256)))[:2] for i in (0, 2)]
    assert oracle.cosines(short, np.concatenate(pairs)).min() >= 0.9999
    ids, lengths = by_hand(rows[2:], batch_of(256))
    ids[np.arange(256) >= lengths[:, None]] = 77  # what stands in the padding means nothing
    assert np.asarray(each._embed(ids, lengths))[:2].tobytes() == np.asarray(pairs[1]).tobytes()


@pytest.mark.parametrize("how", ["float32", "int8"])
def test_a_short_sentence_beside_long_ones(encoders: dict[str, Encoder], how: str) -> None:
    each = encoders[how]
    short = sentences(8, (3, 12), seed=3)
    alone = np.concatenate([np.asarray(each.encode([text])) for text in short])
    beside = np.asarray(each.encode([*short, *sentences(5, LONG)]))[: len(short)]
    assert oracle.cosines(alone, beside).min() >= 0.9999


def test_rounded_activations_stay_near(encoders: dict[str, Encoder], exact: Callable) -> None:
    texts = sentences(100, SHORT)
    for how, least in (("float32", 1 - 1e-9), ("bfloat16", 0.9995), ("int8", 0.998)):
        near = oracle.cosines(encoders[how].encode(texts), exact(texts))
        assert near.min() >= least, (how, near.min())
        assert (near.min() < 1 - 1e-7) == (how != "float32"), f"{how} rounds nothing"


def test_no_sentences_have_no_embeddings(encoder: Encoder) -> None:
    found = encoder.encode([])
    assert (found.shape, found.dtype) == ((0, 32), np.float32)


def test_any_string_has_an_embedding(encoder: Encoder, exact: Callable) -> None:
    odd = [
        "",
        " ",
        "\0",
        "🙂",
        "e\u0301 \u202e",
        "\ud83d",
        "\ud83d\ude42",
        "a\udfffb",
        "\ufffd",
        "[SEP] [PAD]",
        "0" * 99,
    ]
    found = np.asarray(encoder.encode(odd))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    at = dict(zip(odd, found, strict=True))
    np.testing.assert_array_equal(at["\ud83d\ude42"], at["🙂"])  # two surrogates that belong together
    np.testing.assert_array_equal(at["\ud83d"], at["\ufffd"])  # and one alone
    np.testing.assert_allclose(at[""], exact([""])[0], atol=2e-6)


def test_what_is_too_long_is_cut_and_said(encoder: Encoder, exact: Callable) -> None:
    text = "the red sun runs over a small house " * 3000
    assert len(text) > 100_000
    just_right = " ".join(["sea"] * (LONGEST - 2))
    with pytest.warns(UserWarning, match=f"^2 of 4 texts are longer than {LONGEST} tokens, and were cut$") as caught:
        found = encoder.encode([text, "the sea", just_right, just_right + " sea"])
    assert caught[0].filename == __file__
    np.testing.assert_allclose(found, exact([text, "the sea", just_right, just_right]), atol=2e-6)
    encoder.encode([just_right] * 2)  # no warning: it would be an error


@pytest.mark.parametrize(
    ("texts", "found"), [("one", "str"), ([b"bytes"], "others"), (["a", None], "others"), ([["a"]], "others")]
)
def test_what_is_no_list_of_strings_is_refused(encoder: Encoder, texts: object, found: str) -> None:
    with pytest.raises(aq.AqError, match=f"encode: wanted a list of strings, found {found}"):
        encoder.encode(texts)


@pytest.mark.parametrize("dim", [0, 33, 2.0, True])
def test_more_dimensions_than_there_are_and_none_are_refused(encoder: Encoder, dim: object) -> None:
    width = encoder.model.config.hidden_size
    assert width == 32
    with pytest.raises(aq.AqError, match=f"truncate_dim = {dim}; wanted 1 to {width}, or None"):
        encoder.encode(["the sea"], truncate_dim=dim)


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([[2, 3], [2.0, 3.0]], r"text 1: found ids of float64, shape \[2\]"),
        ([[True, False]], "text 0: found ids of bool"),
        ([["2"]], "text 0: found ids of <U1"),
        ([2, 3], r"text 0: found ids of int64, shape \[\]"),
        ([[2, 3], [2, 100]], "text 1: found ids from 2 to 100"),
        ([[-1, 3]], "text 0: found ids from -1 to 3"),
    ],
)
def test_ids_that_are_no_tokens_are_refused(encoder: Encoder, ids: list, found: str) -> None:
    with pytest.raises(aq.AqError, match=f"^encode_ids: {found}.*; wanted a list of integers from 0 to 99$"):
        encoder.encode_ids(ids)


def test_progress_is_told(encoder: Encoder) -> None:
    told: list[tuple[str, int, int]] = []
    texts = sentences(75, SHORT)
    found = encoder.encode(texts, lambda *step: told.append(step))
    rows = batch_tokens(encoder.model) // 16
    assert told == [("embedding", min(rows, 75 - i), 75) for i in range(0, 75, rows)]
    np.testing.assert_array_equal(found, encoder.encode(texts))


def test_many_lengths_are_few_programs(tmp_path: Path) -> None:
    """As XLA and the encoder count them: one program for each padded length, and for each of single sentences."""
    config = {**CONFIG, "hidden_size": 16, "num_attention_heads": 1}
    encoder = load_model(small_bert.make(tmp_path, None, config))
    texts = sentences(1200, (3, LONGEST))
    ids = [encoding.ids for encoding in oracle.tokenizer().encode_batch(texts)]
    lengths = set(map(len, ids))
    assert (min(lengths), max(lengths)) == (3, LONGEST)
    assert len(lengths) > 200
    with compilations() as programs:
        found = np.asarray(encoder.encode(texts))
        assert 1 <= encoder.compiles == len(programs) <= 7
        batched = len(programs)
        encoder.encode(texts[::-4])
        assert encoder.compiles == len(programs) == batched
        for text in sentences(20, SHORT):
            encoder.encode([text])
        assert encoder.compiles == len(programs) == batched + 1
    some = [0, 500, 1199]
    wanted = oracle.embed(oracle.weights(config), [ids[i] for i in some], config)
    np.testing.assert_allclose(found[some], wanted, atol=2e-6)


calls = given(
    st.lists(st.integers(0, 300), max_size=120), st.integers(1, 600), st.sampled_from([1, 7, 64, 512, 513, 16384])
)


@calls
def test_every_sentence_runs_once(lengths: list[int], longest: int, tokens: int) -> None:
    members = [member for batch, _, _ in make_batches(lengths, longest, tokens) for member in batch]
    assert sorted(members) == list(range(len(lengths)))


@calls
def test_sentences_fit_their_batch(lengths: list[int], longest: int, tokens: int) -> None:
    for members, rows, length in make_batches(lengths, longest, tokens):
        assert 1 <= len(members) <= rows
        assert all(lengths[member] <= length or length == longest for member in members)
        assert length <= longest
        assert rows * length <= max(tokens, length)


@calls
def test_programs_are_few(lengths: list[int], longest: int, tokens: int) -> None:
    """One number of rows for each padded length, and those are powers of two, 24, 48, or the longest."""
    found = list(make_batches(lengths, longest, tokens))
    shapes = {(rows, length) for _, rows, length in found}
    assert len({length for _, length in shapes}) == len(shapes)
    assert all(length in (24, 48, longest) or (length >= 16 and length.bit_count() == 1) for _, length in shapes)
    if any(rows > 1 for rows, _ in shapes):
        assert all(rows == max(1, tokens // length) for rows, length in shapes)


@calls
def test_little_of_a_batch_is_padding(lengths: list[int], longest: int, tokens: int) -> None:
    """Longest first: only the last batch may lack sentences, and no batch is longer than its longest sentence wants."""
    found = list(make_batches(lengths, longest, tokens))
    assert all(len(members) == rows for members, rows, _ in found[:-1])
    assert [length for _, _, length in found] == sorted((length for _, _, length in found), reverse=True)
    for members, _, length in found:
        most = max(lengths[member] for member in members)
        assert length == min(longest, 16) or length < 2 * most


def test_few_sentences_run_one_by_one() -> None:
    assert [rows for _, rows, _ in make_batches([10] * 16, 256, 512)] == [1] * 16
    assert [rows for _, rows, _ in make_batches([10] * 17, 256, 512)] == [32]
    # Or in smaller batches, which also are of one size.
    assert [(len(batch), rows) for batch, rows, _ in make_batches([10] * 16, 256, 512, 128)] == [(8, 8), (8, 8)]
    assert [(len(batch), rows) for batch, rows, _ in make_batches([100, 10], 256, 512, 64)] == [(1, 1), (1, 4)]
