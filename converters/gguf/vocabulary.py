"""Read the fields of a file's tokenizer, with llama.cpp's defaults for what a file does not say.

Source: github.com/ggml-org/llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from aq_jax.converters.gguf.header import field_of
from aq_jax.errors import FormatError

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
ENDS = (
    "eos_token_id", "eot_token_id", "eom_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id",
)  # fmt: skip
"""The fields of ids after which llama.cpp generates no more."""
# Fields that are applied, and those that change no ids of a text.
_KNOWN = {f"{TEMPLATE}s"} | {
    PREFIX + key
    for key in (
        "model", "pre", "tokens", "token_type", "token_type_count", "scores", "merges", "bos_token_id",
        "unknown_token_id", "padding_token_id", "seperator_token_id", "cls_token_id", "mask_token_id",
        "fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id", "prefix_token_id", "suffix_token_id",
        "middle_token_id", *ENDS,
    )
}  # fmt: skip
# By the tokenizer's kind, the flags that are applied, and those that are not, with what is done.
_APPLIED = {
    "gpt2": {"add_bos_token", "add_eos_token"},
    "llama": {"add_bos_token", "add_eos_token", "add_space_prefix"},
    "bert": {"add_eos_token", "normalizer.lowercase", "normalizer.strip_accents"},  # it ends with a separator
}
_NONE = {
    "add_sep_token": False, "remove_extra_whitespaces": False, "normalizer.lowercase": False,
    "normalizer.strip_accents": False,
}  # fmt: skip
_DONE = {
    "gpt2": _NONE | {"add_space_prefix": False},
    "llama": _NONE,
    "bert": {
        "add_bos_token": True, "add_sep_token": True, "remove_extra_whitespaces": True, "add_space_prefix": False,
    },
}  # fmt: skip
_KINDS = {str: "text", int: "whole numbers", float: "numbers"}
# By the tokenizer's kind. llama.cpp's 11 of byte pairs is Falcon's, whose texts are not split here; a WordPiece's [UNK]
# is found by its name; and a padding or a mask that is not named changes no ids of a text.
_DEFAULT_IDS: Mapping[str, Mapping[str, int]] = MappingProxyType({
    "llama": {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
    "bert": {"bos_token_id": 101, "seperator_token_id": 102},
})  # fmt: skip


class Vocabulary:
    """The fields of a file's tokenizer, checked.

    Args:
        where: The file, for errors.
        fields: All fields of the file.
    """

    def __init__(self, where: object, fields: Mapping[str, Any]) -> None:
        self.where, self.fields = where, fields
        self.kind = str(fields.get(f"{PREFIX}model", ""))
        self.tokens: list[str] = list(self._list("tokens", str))
        self.types: list[int] = [int(kind) for kind in self._list("token_type", int)] or [1] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise FormatError(f"{where}: has {len(self.tokens)} tokens, and types of {len(self.types)}")

    def _list(self, key: str, kind: type) -> Sequence[Any]:
        found = self.fields.get(PREFIX + key, [])
        if isinstance(found, str) or not hasattr(found, "__len__") or (len(found) and not _is(found[0], kind)):
            raise FormatError(f"{self.where}: {PREFIX}{key} is no array of {_KINDS[kind]}")
        return found

    @property
    def pre(self) -> str:
        return str(self.fields.get(f"{PREFIX}pre") or "default")

    @property
    def scores(self) -> list[float]:
        found = [float(score) for score in self._list("scores", float)]
        if len(found) != len(self.tokens):
            raise FormatError(f"{self.where}: has {len(self.tokens)} tokens, and scores of {len(found)}")
        if any(score != score for score in found):  # NaN has no place in an order
            raise FormatError(f"{self.where}: {PREFIX}scores holds NaN; wanted numbers")
        return found

    @property
    def merges(self) -> list[tuple[str, str]]:
        found = []
        for index, text in enumerate(self._list("merges", str)):
            left, space, right = text[1:].partition(" ")  # a token may begin with a space
            if not space:
                raise FormatError(f"{self.where}: {PREFIX}merges[{index}] is {text[:40]!r}; wanted two tokens")
            found.append((text[:1] + left, right))
        return found

    @property
    def templates(self) -> dict[str, str]:
        """The templates of chats by name; without a default there is none, as nothing would choose another."""
        names = [key for key in self.fields if key == TEMPLATE or key.startswith(f"{TEMPLATE}.")]
        found = {key[len(TEMPLATE) + 1 :] or "default": field_of(self.fields, key, str, self.where) for key in names}
        return {name: text for name, text in found.items() if text is not None} if TEMPLATE in names else {}

    def said(self, key: str) -> bool | None:
        return field_of(self.fields, PREFIX + key, bool, self.where)

    def flag(self, key: str, default: bool) -> bool:
        found = self.said(key)
        return default if found is None else found

    def unused(self) -> list[str]:
        """List the fields of the tokenizer that ask for something which is not done.

        >>> said = {"model": "gpt2", "add_bos_token": True, "add_space_prefix": True, "add_sep_token": False}
        >>> Vocabulary("m.gguf", {PREFIX + key: value for key, value in said.items()}).unused()
        ['tokenizer.ggml.add_space_prefix']
        """
        known = {*_KNOWN, *(PREFIX + key for key in _APPLIED.get(self.kind, ()))}
        known |= {PREFIX + key for key, done in _DONE.get(self.kind, {}).items() if self.said(key) is done}
        known |= {TEMPLATE if name == "default" else f"{TEMPLATE}.{name}" for name in self.templates}
        return [key for key in self.fields if key.startswith("tokenizer.") and key not in known]

    def ids(self) -> dict[str, Any]:
        """Return the ids of special tokens by their names in config.json; the ends are a list if there are several."""
        ends = [*dict.fromkeys(each[0] for key in ENDS if (each := self.token(key)))]
        begin, padding = self.token("bos_token_id", default=self.kind == "llama"), self.token("padding_token_id")
        found: dict[str, Any] = {"bos_token_id": begin[0]} if begin else {}
        if ends:
            found["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        return found | ({"pad_token_id": padding[0]} if padding else {})

    def token(self, key: str, default: bool = True) -> tuple[int, str] | None:
        """Find a special token by the field that holds its id; None if there is none.

        Args:
            key: The field.
            default: Whether the id is llama.cpp's where the file does not say one, and has that many tokens.

        Raises:
            FormatError: for an id that is no token's.

        >>> words = Vocabulary("m.gguf", {f"{PREFIX}model": "llama", f"{PREFIX}tokens": ["<unk>", "<s>"]})
        >>> words.token("bos_token_id"), words.token("eos_token_id")
        ((1, '<s>'), None)
        """
        found = self.fields.get(PREFIX + key)
        if found is None:
            usual = _DEFAULT_IDS.get(self.kind, {}).get(key) if default else None
            return None if usual is None or usual >= len(self.tokens) else (usual, self.tokens[usual])
        if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < len(self.tokens):
            raise FormatError(f"{self.where}: {PREFIX}{key} is {str(found)[:40]}; it has {len(self.tokens)} tokens")
        return found, self.tokens[found]


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, {str: str, int: int | np.integer, float: int | float | np.number}[kind])
