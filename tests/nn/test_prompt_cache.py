"""Texts that begin as the one before them: they go on as without a cache, and only what is new is read."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small_llama
from hypothesis import given, settings
from hypothesis import strategies as st

import aq_jax as aq
from aq_jax.nn import Generator, PromptCache, decoding
from aq_jax.nn.decoding import SMALL_CHUNK

LONGEST, COUNT = 60, 6


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    """One whose texts have no end."""
    found = aq.load_model(small_llama.make(tmp_path_factory.mktemp("model"), seed=1))
    assert isinstance(found, Generator)
    return Generator(found.model, found.tokenizer)


@contextmanager
def tokens_read(generator: Generator) -> Iterator[list[int]]:
    """Collects the number of tokens of each chunk of a prompt that is read."""
    found: list[int] = []
    read = generator._decoding._read

    def counted(state: Any, ids: np.ndarray, *arrays: Any) -> Any:
        found.append(ids.shape[1])
        return read(state, ids, *arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator._decoding, "_read", counted)
        yield found


PROMPTS = st.lists(st.integers(3, small_llama.VOCAB - 1), min_size=1, max_size=8)


@settings(max_examples=12)
@given(start=PROMPTS, turns=st.lists(st.tuples(st.integers(0, LONGEST), PROMPTS), min_size=2, max_size=6))
def test_any_texts_go_on_as_without(generator: Generator, start: list[int], turns: list[tuple[int, list[int]]]) -> None:
    cache, text = PromptCache(), start
    with pytest.MonkeyPatch.context() as patch:  # of larger chunks, most of such short texts would be read anew
        patch.setattr(decoding, "SMALL_CHUNK", 4)
        patch.setattr(decoding, "CHUNK", 16)
        for kept, new in turns:
            found = generator.generate_ids(text, COUNT, prompt_cache=cache)
            assert found == generator.generate_ids(text, COUNT)
            text = [*text, *found][: max(1, kept)] + new


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_long_chat_reads_what_is_new(generator: Generator, kind: Any) -> None:
    cache, text = PromptCache(), [1, *range(100, 124)]
    how = {"temperature": 0.9, "seed": 5, "repetition_penalty": 1.2, "cache": kind}
    small = 0
    with tokens_read(generator) as read:
        for turn in range(5):
            read.clear()
            answer = generator.generate_ids(text, COUNT, prompt_cache=cache, **how)
            assert sum(read) == SMALL_CHUNK
            small = small or cache.nbytes
            assert answer == generator.generate_ids(text, COUNT, **how)
            assert sum(read) == (2 if turn == 0 else 3) * SMALL_CHUNK
            text = [*text, *answer, 200 + turn, 250 + turn]
    assert cache.nbytes == 2 * small  # it has grown: from 64 positions to 128


def test_another_type_of_cache_begins_anew(generator: Generator) -> None:
    cache, text = PromptCache(), [1, *range(100, 139)]
    generator.generate_ids(text, COUNT, prompt_cache=cache)
    with tokens_read(generator) as read:
        found = generator.generate_ids(text, COUNT, prompt_cache=cache, cache="int8")
        assert sum(read) == 2 * SMALL_CHUNK
    assert found == generator.generate_ids(text, COUNT, cache="int8")


def test_a_text_that_is_left_is_known_as_far_as_it_came(generator: Generator) -> None:
    cache, prompt = PromptCache(), "the day " * 6
    wanted = generator.generate(prompt, 12)
    stream = generator.stream(prompt, 12, prompt_cache=cache)
    for _ in range(3):
        next(stream)
    assert cache.nbytes == 0  # the stream writes over it
    assert generator.generate(prompt, 12, prompt_cache=cache) == wanted
    stream.close()
    with tokens_read(generator) as read:
        assert generator.generate(prompt, 12, prompt_cache=cache) == wanted
        assert sum(read) == SMALL_CHUNK


def test_what_an_interrupted_program_has_is_not_kept(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PromptCache()

    def interrupt(state: Any, *_: Any) -> Any:
        jax.tree.map(lambda each: each.delete(), state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generator._decoding, "_decode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            generator.generate_ids([1, 5, 9], COUNT, prompt_cache=cache)
    assert cache.nbytes == 0
    assert generator.generate_ids([1, 5, 9], COUNT, prompt_cache=cache) == generator.generate_ids([1, 5, 9], COUNT)


def test_what_it_cannot_be_used_for_is_refused(generator: Generator, tmp_path: Path) -> None:
    cache = PromptCache()
    with pytest.raises(aq.ConfigError, match="generate: prompt_cache is dict; wanted a PromptCache"):
        generator.generate("the", prompt_cache={})  # type: ignore[typeddict-item]
    with pytest.raises(aq.AqError, match="generate: found a prompt_cache and 2 prompts; wanted one prompt"):
        generator.generate(["the", "a"], prompt_cache=cache)
    stream = generator.stream("the", prompt_cache=cache)
    aq.load_model(small_llama.make(tmp_path, seed=2)).generate("the", prompt_cache=cache)
    with pytest.raises(aq.ConfigError, match="prompt_cache holds a text of another model; wanted one cache for each"):
        next(stream)


def test_of_a_text_that_begins_anew_no_cache_is_held_twice(generator: Generator) -> None:
    cache = PromptCache()
    generator.generate_ids([1, *[5] * 20], COUNT, prompt_cache=cache)
    gc.collect()
    before, kept = live_bytes(), cache.nbytes
    for ids, count, more in (([1, 6, 6], COUNT, 0), ([1, *[6] * 40], 40, 1)):  # of 64 positions, and of 128
        texts = generator._decoding.run([ids], [count], generator.sampling, 0, prompt_cache=cache)
        next(texts)
        gc.collect()
        assert live_bytes() - before < (more + 0.5) * kept
        texts.close()


def live_bytes() -> int:
    return sum(each.nbytes for each in jax.live_arrays())
