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
        return str(self.fields.get(f"{PREFIX}pre", "default"))

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

    def flag(self, key: str, default: bool) -> bool:
        found = field_of(self.fields, PREFIX + key, bool, self.where)
        return default if found is None else found

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
