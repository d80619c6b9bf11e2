"""Rebuild tokenizer.json and tokenizer_config.json from a file's fields.

    gpt2      byte-pair encoding over bytes, with the merges of the file
    llama     SentencePiece's byte-pair encoding: the merges follow from the scores
    bert      WordPiece

Other kinds, and byte-pair encodings that split a text in a way that is not known, are noted, and no tokenizer is
written. Source: github.com/ggml-org/llama.cpp, src/llama-vocab.cpp and convert_hf_to_gguf.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from aq_jax.converters.gguf.header import field_of
from aq_jax.errors import FormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PREFIX = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER = 2, 3, 4
_SPACE = "▁"
_MAX_PIECE = 128
"""The most characters of a piece whose splits are tried: more than any real one that is merged has."""
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The names of `tokenizer.ggml.pre` -> the expression that splits a text, or "" for GPT-2's own; whether digits stand
# alone first; whether a whole word that is a token is not merged.
_SPLITS: Mapping[str, tuple[str, bool, bool]] = MappingProxyType({
    "gpt-2": ("", False, False),
    "default": ("", False, False),
    "smollm": ("", True, False),
    "qwen2": (_CONTRACTIONS + r"\p{N}" + _REST, False, False),
    "llama-bpe": (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, False, True),
})  # fmt: skip
_NAMES = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id", "sep_token": "seperator_token_id", "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}  # fmt: skip
_KINDS = {str: "text", int: "whole numbers", float: "numbers"}


class Vocabulary:
    """The fields of a file's tokenizer, checked.

    Args:
        where: The file, for errors.
        fields: All fields of the file.
    """

    def __init__(self, where: object, fields: Mapping[str, Any]) -> None:
        self.where, self.fields = where, fields
        self.kind = str(fields.get(f"{_PREFIX}model", ""))
        self.tokens: list[str] = list(self._list("tokens", str))
        self.types: list[int] = [int(kind) for kind in self._list("token_type", int)] or [1] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise FormatError(f"{where}: has {len(self.tokens)} tokens, and types of {len(self.types)}")

    def _list(self, key: str, kind: type) -> Sequence[Any]:
        found = self.fields.get(_PREFIX + key, [])
        if isinstance(found, str) or not hasattr(found, "__len__") or (len(found) and not _is(found[0], kind)):
            raise FormatError(f"{self.where}: {_PREFIX}{key} is no array of {_KINDS[kind]}")
        return found

    @property
    def pre(self) -> str:
        return str(self.fields.get(f"{_PREFIX}pre", "default"))

    @property
    def scores(self) -> list[float]:
        found = [float(score) for score in self._list("scores", float)]
        if len(found) != len(self.tokens):
            raise FormatError(f"{self.where}: has {len(self.tokens)} tokens, and scores of {len(found)}")
        if any(score != score for score in found):  # NaN has no place in an order
            raise FormatError(f"{self.where}: {_PREFIX}scores holds NaN; wanted numbers")
        return found

    @property
    def merges(self) -> list[tuple[str, str]]:
        found = []
        for index, text in enumerate(self._list("merges", str)):
            left, space, right = text[1:].partition(" ")  # a token may begin with a space
            if not space:
                raise FormatError(f"{self.where}: {_PREFIX}merges[{index}] is {text[:40]!r}; wanted two tokens")
            found.append((text[:1] + left, right))
        return found

    def flag(self, key: str, default: bool) -> bool:
        found = field_of(self.fields, _PREFIX + key, bool, self.where)
        return default if found is None else found

    def token(self, key: str) -> tuple[int, str] | None:
        """Find a special token by the field that holds its id; None if there is none."""
        found = self.fields.get(_PREFIX + key)
        if found is None:
            return None
        if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < len(self.tokens):
            raise FormatError(f"{self.where}: {_PREFIX}{key} is {str(found)[:40]}; it has {len(self.tokens)} tokens")
        return found, self.tokens[found]


def _is(value: Any, kind: type) -> bool:
    import numpy as np

    return isinstance(value, {str: str, int: int | np.integer, float: int | float | np.number}[kind])


def tokenizer_files(words: Vocabulary, positions: int) -> tuple[dict[str, bytes], list[str]]:
    """Build tokenizer.json and tokenizer_config.json; return them, and notes.

    Args:
        words: The tokenizer's fields.
        positions: The number of tokens that the model takes.

    Raises:
        FormatError: for fields that are damaged.
    """
    if not words.tokens:
        return {}, ["the file holds no tokenizer, and none is written"]
    if words.kind not in _BUILDERS:
        return {}, [f"its tokenizer is of the kind {words.kind[:40]!r}, of which no tokenizer.json is built"]
    if words.kind == "gpt2" and words.pre not in _SPLITS:
        return {}, [f"its tokenizer splits texts as {words.pre[:40]!r}, of which no tokenizer.json is built"]
    try:
        made = _BUILDERS[words.kind](words)
    except FormatError:
        raise
    except Exception as error:  # tokenizers raises no other class
        raise FormatError(f"{words.where}: holds no tokenizer that can be built: {str(error)[:200]}") from None
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
    }
    config |= {name: found[1] for name, key in _special_tokens(words).items() if (found := words.token(key))}
    if isinstance(template := words.fields.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    files = {"tokenizer.json": made.to_str(), "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False)}
    return {name: f"{text}\n".encode() for name, text in files.items()}, []


def _special_tokens(words: Vocabulary) -> dict[str, str]:
    """Choose which special tokens tokenizer_config.json names; a BERT's begin and end of a text are not its own."""
    if words.kind != "bert":
        return _NAMES
    return {name: key for name, key in _NAMES.items() if name not in ("bos_token", "eos_token")}


