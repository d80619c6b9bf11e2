"""The table of formats that weights come in: one file an entry; nobody else has a list of them.

Each entry recognizes its locations, and opens them. The first entries are asked first; an added one comes last. Nothing
here imports JAX, or a format's library, before something is opened.

    huggingface     a folder of safetensors, or, if asked for, of pickles
    orbax           an Orbax checkpoint, ours or another program's
    gguf            a model of llama.cpp
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

from aq_jax.converters.formats.gguf import GGUF
from aq_jax.converters.formats.huggingface import HuggingFace
from aq_jax.converters.formats.llama2c import Llama2c
from aq_jax.converters.formats.locations import resolve_source
from aq_jax.converters.formats.orbax import Orbax
from aq_jax.converters.formats.tables import Shards, Table
from aq_jax.converters.formats.unknown import refusal
from aq_jax.store.folders import Folder, split_url
from aq_jax.store.urls import is_url

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source


class Format(Protocol):
    """A format that weights come in."""

    @property
    def about(self) -> str:
        """Describe the format, for messages."""
        ...

    def recognizes(self, location: str) -> bool:
        """Return whether an existing location, a path or a URL, is of this format, damaged or not."""
        ...

    def open(self, location: str, *, packed: bool, allow_pickle: bool) -> AbstractContextManager[Source]:
        """Open a location as a source.

        Args:
            location: A location that the format recognizes.
            packed: Whether quantized tensors become QTensors; otherwise they are dequantized to their dtype before
                quantization.
            allow_pickle: Whether to read files that can run code when they are read.

        Raises:
            FormatError: for files that are missing or damaged, or pickles without allow_pickle.
        """
        ...


FORMATS: dict[str, Format] = {
    "huggingface": HuggingFace(),
    "orbax": Orbax(),
    "table": Table(),
    "shards": Shards(),
    "gguf": GGUF(),
    "llama2c": Llama2c(),
}
"""An open table: add a format under its name."""


@contextmanager
def open_source(
    location: str | os.PathLike[str], *, packed: bool = False, allow_pickle: bool = False, first: Collection[str] = ()
) -> Iterator[Source]:
    """Open weights wherever they lie, by the first format that recognizes the location.

    Args:
        location: A path, a URL, `package:NAME/FOLDER` inside an installed package, or `hf:ORG/NAME`, a model of Hugging
            Face's hub, with `/FILE.gguf` for one of its files.
        packed, allow_pickle: See `Format.open`.
        first: The names of formats that are asked before the others.

    Raises:
        FileNotFoundError: if the location does not exist.
        ConfigError: for a package that is not installed, or a URL of no known filesystem.
        FormatError: if no format recognizes the location, and as `Format.open`.

    >>> import numpy as np, tempfile
    >>> import aq_jax as aq
    >>> aq.save(path := tempfile.mkdtemp() + "/m.parquet", {"w": np.ones((2, 8), np.float32)})
    >>> with open_source(path) as source:
    ...     source.shapes["w"][0], source.read("w").sum()
    ((2, 8), np.float32(16.0))
    """
    text = resolve(location, allow_pickle)
    name = recognize(location, text, first)
    known = FORMATS[name]
    absolute = text if is_url(text) else str(Path(text).absolute())
    with known.open(text, packed=packed, allow_pickle=allow_pickle) as source:
        source.reopen = partial(known.open, absolute, packed=packed, allow_pickle=allow_pickle)
        yield source


def resolve(location: str | os.PathLike[str], allow_pickle: bool = False) -> str:
    """Resolve a location to a path, as `resolve_source`, or leave a URL as it is."""
    return os.fspath(location) if is_url(location) else str(resolve_source(location, allow_pickle))


def recognize(location: str | os.PathLike[str], resolved: str, first: Collection[str] = ()) -> str:
    """Name the first format that recognizes a location.

    Args:
        location: The location as it was named, for errors.
        resolved: Its path or URL, from `resolve`.
        first: The names of formats that are asked before the others.

    Raises:
        FileNotFoundError: if it does not exist.
        FormatError: if no format recognizes it.
        ConfigError: for a URL of no known filesystem.
    """
    there = _exists(resolved)
    for name in (*first, *(name for name in FORMATS if name not in first)) if there else ():
        if FORMATS[name].recognizes(resolved):
            return name
    abouts = [entry.about for entry in FORMATS.values()]
    raise refusal(os.fspath(location), resolved if there else None, abouts)


def _exists(location: str) -> bool:
    if not is_url(location):
        return os.path.lexists(location)
    folder, name = split_url(location)
    return Folder(location).exists() or folder.holds(name)
