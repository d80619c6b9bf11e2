"""Outputs of models beside those of the float model."""

from __future__ import annotations

import numpy as np
import pytest
import small_bert
import small_llama
import small_validation

import aq_jax as aq
from aq_jax.calibration.text import Text
from aq_jax.errors import AqError
from aq_jax.nn import Encoder, Generator
from aq_jax.validate.data import HeldOut, Pairs
from aq_jax.validate.metrics import spearman
from aq_jax.validate.outputs import EncoderJudge, GeneratorJudge, time_in_turns


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    model = aq.load_model(small_llama.make(tmp_path_factory.mktemp("llama")))
    assert isinstance(model, Generator)
    return model


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    model = aq.load_model(small_bert.make(tmp_path_factory.mktemp("bert"), None, small_validation.BERT))
    assert isinstance(model, Encoder)
    return model


def test_log_probabilities_are_of_every_token_and_agree_with_the_score(llama: Generator) -> None:
    ids = llama.tokenizer.encode("the ab an the").ids
    found = llama.log_probabilities(ids)
    assert found.shape == (len(ids) - 1, small_llama.VOCAB)
    assert np.exp(found).sum(1) == pytest.approx(1, abs=1e-5)
    assert np.array_equal(found[np.arange(len(ids) - 1), ids[1:]], np.asarray(llama.score("the ab an the")))


@pytest.mark.parametrize("ids", [[], [1], [1] * 97, [1, 10**6]])
def test_ids_that_have_none_are_refused(llama: Generator, ids: list[int]) -> None:
    with pytest.raises(AqError, match="log_probabilities: found"):
        llama.log_probabilities(ids)


def test_texts_that_the_model_cannot_take_are_cut_or_left_out(llama: Generator) -> None:
    limit = llama.model.config.max_position_embeddings
    judge = GeneratorJudge(llama, HeldOut(Text("t", ("the ab " * 200, "an"), 0), 0, None))
    found = judge.outputs(llama)
    assert found["tokens"] == limit - 1 + len(llama.tokenizer.encode("an").ids) - 1
    assert (found["kl"]["mean"], found["same_top"]["rate"], found["perplexity"]["ratio"]) == (0, 1, 1)


def test_windows_are_cut_where_they_end(llama: Generator) -> None:
    text, ids = "the ab " * 200, llama.tokenizer.encode("the ab " * 200).ids
    held = HeldOut(Text("t", (text, f"an {text}", "an"), 0), 0, None)
    found = GeneratorJudge(llama, held, 20).outputs(llama)
    assert found["tokens"] == 19 + 19 + len(llama.tokenizer.encode("an").ids) - 1
    scores = [np.asarray(llama.score(each)) for each in (llama.tokenizer.decode(ids[:20]), "an")]
    assert len(scores[0]) == 19
    assert found["perplexity"]["standard_error"] > 0


def test_an_encoder_is_as_good_as_itself(bert: Encoder, rng: np.random.Generator) -> None:
    lines = tuple(" ".join(rng.choice(small_validation.WORDS, 4)) for _ in range(60))
    pairs = tuple((lines[i], lines[i + 1], float(i % 7)) for i in range(20))
    found = EncoderJudge(bert, HeldOut(Text("t", lines, 0), 0, Pairs("p", pairs, 0))).outputs(bert)
    assert found["cosine"]["mean"] == pytest.approx(1, abs=1e-6)
    assert found["cosine"]["count"] == 60
    firsts, seconds = (np.asarray(bert.encode([pair[i] for pair in pairs])) for i in (0, 1))
    wanted = 100 * spearman(np.sum(firsts * seconds, axis=1), [score for *_, score in pairs])
    own = found["spearman"]["float"]
    assert own == pytest.approx(wanted, abs=0.5)
    assert found["spearman"] == {"float": own, "quantized": own, "loss": 0}


def test_both_are_timed_in_turns() -> None:
    calls: list[str] = []
    found = time_in_turns(lambda: calls.append("one"), lambda: calls.append("other"), 10)
    assert calls == ["one", "other"] * (len(calls) // 2)
    assert min(found.values()) > 0
