"""Makers' choices of tokens become generation_config.json, and what no file has a place for is noted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf_file import LLAMA, floats, whole

import aq_jax as aq
from aq_jax.conversion.sidefiles import GeneratedFiles
from aq_jax.converters import open_source
from aq_jax.converters.gguf.model_config import Fields
from aq_jax.converters.gguf.sampling import PREFIX, generation_files, unused_sampling
from aq_jax.nn.generation_config import FILE, read_generation_config
from aq_jax.nn.sampling import Sampling
from aq_jax.store.folders import Folder


def fields(said: dict[str, Any], architecture: str = "llama") -> Fields:
    return Fields("m.gguf", {PREFIX + key: value for key, value in said.items()}, architecture)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"temp": 0.699999988079071, "top_k": 20, "top_p": 0.949999988079071}, Sampling(0.7, 20, 0.95)),
        ({"temp": 1, "top_k": -1, "min_p": 0.5}, Sampling(1, 0, 1.0, 0.5)),
        ({"top_k": 64}, Sampling(1.0, 64)),
        ({"temp": 0.5}, Sampling(0.5, 50)),  # transformers' top-k, as in the file that the converter read
        ({"temp": 0.0, "top_k": 20, "penalty_repeat": 1.5}, Sampling(repetition_penalty=1.5)),
        ({"penalty_repeat": 1.5}, Sampling(repetition_penalty=1.5)),
    ],
)
def test_tokens_are_chosen_as_the_file_says(said: dict[str, Any], wanted: Sampling, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(generation_files(fields(said), {"bos_token_id": 1, "eos_token_id": [2, 3]})[FILE])
    assert read_generation_config(tmp_path, {}) == ((2, 3), wanted)
    assert not unused_sampling(fields(said))


def test_a_file_that_says_nothing_and_an_encoder_write_nothing() -> None:
    assert not generation_files(fields({}), {"eos_token_id": 2})
    encoder = fields({"temp": 0.5}, "bert")
    assert not generation_files(encoder, {})
    assert unused_sampling(encoder) == ["general.sampling.temp"]


@pytest.mark.parametrize(
    "said", [{"temp": "0.5"}, {"temp": float("nan")}, {"top_k": 2.5}, {"top_p": 0.0}, {"min_p": 2}]
)
def test_other_numbers_are_refused(said: dict[str, Any]) -> None:
    name = {"temp": "temperature"}.get(next(iter(said)), next(iter(said)))
    with pytest.raises(aq.FormatError, match=rf"m\.gguf: general\.sampling\.\*: {name} = .*; wanted a"):
        generation_files(fields(said), {})


def test_what_is_not_applied_is_noted(tmp_path: Path) -> None:
    more = {
        "general.name": "M", "general.license": "mit", "general.quantization_version": 2, "split.count": 1,
        "general.sampling.temp": 0.5, "general.sampling.mirostat": 2, "general.sampling.penalty_last_n": 64,
        "general.sampling.xtc_probability": 0.0, "llama.foo": 1, "other.foo": 1,
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0], "tokenizer.ggml.token_type": [2, 3, 3],
        "tokenizer.ggml.eom_token_id": 1, "tokenizer.ggml.remove_extra_whitespaces": True,
        "tokenizer.ggml.suppress_tokens": [1, 2],
    }  # fmt: skip
    (tmp_path / "m.gguf").write_bytes(whole(LLAMA | more, {"token_embd.weight": floats((3, 8))}))
    with open_source(tmp_path / "m.gguf", packed=True) as source:
        made = source.side_files(Folder(tmp_path)).origin
    assert isinstance(made, GeneratedFiles)
    assert json.loads(made.read("config.json"))["eos_token_id"] == [2, 1]
    assert json.loads(made.read(FILE)) == {
        "bos_token_id": 1, "eos_token_id": [2, 1], "do_sample": True, "temperature": 0.5,
    }  # fmt: skip
    assert source.notes == [
        "fields that config.json does not have: llama.foo",
        "fields that are not applied: general.sampling.mirostat, general.sampling.penalty_last_n, "
        "tokenizer.ggml.remove_extra_whitespaces, tokenizer.ggml.suppress_tokens, other.foo",
    ]
