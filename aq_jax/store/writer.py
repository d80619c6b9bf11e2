"""Write a table, a row at a time, so that a reader sees the old file or the whole new one and never a part."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import pyarrow as pa

from aq_jax.codes import CODES
from aq_jax.config import Compression
from aq_jax.errors import FormatError
from aq_jax.store.batch import Batch
from aq_jax.store.container import KINDS, Sink
from aq_jax.store.digest import row_digest
from aq_jax.store.files import EarlySync, atomic_write
from aq_jax.store.folders import split_url
from aq_jax.store.metadata import check_aliases, compose_metadata
from aq_jax.store.row_rules import RowOrder, check
from aq_jax.store.rows import Row, Sealed, row_location
from aq_jax.store.schema import GROUP_BYTES, PLAIN_TYPES, V1, V2, Version

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable
    from types import TracebackType


def check_table(path: str | os.PathLike[str], compression: Compression = "none") -> None:
    """Refuse a table that could not be written; nothing is left behind.

    Args:
        path: The table's path or URL.
        compression: The compression of the `data` column.

    Raises:
        FormatError: if the name ends in neither `.parquet` nor `.arrow`, or is a folder's, or an `.arrow` is to be
            compressed.
        ConfigError: for a path that is not UTF-8.
        OSError: if its folder cannot be written to, or cannot be made.
    """
    file = Path(path)
    if file.suffix not in KINDS:
        raise FormatError(f"{file}: a table's name ends in .parquet or .arrow, not {file.suffix!r}")
    if file.is_dir():
        raise FormatError(f"{file}: is a folder; name a file in it")
    if compression not in ("none", "zstd"):
        raise FormatError(f"{file}: compression {compression!r} must be none or zstd")
    if file.suffix == ".arrow" and compression != "none":
        raise FormatError(f"{file}: Arrow IPC tables are not compressed; write .parquet, or compression='none'")
    folder, name = split_url(path)
    folder.check_writable(name)


class TableWriter:
    """A writer of one `.parquet` or `.arrow` file, which appears, whole, when the `with` block ends without error.

    >>> with TableWriter("m.arrow", version=1) as table:  # doctest: +SKIP
    ...     table.write(row)

    Args:
        path: The file's path; missing folders above it are made.
        version: 1 for unquantized tensors, 2 for rows that have a `quant_type`.
        config: The config that made the table, for its metadata; plain JSON.
        compression: The compression of the `data` column.

    Raises:
        FormatError, ConfigError, OSError: for an unknown version, a config that is no mapping, and as for
            `check_table`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        version: Version,
        config: Mapping[str, object] | None = None,
        compression: Compression = "none",
    ) -> None:
        self.path = Path(path)
        if version not in (1, 2):
            raise FormatError(f"{self.path}: version {version!r} must be 1 or 2")
        if config is not None and not isinstance(config, Mapping):
            raise FormatError(f"{self.path}: config is {config!r:.80}; wanted a dict of plain JSON, or None")
        check_table(path, compression)  # now, before minutes are spent on the contents
        self._version: Version = version
        self._compression: Compression = compression
        self._config = dict(config or {})
        self._schema = V1 if version == 1 else V2
        self._aliases: dict[str, str] = {}
        self._order = RowOrder()
        self._written: list[Sealed] = []
        self._arena = np.empty(GROUP_BYTES, np.uint8)
        self._waiting = Batch(self._schema, self._arena)
        self._sink: Sink | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_write(self.path))
            self._sink = KINDS[self.path.suffix].create(temporary, self._schema, self._compression)
            stack.callback(self._close)  # before the file is renamed, or removed
            self._sync = stack.enter_context(EarlySync(temporary))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._finish()

    def write(self, row: Row) -> None:
        """Add a row and its digest; the row's arrays may change afterwards.

        Raises:
            FormatError: if the row breaks a rule of the format, or its name already exists.
        """
        self._opened()
        position = len(self._written)
        here = row_location(str(self.path), position, str(row.layer_name))
        self._check_version(row, here)
        check(row, here)
        self._order.add(row, str(self.path), position)
        digest = row_digest(row)
        size = row.data.nbytes + row.scales.nbytes + row.zero_points.nbytes
        if self._waiting.nbytes + size > GROUP_BYTES:
            self.flush()
        if size > GROUP_BYTES:
            alone = Batch(self._schema, np.ascontiguousarray(row.data))
            alone.add(row, digest, copy=False)
            self._write_batch(alone)
        else:
            self._waiting.add(row, digest)  # the row's bytes move once, into the memory that its batch is made of
        self._written.append(Sealed(digest, row.solver, row.cosine, row.rel_mse))

    def alias(self, name: str, stored_name: str) -> None:
        """Record that `name` is tied to the tensor stored as `stored_name`."""
        if self._aliases.setdefault(name, stored_name) != stored_name:
            raise FormatError(f"{self.path}: alias {name!r} already leads to {self._aliases[name]!r}")

    def _opened(self) -> Sink:
        if self._sink is None:
            raise ValueError(f"{self.path}: the table is not open; use the writer in a `with` block")
        return self._sink

    def _check_version(self, row: Row, here: str) -> None:
        if self._version == 1 and row.quant_type is not None:
            raise FormatError(f"{here}: a V1 table holds no {row.quant_type} rows; write version 2")
        if self._version == 2 and row.quant_type not in CODES and row.quant_type not in PLAIN_TYPES:
            known = ", ".join((*CODES, *PLAIN_TYPES))
            raise FormatError(f"{here}: quant_type {row.quant_type!r} cannot be written; a V2 table has {known}")

    def flush(self) -> None:
        """Write the rows that wait for others now: the disk is busy with them while the caller does something else."""
        self._opened()
        if self._waiting:
            self._write_batch(self._waiting)
        self._waiting = Batch(self._schema, self._arena)

    def _write_batch(self, rows: Batch) -> None:
        self._opened().write(rows.to_arrow())
        self._sync.start()

    def _finish(self) -> None:
        self._order.finish(str(self.path))
        check_aliases(self._aliases, self._order.names, str(self.path))
        self.flush()
        metadata = compose_metadata(self._version, self._config, self._aliases, self._written)
        self._opened().finish(metadata)
        self._sink = None

    def _close(self) -> None:
        sink, self._sink = self._sink, None
        if sink is not None:  # the table is not whole: the error to report is the one that led here
            with suppress(OSError, pa.ArrowException):
                sink.close()


def write_table(
    path: str | os.PathLike[str],
    rows: Iterable[Row],
    *,
    version: Version,
    config: Mapping[str, object] | None = None,
    aliases: Mapping[str, str] | None = None,
    compression: Compression = "none",
) -> None:
    """Write all rows and aliases; see `TableWriter`."""
    with TableWriter(path, version=version, config=config, compression=compression) as table:
        for row in rows:
            table.write(row)
        for name, stored_name in (aliases or {}).items():
            table.alias(name, stored_name)


def release_memory() -> None:
    """Return the memory that Arrow keeps after writing to the system."""
    pa.default_memory_pool().release_unused()


def use_system_memory() -> None:
    """Let Arrow take memory from the system and give it back at once: for processes that must stay within a limit."""
    pa.set_memory_pool(pa.system_memory_pool())
