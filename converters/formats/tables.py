"""The formats of our own tables: a file, and a folder of shards."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from aq_jax.converters.formats.locations import is_file_of, local_file, require_local
from aq_jax.store.folders import Folder
from aq_jax.store.manifest import MANIFEST

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source

SUFFIXES = (".parquet", ".arrow")


class Table:
    """A table. Its side files are those that were copied with it, and those that are named as a model's files are."""

    about = "a table (.parquet or .arrow)"

    def recognizes(self, location: str) -> bool:
        return is_file_of(location, SUFFIXES, (b"PAR1", b"ARROW1"))

    def open(self, location: str, *, packed: bool, allow_pickle: bool) -> AbstractContextManager[Source]:
        from aq_jax.converters.tables import open_tables

        return open_tables(require_local(location, local_file(location), "tables are"), packed)


class Shards:
    """A folder of tables. All its other files are side files, if a manifest lists the tables; else as for a table."""

    about = "a folder of tables (.parquet, .arrow), such as that of a conversion into shards"

    def recognizes(self, location: str) -> bool:
        folder = Folder(location)
        return folder.exists() and (folder.holds(MANIFEST) or any(folder.glob(f"*{suffix}") for suffix in SUFFIXES))

    def open(self, location: str, *, packed: bool, allow_pickle: bool) -> AbstractContextManager[Source]:
        from aq_jax.converters.tables import open_tables

        return open_tables(require_local(location, Folder(location).local, "tables are", "the folder"), packed)
