"""A tokenizer adds the tokens that llama.cpp adds, whatever a file leaves out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from aq_jax.converters.gguf.tokenizer import tokenizer_files
from aq_jax.converters.gguf.vocabulary import PREFIX, Vocabulary

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
PAIRS: dict[str, Any] = {
    "model": "gpt2", "tokens": [*BYTES, "<s>", "</s>"], "token_type": [1] * len(BYTES) + [3, 3], "merges": [],
}  # fmt: skip
BOS, EOS = len(BYTES), len(BYTES) + 1
PIECES: dict[str, Any] = {
    "model": "llama", "tokens": ["<unk>", "<s>", "</s>", "▁", "a"], "token_type": [2, 3, 3, 1, 1],
    "scores": [0.0, 0.0, 0.0, -1.0, -2.0],
}  # fmt: skip
WORDS = {
    "model": "bert", "token_type": [1] * 101 + [3, 3, 1],
    "tokens": [*(f"▁{i}" for i in range(100)), "[UNK]", "[CLS]", "[SEP]", "▁a"],
}  # fmt: skip


def built(said: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any], list[str]]:
    """The tokenizer, its config, and the notes."""
    files, notes = tokenizer_files(Vocabulary("m.gguf", {PREFIX + key: value for key, value in said.items()}), 64)
    return Tokenizer.from_str(files["tokenizer.json"].decode()), json.loads(files["tokenizer_config.json"]), notes


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (PAIRS | {"pre": "llama-bpe", "bos_token_id": BOS}, ["<s>", "a"]),
        (PAIRS | {"pre": "llama-bpe", "bos_token_id": BOS, "add_bos_token": False}, ["a"]),
        (PAIRS | {"pre": "qwen2", "bos_token_id": BOS}, ["a"]),
        (PAIRS | {"pre": "qwen2", "bos_token_id": BOS, "add_bos_token": True}, ["<s>", "a"]),
        (PAIRS | {"pre": "smollm", "eos_token_id": EOS, "add_eos_token": True}, ["a", "</s>"]),
        (PIECES, ["<s>", "▁", "a"]),
        (PIECES | {"add_bos_token": False, "add_eos_token": True}, ["▁", "a", "</s>"]),
        (PIECES | {"bos_token_id": 2}, ["</s>", "▁", "a"]),
        (WORDS, ["[CLS]", "a", "[SEP]"]),
        (WORDS | {"eos_token_id": 100}, ["[CLS]", "a", "[UNK]"]),
    ],
)  # fmt: skip
def test_texts_begin_and_end_as_llama_cpps(said: dict[str, Any], wanted: list[str]) -> None:
    made, _, notes = built(said)
    assert made.encode("a").tokens == wanted
    assert not notes


def test_a_default_is_a_token_by_name() -> None:
    made, config, _ = built(PIECES)
    assert made.encode("").tokens == ["<s>"]
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (PAIRS | {"pre": "llama-bpe"}, ["begin"]),
        (PAIRS | {"pre": "gpt-2", "add_eos_token": True}, ["end"]),
        (PIECES | {"tokens": ["a"], "token_type": [1], "scores": [0.0]}, ["begin"]),
        (WORDS | {"tokens": WORDS["tokens"][:102], "token_type": [1] * 102}, ["begin", "end"]),
    ],
)  # fmt: skip
def test_a_token_that_is_added_and_not_named_is_noted(said: dict[str, Any], wanted: list[str]) -> None:
    made, _, notes = built(said)
    assert len(made.encode("1").ids) == 1
    assert [note.split(" with no token")[0] for note in notes] == [f"texts {where}" for where in wanted]
