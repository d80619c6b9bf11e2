"""Continuations: the oracle's greedy ones, fair draws, few programs, and nothing of the padding in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import llama2c_oracle as oracle
import numpy as np
import pytest
import small_llama
from flax import nnx
from helpers import compilations

import aq_jax as aq
from aq_jax.nn.decoding import OVER, PIECE, SMALL_CHUNK, Texts, decode_tokens, split_prompt
from aq_jax.nn.generation_config import read_generation_config
from aq_jax.nn.generator import Generator
from aq_jax.nn.load import load_model
from aq_jax.nn.sampling import Sampling

PROMPT = [1, 270, 259, 263, 80]
LIMIT = small_llama.SHAPE["seq"]


def load(path: Path) -> Generator:
    found = load_model(path)
    assert isinstance(found, Generator)
    return found


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama.make(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="module")
def generator(table: Path) -> Generator:
    """One whose texts have no end."""
    found = load(table)
    assert found.eos_ids == (1, 2)
    return Generator(found.model, found.tokenizer)


@pytest.fixture(scope="module")
def greedy(table: Path) -> list[int]:
    """What follows PROMPT, by the oracle."""
    found = oracle.greedy(table.parent / small_llama.BIN, PROMPT, 64)
    assert len(set(found)) > 16
    return found


@pytest.fixture(scope="module")
def stopped_at(greedy: list[int]) -> int:
    """Where, in the first 11 of those, the last one stands that is new: it will be an end."""
    at = max(i for i in range(11) if greedy[i] not in greedy[:i])
    assert at > 6
    return at


@pytest.fixture(scope="module")
def stopping(generator: Generator, greedy: list[int], stopped_at: int) -> Generator:
    return Generator(generator.model, generator.tokenizer, (7, greedy[stopped_at]))


# ------------------------------------------------------------------------------------------------ greedy


def test_prompts_of_any_length_go_on_as_the_oracles(generator: Generator, greedy: list[int]) -> None:
    text = [*PROMPT, *greedy]
    for length in range(len(PROMPT), 17):
        assert generator.generate_ids(text[:length], 16) == text[length : length + 16]
    assert generator.generate_ids(np.array(PROMPT), 16) == greedy[:16]  # type: ignore[arg-type]


def test_fewer_tokens_are_the_first_of_more(generator: Generator, greedy: list[int]) -> None:
    for count in (1, 2, np.int64(15), 16):
        assert generator.generate_ids(PROMPT, count) == greedy[:count]


def test_the_likeliest_tokens_are_the_oracles_in_all_positions(
    generator: Generator, table: Path, greedy: list[int]
) -> None:
    assert generator.generate_ids([80], LIMIT - 1) == oracle.greedy(table.parent / small_llama.BIN, [80], LIMIT - 1)
    assert generator.generate_ids(PROMPT, 70)[:64] == greedy
    long = [*PROMPT, *greedy, *greedy][: LIMIT - 1]
    assert generator.generate_ids(long, 1) == oracle.greedy(table.parent / small_llama.BIN, long, 1)


@pytest.mark.parametrize("cache", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow), "int8"])
def test_prompts_of_a_batch_go_on_as_they_would_alone(generator: Generator, cache: Any) -> None:
    ids = [PROMPT, PROMPT[:1], [5, *PROMPT * 5]]
    for how in ({}, {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.3}):
        alone = [generator.generate_ids(each, 20, cache=cache, **how) for each in ids]
        assert generator.generate_ids(ids, 20, cache=cache, **how) == alone


def test_hidden_states_of_a_batch_are_those_alone(generator: Generator) -> None:
    """What decides the tokens: not only the likeliest of them."""
    ids = [PROMPT, [5, *PROMPT * 7]]
    found = []
    for batch in (ids, ids[:1], ids[1:]):
        texts = generator._decoding
        length = sum(split_prompt(max(map(len, batch))))
        padded = np.array([[0] * (length - len(each)) + each for each in batch], np.int32)
        first = np.array([length - len(each) for each in batch], np.int32)
        cache = generator.model.empty_cache(len(batch), 64)
        for at in range(0, length, SMALL_CHUNK):
            cache, hidden = texts._read(cache, padded[:, at : at + SMALL_CHUNK], np.int32(at), first)
        found.append(np.asarray(hidden))
    np.testing.assert_allclose(found[0], np.concatenate(found[1:]), atol=1e-5, rtol=0)


def test_a_prompt_is_read_in_chunks(generator: Generator, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aq_jax.nn.decoding.CHUNK", 64)
    ids = [*PROMPT * 14]
    assert split_prompt(70) == [64, 32]
    assert generator.generate_ids(ids, 4) == oracle.greedy(table.parent / small_llama.BIN, ids, 4)


def test_an_end_stops_the_text(stopping: Generator, generator: Generator, greedy: list[int], stopped_at: int) -> None:
    assert stopping.generate_ids(PROMPT, 16) == greedy[:stopped_at]
    # One in the prompt is not the text's.
    ids = [greedy[stopped_at], *PROMPT]
    assert stopping.generate_ids(ids, 1) == generator.generate_ids(ids, 1)
    # The first that follows may be one.
    assert stopping.generate_ids([*PROMPT, *greedy[:stopped_at]], 16) == []


def test_after_the_end_nothing_is_computed(stopping: Generator, greedy: list[int], stopped_at: int) -> None:
    run, model = stopping._decoding, stopping.model
    for count, last in ((16, stopped_at + 1), (3, 3)):  # an end, or the number of tokens
        pieces = list(run.run([PROMPT, [7]], [count, 1], Sampling(), 0))  # the second is over at once
        assert [token for piece in pieces for token in piece[0]] == greedy[:last]
        assert [len(piece[1]) for piece in pieces] == [1, *[0] * (len(pieces) - 1)]
    state = model.empty_cache(1, 64), np.int32([greedy[0]]), np.zeros((1, small_llama.VOCAB), bool), np.array([True])
    (cache, *_), tokens = run._decode(state, *numbers(16))
    assert not any(np.asarray(each.numbers).any() for layer in cache for each in layer)
    assert np.asarray(tokens).tolist() == [[OVER] * PIECE]


def numbers(count: int) -> tuple[Any, ...]:
    """The arguments of `decode_tokens` after its state, of a prompt of five tokens and its first one."""
    texts = Texts(np.zeros(1, np.int32), np.array([count], np.int32), Sampling().numbers(), np.uint32(0))
    return texts, np.int32(5), np.int32(1), np.int32(count - 1)


def test_ends_are_read_beside_the_table(table: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(table.parent, folder)
    config = json.loads((folder / "config.json").read_text())
    for said, generation, wanted in (
        ([1, 2], {}, (1, 2)), (2, {}, (2,)), (None, {}, ()), ([1, 2], {"eos_token_id": 5}, (5,)),
        (2, {"eos_token_id": [5, 7], "_from_model_config": True, "max_length": 20}, (5, 7)),
    ):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": said}))
        (folder / "generation_config.json").write_text(json.dumps(generation))
        assert load(folder / small_llama.TABLE).eos_ids == wanted


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({}, Sampling()),
        ({"do_sample": True}, Sampling(1.0, 50)),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0}, Sampling(0.6, 20, 0.95)),
        ({"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}, Sampling(0, 0, 0.9, 0, 1.1)),
        ({"num_beams": 1, "no_repeat_ngram_size": 0, "suppress_tokens": None}, Sampling()),
    ],
)
def test_a_model_says_how_its_tokens_are_chosen(tmp_path: Path, said: dict[str, Any], wanted: Sampling) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert read_generation_config(tmp_path, {"top_k": 3, "num_beams": 4}) == ((), wanted)
    of_config = {name: value for name, value in said.items() if name != "min_p"}
    assert read_generation_config(tmp_path / "none", of_config) == ((), wanted)  # as transformers, where no file is


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"eos_token_id": "a"}, "generation_config.json: eos_token_id is a; wanted an id, or a list of them"),
        ({"do_sample": "yes"}, "do_sample is 'yes'; wanted true or false"),
        ({"do_sample": True, "temperature": -1.0}, r"generation_config.json: temperature = -1\.0; wanted a finite"),
    ],
)
def test_a_model_that_says_it_badly_is_refused(tmp_path: Path, said: dict[str, Any], message: str) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    with pytest.raises(aq.FormatError, match=message):
        read_generation_config(tmp_path, {})


def test_what_a_model_says_and_is_not_done_is_noted(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"num_beams": 4, "bad_words_ids": [[3]]}))
    message = r"{}: has num_beams = 4, bad_words_ids = \[\[3\]\], which is not applied"
    with pytest.warns(UserWarning, match=message.format("generation_config.json")):
        read_generation_config(tmp_path, {})
    with pytest.warns(UserWarning, match=message.format("config.json")):
        read_generation_config(tmp_path / "none", {"num_beams": 4, "bad_words_ids": [[3]], "hidden_size": 8})


# ------------------------------------------------------------------------------------------------ programs


def test_programs_are_few(generator: Generator, greedy: list[int]) -> None:
    text = "the an then ab é\n the"
    ids = [*PROMPT, *greedy]
    generator.generate_ids(ids[:3], 2)
    generator.score(text)
    before = generator.compiles
    assert 3 < len(generator.tokenizer.encode(text).ids) <= 16
    with compilations() as programs:
        for count in range(1, 17):
            generator.generate_ids(ids[:3], count, temperature=count / 4, top_p=0.5 + count / 32, seed=count)
        for length in range(3, 17):
            generator.generate_ids(ids[:length], length)
        for end in range(1, len(text)):
            generator.score(text[:end])
    assert (generator.compiles, programs) == (before, [])
    with compilations() as programs:
        for length in (33, 40, 60):  # more chunks; a cache of twice the size
            generator.generate_ids(ids[:length], 2, temperature=1.0)
    assert generator.compiles <= before + 2
    assert len(programs) <= 4  # and what allocates the cache


def equations(jaxpr: Any) -> int:
    """With those of loops and branches."""
    inner = [value for eqn in jaxpr.eqns for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns"))]
    parts = [getattr(value, "jaxpr", value) for value in inner]
    return len(jaxpr.eqns) + sum(equations(part) for part in parts if hasattr(part, "eqns"))


def test_the_program_does_not_grow_with_the_text(generator: Generator) -> None:
    graph, state = nnx.split(generator.model)

    def size(positions: int) -> int:
        def run(state: Any, *rest: Any) -> Any:
            return decode_tokens(nnx.merge(graph, state), *rest, eos_ids=(1, 2))

        cache, token = generator.model.empty_cache(1, positions), np.zeros(1, np.int32)
        carry = cache, token, np.zeros((1, small_llama.VOCAB), bool), np.zeros(1, bool)
        return equations(jax.make_jaxpr(run)(state, carry, *numbers(16)).jaxpr)

    assert size(64) == size(256) > 200


# ------------------------------------------------------------------------------------------------ draws


def test_a_temperature_flattens_what_is_drawn_from(generator: Generator, table: Path) -> None:
    logits = oracle.logits(table.parent / small_llama.BIN, PROMPT)[-1].astype(np.float64)
    for temperature in (0.5, 1.0, 2.0):
        shares = np.exp(logits / temperature)
        shares /= shares.sum()
        draws = [generator.generate_ids(PROMPT, 1, temperature=temperature, seed=seed)[0] for seed in range(400)]
        # The mean of the drawn logits is theirs.
        mean = shares @ logits
        deviation = np.sqrt(shares @ (logits - mean) ** 2 / 400)
        assert abs(logits[draws].mean() - mean) < 4 * deviation


def test_a_seed_is_a_text(generator: Generator, greedy: list[int]) -> None:
    def draw(seed: int, **how: float) -> list[int]:
        return generator.generate_ids(PROMPT, 16, seed=seed, **({"temperature": 1.0} | how))

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(8)}) == 8
    assert draw(1)[:7] == generator.generate_ids(PROMPT, 7, temperature=1.0, seed=1)
    assert draw(1, top_k=1) == draw(2, min_p=1.0) == greedy[:16]
    # Each step has a draw of its own: nearly all of 16 out of 300 are different.
    assert len(set(draw(1, temperature=1e6))) > 12
    for seed in range(3):
        assert draw(seed, top_p=1e-9) == greedy[:16]
        assert draw(seed, temperature=1e-5) == greedy[:16]
        assert draw(seed, temperature=0.0, top_p=0.1) == greedy[:16]


# ------------------------------------------------------------------------------------------------ texts

TEXTS = ["the an then ab é\n the", "", " ", "than 😀", "😀", "a\ud800b"]


@pytest.mark.parametrize("prompt", TEXTS)
def test_a_continuation_is_what_follows_the_prompt(generator: Generator, prompt: str) -> None:
    ids = generator.tokenizer.encode(prompt.replace("\ud800", "�")).ids
    decode = generator.tokenizer.decode
    assert decode(ids) == prompt.replace("\ud800", "�")
    for seed in range(6):
        new = generator.generate_ids(ids, 16, temperature=1.0, seed=seed)
        text = generator.generate(prompt, 16, temperature=1.0, seed=seed)
        whole = decode([*ids, *new])
        # Half a character after a whole one makes all its bytes unreadable in a whole text, but not as they come.
        assert decode(ids) + text == whole or "�" in whole
        assert "".join(generator.stream(prompt, 16, temperature=1.0, seed=seed)) == text


def test_stop_strings_end_texts_of_a_batch_each_for_itself(generator: Generator) -> None:
    prompts = ["the an", "than", "é"]
    for seed in range(3):
        texts = generator.generate(prompts, 24, temperature=1.0, seed=seed)
        stop = [texts[0][5:7], texts[1][3]]
        wanted = [
            min((text[:at] for each in stop if (at := text.find(each)) >= 0), key=len, default=text) for text in texts
        ]
        assert generator.generate(prompts, 24, temperature=1.0, seed=seed, stop=stop) == wanted != texts
        assert "".join(generator.stream(prompts[0], 24, temperature=1.0, seed=seed, stop=stop)) == wanted[0]


def test_no_prompts_have_no_continuations(generator: Generator) -> None:
    assert generator.generate([]) == []


def test_a_models_own_choice_is_the_default(generator: Generator) -> None:
    own = Generator(generator.model, generator.tokenizer, (), Sampling(1.0, repetition_penalty=1.5))
    wanted = generator.generate("the", 16, temperature=1.0, repetition_penalty=1.5, seed=2)
    assert own.generate("the", 16, seed=2) == wanted != generator.generate("the", 16)
    assert own.generate("the", 16, temperature=0.0, repetition_penalty=1.0) == generator.generate("the", 16)


def test_scores_are_the_oracles(generator: Generator, table: Path) -> None:
    for text in TEXTS[:1] + TEXTS[3:4]:
        ids = oracle.encode(table.parent / small_llama.TOKENIZER, small_llama.VOCAB, text)
        logits = oracle.logits(table.parent / small_llama.BIN, ids[:-1]).astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        found = generator.score(text)
        assert (found.shape, found.dtype) == ((len(ids) - 1,), np.float32)
        np.testing.assert_allclose(found, logs[np.arange(len(ids) - 1), ids[1:]], atol=1e-5, rtol=0)


def test_a_score_takes_as_many_tokens_as_the_model(generator: Generator) -> None:
    longest = "b" * (LIMIT - 2)
    assert generator.score(longest).shape == (LIMIT - 1,)
    with pytest.raises(aq.AqError, match=f"score: the text has {LIMIT + 1} tokens; wanted 2 to {LIMIT}"):
        generator.score(longest + "b")


def test_of_a_long_prompt_the_first_token_and_the_end_are_kept(generator: Generator) -> None:
    ids = [*PROMPT * 20, 270]
    note = f"^the prompt has 101 tokens, of which the first and the last {LIMIT - 17} are kept$"
    with pytest.warns(UserWarning, match=note) as caught:
        found = generator.generate_ids(ids, 16)
    assert caught[0].filename == __file__
    assert ids[0] != ids[16 - LIMIT]
    assert found == generator.generate_ids([ids[0], *ids[17 - LIMIT :]], 16)
    text = "b" * 99
    assert generator.tokenizer.encode(text).ids[2:] == [generator.tokenizer.token_to_id("b")] * 99
    with pytest.warns(UserWarning, match=note) as caught:
        assert generator.generate(text, 16)
    assert caught[0].filename == __file__


def test_a_text_ends_where_positions_end(generator: Generator) -> None:
    ids = [*PROMPT * 18]
    found = generator.generate_ids(ids, 1000)
    assert found == generator.generate_ids(ids, 16)[: LIMIT - len(ids)]
    assert 0 < len(found) <= LIMIT - len(ids)


def test_limits_of_a_tokenizer_are_not_those_of_the_model(table: Path) -> None:
    found = load(table)
    found.tokenizer.enable_truncation(3)
    found.tokenizer.enable_padding(length=20)
    again = Generator(found.model, found.tokenizer, found.eos_ids)
    assert len(again.tokenizer.encode("bbbbbbb").ids) == 9


NAN = float("nan")
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"max_tokens": 0}, "generate: max_tokens = 0; wanted an integer, 1 or more"),
    "fewer": ({"max_tokens": -1}, "max_tokens = -1; wanted an integer, 1 or more"),
    "half a token": ({"max_tokens": 1.5}, r"max_tokens = 1\.5; wanted an integer"),
    "a count as text": ({"max_tokens": "4"}, "max_tokens = '4'; wanted an integer"),
    "a count that is none": ({"max_tokens": None}, "max_tokens = None; wanted an integer"),
    "a count that is a truth": ({"max_tokens": True}, "max_tokens = True; wanted an integer"),
    "a seed too large": ({"seed": 2**32}, "seed = 4294967296; wanted an integer from 0 to 4294967295"),
    "a seed as text": ({"seed": "1"}, "seed = '1'; wanted an integer"),
    "no id": ({"ids": []}, "generate: found no ids; wanted one or more"),
    "an id too large": ({"ids": [1, small_llama.VOCAB]}, f"ids from 1 to {small_llama.VOCAB}; wanted a list of inte"),
    "a negative id": ({"ids": [1, -1]}, "ids from -1 to 1; wanted a list of integers from 0 to"),
    "half an id": ({"ids": [1, 0.5]}, r"generate: found ids of float64, shape \[2\]; wanted a list of integers"),
    "lists beside an id": ({"ids": [2, [1]]}, "generate: found ids that are lists and numbers"),
    "a temperature of NaN": ({"temperature": NAN}, "temperature = nan; wanted a finite number, 0 or more"),
    "a negative temperature": ({"temperature": -0.5}, r"temperature = -0\.5; wanted"),
    "an endless temperature": ({"temperature": float("inf")}, "temperature = inf; wanted"),
    "a temperature as text": ({"temperature": "0.5"}, r"generate: temperature = '0\.5'; wanted a finite number"),
    "no temperature": ({"temperature": None}, "temperature = None; wanted a finite number"),
    "a number below none": ({"top_k": -1}, "top_k = -1; wanted an integer from 0, for all tokens"),
    "half a number": ({"top_k": 2.5}, r"top_k = 2\.5; wanted an integer"),
    "more than the best": ({"min_p": 1.5}, r"min_p = 1\.5; wanted a number from 0 to 1"),
    "a penalty of nothing": ({"repetition_penalty": 0}, "repetition_penalty = 0; wanted a finite number above 0"),
    "a cache of another type": ({"cache": "int4"}, "cache = 'int4'; wanted one of float32, bfloat16, int8"),
    "an empty stop": ({"stop": ["a", ""]}, "generate: stop has ''; wanted strings of one character or more"),
    "a stop that is a number": ({"stop": [3]}, "generate: stop has 3; wanted strings"),
    "a number for a stop": ({"stop": 3}, "generate: stop has 3; wanted strings"),
    "a stop of ids": ({"stop": "a"}, "generate_ids: stop = .* wanted none, as ids have no text"),
    "a share as text": ({"top_p": "0.5"}, r"generate: top_p = '0\.5'; wanted a number above 0, at most 1"),
    "a share that is a truth": ({"top_p": True}, "top_p = True; wanted a number above 0"),
    "nothing to draw from": ({"top_p": 0.0}, "top_p = 0.0; wanted"),
    "more than everything": ({"top_p": 1.5}, "top_p = 1.5; wanted"),
    "a share of NaN": ({"top_p": NAN}, "top_p = nan; wanted"),
}


@pytest.mark.parametrize("what", WRONG)
def test_numbers_out_of_range_are_refused(generator: Generator, what: str) -> None:
    given, message = WRONG[what]
    with pytest.raises(aq.AqError if "id" in what.split() else aq.ConfigError, match=message):
        generator.generate_ids(**{"ids": PROMPT, "max_tokens": 4, **given})


def test_what_is_no_text_is_refused(generator: Generator) -> None:
    with pytest.raises(aq.AqError, match="generate: the prompt is int; wanted a string"):
        generator.generate(["the", 3])  # type: ignore[list-item]
    with pytest.raises(aq.AqError, match="generate: the prompt is int; wanted a string"):
        generator.generate(3)  # type: ignore[arg-type]
    with pytest.raises(aq.AqError, match="generate: the prompt is dict; wanted a string"):
        generator.generate({"the": 3})  # type: ignore[arg-type]
    assert generator.generate("the", 4, stop=None) == generator.generate("the", 4)
    with pytest.raises(TypeError, match=r"generate: unknown heat; known are temperature, top_k, .* seed, stop, cache"):
        generator.generate("the", heat=1)  # type: ignore[call-arg]
    with pytest.raises(aq.AqError, match="score: the text is int; wanted a string"):
        generator.score(3)  # type: ignore[arg-type]
    with pytest.raises(aq.AqError, match="score: the text has 1 tokens; wanted 2 to 96"):
        generator.score("")


def test_options_of_draws_without_a_temperature_are_warned_of(generator: Generator) -> None:
    with pytest.warns(UserWarning, match="generate: top_p, seed: without effect at temperature 0"):
        generator.generate("the", 2, top_p=0.5, seed=3)
    assert generator.generate("the", 2, temperature=0, top_p=0.5) == generator.generate("the", 2)
