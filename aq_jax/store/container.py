"""One interface for Parquet and Arrow IPC files: small columns are read at once, large ones by row group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from aq_jax.errors import FormatError
from aq_jax.store.ipc.read import IpcContainer
from aq_jax.store.ipc.write import IpcSink
from aq_jax.store.mapping import map_file
from aq_jax.store.parquet.read import ParquetContainer
from aq_jax.store.parquet.write import ParquetSink, stored_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np
    import pyarrow as pa

    from aq_jax.config import Compression
    from aq_jax.store.columns import Columns


class Container(Protocol):
    """A file that is read."""

    is_v2: bool
    metadata: bytes | None
    group_rows: tuple[int, ...]
    """The number of rows of each row group or record batch."""
    names: list[str]
    """The names of its columns."""
    maps_grids: bool
    """True if scales and zero points from `read_large` are views of the file; otherwise they are read whole."""
    doubts: list[str]
    """Reasons not to trust the file, though some of it can be read: only `verify` goes on if there are any."""

    def read_small(self) -> Columns:
        """Read the small columns of all rows."""
        ...

    def read_small_column(self, group: int, column: str) -> list[pa.Array]:
        """Read one small column of one group."""
        ...

    def extent(self, group: int, column: str) -> tuple[int, int]:
        """Return the extent of a group's column in the file, (start, stop); others may be in it, too."""
        ...

    def read_large(self, group: int, needs: Mapping[str, int], checksums: bool) -> Columns:
        """Read the large columns of one group.

        Args:
            group: The group's index.
            needs: The bytes that the rows' shapes require, by column.
            checksums: Whether to check the container's own checksums, if it has any.
        """
        ...

    def mapped(self, group: int) -> list[np.ndarray] | None:
        """View each row's `data` in the mapped file, unread; None if the file does not hold those bytes as they are."""
        ...

    def disk_bytes(self, group: int, column: str) -> int | None:
        """Count the bytes of a group's column on disk; None if it is stored uncompressed."""
        ...

    def check_capacity(self, needs: Mapping[str, int]) -> None:
        """Refuse a file that is far too small for what its shapes claim."""
        ...

    def close(self) -> None: ...


class Sink(Protocol):
    """A file that is written: batches, and then its metadata or, after an error, nothing more."""

    def write(self, batch: pa.RecordBatch) -> None: ...

    def finish(self, metadata: bytes) -> None:
        """Write the metadata, and close the file."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of file: its first bytes, its reader, its writer, and the bytes that a column's values take in it."""

    magic: bytes
    open: Callable[[memoryview, str], Container]
    create: Callable[[Path, pa.Schema, Compression], Sink]
    stored_bytes: Callable[[str, bytes, Compression], int]


KINDS = {
    ".parquet": Kind(b"PAR1", ParquetContainer, ParquetSink, stored_bytes),
    ".arrow": Kind(b"ARROW1", IpcContainer, IpcSink, lambda _, values, __: len(values)),
}


def open_container(path: Path, where: str) -> Container:
    """Open a file by its first bytes, not by its name.

    It is opened and mapped once, so that all bytes come from one file even if another takes its name meanwhile, and
    only pages that are accessed are read. pyarrow's own mapping would make the system fetch all that it passes.
    """
    with path.open("rb") as file:
        data = map_file(file)
    if not data:
        raise FormatError(f"{where}: is empty; wanted a Parquet or Arrow IPC file: fetch or write it again")
    for kind in KINDS.values():
        if data[: len(kind.magic)] == kind.magic:
            return kind.open(data, where)
    raise FormatError(f"{where}: not a Parquet or Arrow IPC file (it starts with {bytes(data[:6])!r})")
