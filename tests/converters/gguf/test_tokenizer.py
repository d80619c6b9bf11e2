"""Texts become the tokens that llama.cpp makes of them, whatever a file leaves out, and what is not done is noted."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.decoders import ByteLevel

from aq_jax.converters.gguf.tokenizer import tokenizer_files
from aq_jax.converters.gguf.vocabulary import PREFIX, Vocabulary
from aq_jax.errors import FormatError

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


def by_turns(text: str) -> list[str]:
    """Split a text as llama.cpp does by default: each expression cuts the pieces of the one before."""
    pieces = [text]
    for expression in (
        r"([^\w\s`]+)", r"('s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?[^\s\w]+|\s+(?!\S)|\s+)", r"(\d+)",
        "([0-9][0-9][0-9])",
    ):  # fmt: skip
        pieces = [part for piece in pieces for part in re.split(expression, piece) if part]
    return pieces


@pytest.mark.parametrize("text", ["don't", "x 12345 y", "a+b, c`d", "1.5\n\n\t2  é", "  it'S ... 1234  "])
def test_the_default_splits_texts_as_llama_cpps(text: str) -> None:
    made, _, notes = built(PAIRS | {"pre": "default"})
    pieces = [piece for piece, _ in made.pre_tokenizer.pre_tokenize_str(text)]  # type: ignore[reportOptionalMemberAccess]
    assert [ByteLevel().decode([piece]) for piece in pieces] == by_turns(text)
    assert not notes
    for said in (PAIRS, PAIRS | {"pre": ""}):
        again, _, notes = built(said)
        assert again.to_str() == made.to_str()
        assert notes == [
            "it has no tokenizer.ggml.pre: texts are split by llama.cpp's default, which may not be the model's way"
        ]


def test_a_wordpiece_lowers_what_the_file_says() -> None:
    upper = WORDS | {"tokens": [*WORDS["tokens"][:-1], "▁A"]}
    for said, text, wanted in (
        (WORDS, "Á", "a"), (WORDS | {"normalizer.lowercase": False}, "A", "[UNK]"), (upper, "A", "A"),
        (upper | {"normalizer.lowercase": True}, "A", "[UNK]"),
        (WORDS | {"normalizer.strip_accents": False}, "á", "[UNK]"),
    ):  # fmt: skip
        made, _, notes = built(said)
        assert made.encode(text).tokens == ["[CLS]", wanted, "[SEP]"]
        assert not notes


CHATS = {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b", "tokenizer.chat_templates": ["x"]}


def test_templates_of_chats_have_names() -> None:
    for said, wanted in (
        ({"tokenizer.chat_template": "a"}, "a"),
        (CHATS, [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]),
        ({"tokenizer.chat_template.tool_use": "b"}, None),
    ):
        fields = {PREFIX + key: value for key, value in PIECES.items()} | said
        files, _ = tokenizer_files(Vocabulary("m.gguf", fields), 64)
        assert json.loads(files["tokenizer_config.json"]).get("chat_template") == wanted
        assert Vocabulary("m.gguf", fields).unused() == ([] if wanted else list(said))
    with pytest.raises(FormatError, match=r"tokenizer\.chat_template is 1; wanted text"):
        tokenizer_files(Vocabulary("m.gguf", fields | {"tokenizer.chat_template": 1}), 64)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (PAIRS | {"add_space_prefix": False, "add_sep_token": False, "fim_pre_token_id": 1}, []),
        (PAIRS | {"add_space_prefix": True, "add_sep_token": True}, ["add_space_prefix", "add_sep_token"]),
        (PIECES | {"add_space_prefix": True, "remove_extra_whitespaces": False, "normalizer.lowercase": False}, []),
        (WORDS | {"add_space_prefix": False, "remove_extra_whitespaces": True}, []),
        (PIECES | {"remove_extra_whitespaces": True}, ["remove_extra_whitespaces"]),
        (PIECES | {"precompiled_charsmap": [1], "suppress_tokens": [1]}, ["precompiled_charsmap", "suppress_tokens"]),
        (PIECES | {"normalizer.lowercase": True}, ["normalizer.lowercase"]),
        (WORDS | {"add_bos_token": True, "add_eos_token": False, "normalizer.lowercase": True}, []),
        (WORDS | {"add_bos_token": False, "add_sep_token": False}, ["add_bos_token", "add_sep_token"]),
    ],
)  # fmt: skip
def test_fields_that_are_not_applied_are_listed(said: dict[str, Any], wanted: list[str]) -> None:
    words = Vocabulary("m.gguf", {PREFIX + key: value for key, value in said.items()})
    assert words.unused() == [PREFIX + key for key in wanted]


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"eos_token_id": 1}, 1),
        ({"eom_token_id": 2}, 2),
        ({"eos_token_id": 1, "eot_token_id": 1}, 1),
        ({"eos_token_id": 1, "eot_token_id": 2, "eom_token_id": 5, "fim_pad_token_id": 7}, [1, 2, 5, 7]),
        ({"eos_token_id": 1, "fim_rep_token_id": 2, "fim_sep_token_id": 3, "fim_pre_token_id": 4}, [1, 2, 3]),
    ],
)
def test_a_text_ends_where_llama_cpp_ends_it(said: dict[str, Any], wanted: Any) -> None:
    fields = {PREFIX + key: value for key, value in (PAIRS | said).items()}
    assert Vocabulary("m.gguf", fields).ids() == {"eos_token_id": wanted}
