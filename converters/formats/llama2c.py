"""llama2.c's model file, which needs its tokenizer.bin beside it: github.com/karpathy/llama2.c."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from aq_jax.converters.formats.locations import local_file
from aq_jax.errors import FormatError

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source

TOKENIZER = "tokenizer.bin"
_PICKLES = (b"PK", b"\x80")
"""How what torch saves begins, under the same suffix."""


class Llama2c:
    """Beside it go config.json, tokenizer.json and tokenizer_config.json, which are made of the two files."""

    about = f"a llama2.c model (.bin), with {TOKENIZER} beside it"

    def recognizes(self, location: str) -> bool:
        path = local_file(location)
        if path is None or path.suffix != ".bin":
            return False
        with path.open("rb") as file:
            return not file.read(2).startswith(_PICKLES)

    def open(self, location: str, *, packed: bool, allow_pickle: bool) -> AbstractContextManager[Source]:
        from aq_jax.converters.llama2c import ModelFile

        path = local_file(location)
        if path is None or not path.with_name(TOKENIZER).is_file():
            raise FormatError(
                f"{location}: has no {TOKENIZER} beside it, of which the model's tokenizer is made; put it there, or "
                "call aq_jax.converters.llama2c.to_table with its name"
            )
        return nullcontext(ModelFile(path, path.with_name(TOKENIZER)))
