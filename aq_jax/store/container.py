"""One face for Parquet and Arrow IPC files: small columns at once, large ones a row group at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from aq_jax.errors import FormatError
from aq_jax.store.ipc.read import IpcContainer
from aq_jax.store.ipc.write import IpcSink
from aq_jax.store.mapping import map_file
from aq_jax.store.parquet.read import ParquetContainer
from aq_jax.store.parquet.write import ParquetSink

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
    """Rows in each row group or record batch."""
    names: list[str]
    """Of its columns."""
    maps_grids: bool
    """Whether `heavy`, not asked for `data`, gives views of the file; else scales and zero points are read whole."""
    doubts: list[str]
    """Why the file is not to be trusted, although some of it can be read: only `verify` goes on when there are any."""

    def small(self) -> Columns:
        """Read the small columns of all rows."""
        ...

    def small_of(self, group: int, column: str) -> list[pa.Array]:
        """Read one small column of one group."""
        ...

    def place(self, group: int, column: str) -> tuple[int, int]:
        """Find the bytes of the file in which a group's column is, maybe with others."""
        ...

    def heavy(self, group: int, needs: Mapping[str, int], checksums: bool) -> Columns:
        """Read the large columns of one group; `needs` says how many bytes the rows' shapes ask for.

        `checksums` asks for the container's own, where it has any.
        """
        ...

    def mapped(self, group: int) -> list[np.ndarray] | None:
        """Give each row's `data` as a view of the mapped file, unread; None where the file has no such bytes."""
        ...

    def disk_bytes(self, group: int, column: str) -> int | None:
        """Count the bytes of a group's column on disk; None where it is stored as it is."""
        ...

    def check_capacity(self, needs: Mapping[str, int]) -> None:
        """Refuse a file that is far too small for what its shapes claim."""
        ...

    def close(self) -> None: ...


class Sink(Protocol):
    """A file that is written: batches, and then either its metadata or, where something went wrong, nothing more."""

    def write(self, batch: pa.RecordBatch) -> None: ...

    def finish(self, metadata: bytes) -> None:
        """Write the metadata, and close the file."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of file: its first bytes, who reads it, and who writes it."""

    magic: bytes
    open: Callable[[memoryview, str], Container]
    create: Callable[[Path, pa.Schema, Compression], Sink]


KINDS = {
    ".parquet": Kind(b"PAR1", ParquetContainer, ParquetSink),
    ".arrow": Kind(b"ARROW1", IpcContainer, IpcSink),
}


def open_container(path: Path, where: str) -> Container:
    """Open a file by what it is, not by what it is called.

    It is opened once, so that all of its bytes are of one file, also when another takes its name meanwhile; of them
    those are read that are looked at. pyarrow's own mapping would have the system fetch whatever it reads through.
    """
    with path.open("rb") as file:
        data = map_file(file)
    if not data:
        raise FormatError(f"{where}: is empty")
    for kind in KINDS.values():
        if data[: len(kind.magic)] == kind.magic:
            return kind.open(data, where)
    raise FormatError(f"{where}: not a Parquet or Arrow IPC file (it starts with {bytes(data[:6])!r})")
