"""The format of GGUF, as llama.cpp and its like have their models."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from aq_jax.converters.formats.locations import local_file
from aq_jax.errors import FormatError
from aq_jax.store.folders import split_url

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source

_SUFFIX, _MAGIC = ".gguf", b"GGUF"


class GGUF:
    """A GGUF file, or all parts of one. Its side files, config and tokenizer, are rebuilt from its fields."""

    about = "a GGUF file (.gguf), or any part of one that is split"

    def recognizes(self, location: str) -> bool:
        if location.endswith(_SUFFIX):
            folder, name = split_url(location)
            return folder.state(name) is not None
        if (path := local_file(location)) is None:
            return False
        with path.open("rb") as file:
            return file.read(4) == _MAGIC

    def open(self, location: str, *, packed: bool, allow_pickle: bool) -> AbstractContextManager[Source]:
        from aq_jax.converters.gguf.source import GGUFModel

        if (path := local_file(location)) is None:
            raise FormatError(f"{location}: is not on this machine, where GGUF is read; fetch it")
        return nullcontext(GGUFModel(path, packed))
