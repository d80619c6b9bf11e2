"""Where weights lie: a table of formats by name, one file an entry; nobody else has a list of them.

An entry is asked whether it knows a location, and opens it. Those that are asked first are above; one that is added
comes last. Nothing here imports JAX, or a library of a format, before something is opened.

    huggingface     a folder of safetensors, or, if asked for, of pickles
    orbax           an Orbax checkpoint, ours or another program's
    llama2c         a model file of llama2.c
    tables          a table, or a folder of shards
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from aq_jax.converters.formats.huggingface import HuggingFace
from aq_jax.converters.formats.llama2c import Llama2c
from aq_jax.converters.formats.locations import resolve_source
from aq_jax.converters.formats.orbax import Orbax
from aq_jax.converters.formats.tables import Shards, Table
from aq_jax.errors import FormatError
from aq_jax.store.folders import Folder, is_url, split_url

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source


class Format(Protocol):
    """A kind of place where weights lie."""

    @property
    def about(self) -> str:
        """What it is, for messages."""
        ...

    def recognizes(self, location: str) -> bool:
        """Say whether a location, a path or a URL at which there is something, is of this format; damaged or not."""
        ...

    def open(self, location: str, *, packed: bool, allow_pickle: bool) -> AbstractContextManager[Source]:
        """Open it.

        Args:
            location: that is recognized.
            packed: give quantized tensors as QTensors; otherwise dequantized, in the dtype that they had before.
            allow_pickle: read files that can run code when they are read.

        Raises:
            FormatError: for files that are missing, damaged, or not asked for.
        """
        ...


FORMATS: dict[str, Format] = {
    "huggingface": HuggingFace(),
    "orbax": Orbax(),
    "table": Table(),
    "shards": Shards(),
    "llama2c": Llama2c(),
}
"""Open: a format is added by its name."""


@contextmanager
def open_source(
    location: str | os.PathLike[str], *, packed: bool = False, allow_pickle: bool = False, first: Collection[str] = ()
) -> Iterator[Source]:
    """Open weights wherever they lie, by the first format that knows the location.

    Args:
        location: a path, a URL, or `package:NAME/FOLDER` inside an installed package.
        packed, allow_pickle: as in `Format.open`.
        first: names of formats that are asked before others.

    Raises:
        FileNotFoundError: if there is nothing.
        ConfigError: for a package that is not installed, or a URL of no known filesystem.
        FormatError: if no format knows it, and as `Format.open`.

    >>> import numpy as np, tempfile
    >>> import aq_jax as aq
    >>> aq.save(path := tempfile.mkdtemp() + "/m.parquet", {"w": np.ones((2, 8), np.float32)})
    >>> with open_source(path) as source:
    ...     source.shapes["w"][0], source.read("w").sum()
    ((2, 8), np.float32(16.0))
    """
    text = os.fspath(location) if is_url(location) else str(resolve_source(location))
    if not _exists(text):
        raise FileNotFoundError(f"{text}: there is no such folder or file")
    ordered = [FORMATS[name] for name in (*first, *(name for name in FORMATS if name not in first))]
    known = next((entry for entry in ordered if entry.recognizes(text)), None)
    if known is None:
        raise FormatError(f"{text}: is none of these: {'; '.join(entry.about for entry in ordered)}")
    lasting = text if is_url(text) else str(Path(text).absolute())
    with known.open(text, packed=packed, allow_pickle=allow_pickle) as source:
        source.reopen = partial(known.open, lasting, packed=packed, allow_pickle=allow_pickle)
        yield source


def _exists(location: str) -> bool:
    if not is_url(location):
        return os.path.lexists(location)
    folder, name = split_url(location)
    return Folder(location).exists() or folder.holds(name)
