"""The format of llama2.c's model file, with its tokenizer.bin beside it: github.com/karpathy/llama2.c."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from aq_jax.converters.formats.locations import local_file
from aq_jax.errors import FormatError

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source

TOKENIZER = "tokenizer.bin"
_PICKLES = (b"PK", b"\x80")
"""The first bytes of files that torch saves under the same suffix."""


class Llama2c:
    """A llama2.c model. Its side files are config.json, tokenizer.json and tokenizer_config.json, generated from it."""

    about = f"a llama2.c model (.bin), with {TOKENIZER} beside it"

    def recognizes(self, location: str) -> bool:
        path = local_file(location)
        if path is None or path.suffix != ".bin":
            return False
        with path.open("rb") as file:
            return not file.read(2).startswith(_PICKLES)

    def open(self, location: str, *, packed: bool, allow_pickle: bool) -> AbstractContextManager[Source]:
        from aq_jax.converters.llama2c import Llama2cFile

        path = local_file(location)
        if path is None or not path.with_name(TOKENIZER).is_file():
            raise FormatError(
                f"{location}: has no {TOKENIZER} beside it, which holds the model's tokenizer; put it there, or call "
                "aq_jax.converters.llama2c.to_table with its path"
            )
        return nullcontext(Llama2cFile(path, path.with_name(TOKENIZER)))