def _gpt2(words: Vocabulary) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    expression, digits, ignore = _SPLITS[words.pre]
    vocabulary = {token: index for index, token in enumerate(words.tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=words.merges, ignore_merges=ignore))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if expression:
        steps.append(pre_tokenizers.Split(Regex(expression), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not expression))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if words.pre == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    return _finish(made, words)


def _llama(words: Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: index for index, token in enumerate(words.tokens)}
    merges = merges_of(vocabulary, dict(zip(words.tokens, words.scores, strict=True)))
    unknown = words.token("unknown_token_id")
    made = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token=unknown[1] if unknown else None,
        )
    )
    prefix = words.flag("add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return _finish(made, words, bos=True)


def merges_of(vocabulary: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """List the merges of a vocabulary whose best piece is joined first: every split of a piece in two.

    >>> merges_of({"a": 0, "b": 1, "ab": 2, "bab": 3}, {"a": 0, "b": 0, "ab": -1, "bab": -2})
    [('a', 'b'), ('b', 'ab')]
    """
    merges: list[tuple[str, str]] = []
    for piece in sorted(vocabulary, key=lambda piece: -scores[piece]):
        if not 1 < len(piece) <= _MAX_PIECE:
            continue
        splits = [
            (left, right)
            for i in range(1, len(piece))
            if (left := piece[:i]) in vocabulary and (right := piece[i:]) in vocabulary
        ]
        merges += sorted(splits, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def _bert(words: Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    # llama.cpp's converter marks the beginnings of words, WordPiece what goes on with one.
    tokens = [
        token if kind == _CONTROL or (token[:1], token[-1:]) == ("[", "]")
        else token[1:] if token[:1] == _SPACE
        else f"##{token}"
        for token, kind in zip(words.tokens, words.types, strict=True)
    ]  # fmt: skip
    words.tokens = tokens
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = words.token("unknown_token_id")
    made = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token=unknown[1] if unknown else "[UNK]"))
    lower = not any(token != token.lower() for token in tokens if not token.startswith("["))
    made.normalizer = normalizers.BertNormalizer(lowercase=lower)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    first = words.token("cls_token_id") or words.token("bos_token_id")
    last = words.token("seperator_token_id") or words.token("eos_token_id")
    if first and last:
        made.post_processor = processors.TemplateProcessing(
            f"{first[1]} $A {last[1]}",
            f"{first[1]} $A {last[1]} $B:1 {last[1]}:1",
            [(first[1], first[0]), (last[1], last[0])],
        )
    return _finish(made, words)


def _finish(made: Tokenizer, words: Vocabulary, bos: bool = False) -> Tokenizer:
    """Add the special tokens, and those that a text begins and ends with."""
    from tokenizers import AddedToken, processors

    special = [words.tokens[i] for i, kind in enumerate(words.types) if kind in (_CONTROL, _UNKNOWN)]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    own = [words.tokens[i] for i, kind in enumerate(words.types) if kind == _USER]
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in own])
    if words.kind == "bert":
        return made
    first = words.token("bos_token_id") if words.flag("add_bos_token", bos) else None
    last = words.token("eos_token_id") if words.flag("add_eos_token", False) else None
    parts = [(found[1], found[0]) for found in (first, last) if found]
    if parts:
        one, two = (
            " ".join(
                ([f"{first[1]}{mark}"] if first else []) + [f"${text}{mark}"] + ([f"{last[1]}{mark}"] if last else [])
            )
            for text, mark in (("A", ":0"), ("B", ":1"))
        )
        made.post_processor = processors.TemplateProcessing(one, f"{one} {two}", parts)
    return made


_BUILDERS: Mapping[str, Callable[[Vocabulary], Any]] = MappingProxyType({"gpt2": _gpt2, "llama": _llama, "bert": _bert})
