"""The format of GGUF, as llama.cpp and its like have their models."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from aq_jax.converters.formats.locations import is_file_of, local_file, require_local

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source


class GGUF:
    """A GGUF file, or all parts of one. Its side files, config and tokenizer, are rebuilt from its fields."""

    about = "a GGUF file (.gguf), or any part of one that is split"

    def recognizes(self, location: str) -> bool:
        return is_file_of(location, (".gguf",), (b"GGUF",))

    def open(self, location: str, *, packed: bool, allow_pickle: bool) -> AbstractContextManager[Source]:
        from aq_jax.converters.gguf.source import GGUFModel

        return nullcontext(GGUFModel(require_local(location, local_file(location), "GGUF is"), packed))
