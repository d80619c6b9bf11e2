"""The formats of our own tables: a file, and a folder of shards."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from aq_jax.converters.formats.locations import local_file
from aq_jax.errors import FormatError
from aq_jax.store.folders import Folder, split_url
from aq_jax.store.manifest import MANIFEST

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source

SUFFIXES = (".parquet", ".arrow")
_MAGIC = (b"PAR1", b"ARROW1")


class Table:
    """A table. Its side files are those that were copied with it, and those that are named as a model's files are."""

    about = "a table (.parquet or .arrow)"

    def recognizes(self, location: str) -> bool:
        if location.endswith(SUFFIXES):
            folder, name = split_url(location)
            return folder.state(name) is not None
        if (path := local_file(location)) is None:
            return False
        with path.open("rb") as file:
            return file.read(6).startswith(_MAGIC)

    def open(self, location: str, *, packed: bool, allow_pickle: bool) -> AbstractContextManager[Source]:
        from aq_jax.converters.tables import open_tables

        if (path := local_file(location)) is None:
            raise FormatError(f"{location}: is not on this machine, where tables are read; fetch it")
        return open_tables(path, packed)


class Shards:
    """A folder of tables. All its other files are side files, if a manifest lists the tables; else as for a table."""

    about = "a folder of tables (.parquet, .arrow), such as that of a conversion into shards"

    def recognizes(self, location: str) -> bool:
        folder = Folder(location)
        return folder.exists() and (folder.holds(MANIFEST) or any(folder.glob(f"*{suffix}") for suffix in SUFFIXES))

    def open(self, location: str, *, packed: bool, allow_pickle: bool) -> AbstractContextManager[Source]:
        from aq_jax.converters.tables import open_tables

        if (path := Folder(location).local) is None:
            raise FormatError(f"{location}: is not on this machine, where tables are read; fetch the folder")
        return open_tables(path, packed)
