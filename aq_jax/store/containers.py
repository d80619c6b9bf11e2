"""Parquet and Arrow IPC files behind one face: small columns at once, large ones a row group at a time."""

from __future__ import annotations

import struct
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from aq_jax.errors import AqError, FormatError
from aq_jax.store.columns import check_columns, plain
from aq_jax.store.footer import Group, read_groups
from aq_jax.store.schema import HEAVY, MAX_AXES, METADATA_KEY, V2

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

MAX_ROWS = 1 << 22
_MAX_FOOTER_STRING = 100 << 20
_MAX_FOOTER_ITEMS = 1 << 22
_MAX_EXPANSION = 1024
_SLACK = 1 << 20
_IPC_BODY = 8
"""Where the messages of an IPC file begin, after its magic bytes."""
_JSON_START = b'{"aliases":'
"""How canonical metadata begins: its keys are sorted."""

Columns = dict[str, list[pa.Array]]


class Container(Protocol):
    """One file."""

    is_v2: bool
    metadata: bytes | None
    group_rows: tuple[int, ...]
    """Rows in each row group or record batch."""

    def small(self) -> Columns:
        """The small columns of all rows."""
        ...

    def heavy(self, group: int, needs: Mapping[str, int], checksums: bool) -> Columns:
        """The large columns of one group; `needs` says how many bytes the rows' shapes ask for.

        `checksums` asks for the container's own, where it has any.
        """
        ...

    def disk_bytes(self, group: int, column: str) -> int | None:
        """Bytes of a group's column on disk; None where it is stored as it is."""
        ...

    def check_capacity(self, needs: Mapping[str, int]) -> None:
        """Refuses a file that is far too small for what its shapes claim."""
        ...

    def close(self) -> None: ...


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turns what pyarrow raises about a damaged file into a FormatError that names the file."""
    try:
        yield
    except (AqError, FileNotFoundError, PermissionError):
        raise
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        TypeError,
        OverflowError,
        struct.error,
        MemoryError,
        IndexError,
    ) as error:
        raise FormatError(f"{where}: damaged, or not a table of this format: {str(error)[:300]}") from error


def open_container(path: Path, where: str) -> Container:
    """Opens a file by what it is, not by what it is called."""
    if path.stat().st_size == 0:
        raise FormatError(f"{where}: is empty")
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic[:4] == b"PAR1":
        return ParquetContainer(path, where)
    if magic == b"ARROW1":
        return IpcContainer(path, where)
    raise FormatError(f"{where}: not a Parquet or Arrow IPC file (it starts with {magic!r})")


class ParquetContainer:
    """A Parquet file, mapped."""

    def __init__(self, path: Path, where: str) -> None:
        self._where = where
        self._source = pa.memory_map(str(path))
        try:
            # Small columns are always read with page checksums: the digests of rows do not cover all of them.
            self._file = self._open(None, checksums=True)
            self._unchecked = self._open(self._file.metadata, checksums=False)
            self._describe()
        except BaseException:
            self.close()
            raise

    def _open(self, metadata: pq.FileMetaData | None, *, checksums: bool) -> pq.ParquetFile:
        return pq.ParquetFile(
            self._source,
            metadata=metadata,
            pre_buffer=False,
            page_checksum_verification=checksums,
            thrift_string_size_limit=_MAX_FOOTER_STRING,
            thrift_container_size_limit=_MAX_FOOTER_ITEMS,
        )

    def _describe(self) -> None:
        footer, schema = self._file.metadata, self._file.schema_arrow
        if footer.num_rows > MAX_ROWS:
            raise FormatError(f"{self._where}: claims {footer.num_rows} rows, at most {MAX_ROWS} are read")
        self.is_v2 = check_columns(schema, self._where)
        self.metadata = _own_metadata(footer.metadata or {}, self._where)
        self._names = schema.names
        raw = self._footer_bytes()
        if self.metadata is None and _JSON_START in raw:
            raise FormatError(f"{self._where}: its aq_jax metadata is there, but damage hides it")
        self._groups = read_groups(raw)
        self.group_rows = tuple(group.rows for group in self._groups)
        if sum(self.group_rows) != footer.num_rows or min(self.group_rows, default=0) < 0:
            raise FormatError(f"{self._where}: claims {footer.num_rows} rows, its row groups {sum(self.group_rows)}")
        for index, group in enumerate(self._groups):
            self._check_group(group, f"{self._where}: row group {index}")

    def _footer_bytes(self) -> bytes:
        size = self._source.size()
        (length,) = struct.unpack("<I", self._source.read_at(4, size - 8))
        return self._source.read_at(length, size - 8 - length)

    def _check_group(self, group: Group, here: str) -> None:
        absent = [name for name in HEAVY if name in self._names and name not in group.chunks]
        if absent:
            raise FormatError(f"{here}: has no column {absent[0]}")
        for name, chunk in group.chunks.items():
            # A column of nulls or of equal values may claim billions of them in a few bytes.
            if chunk.values > group.rows * (MAX_AXES + 1):
                raise FormatError(f"{here}, column {name}: claims {chunk.values} values for {group.rows} rows")

    def small(self) -> Columns:
        names = [name for name in V2.names if name in self._names and name not in HEAVY]
        return _gather(self._file.read(columns=names, use_threads=False).to_batches())

    def heavy(self, group: int, needs: Mapping[str, int], checksums: bool) -> Columns:
        rows = self.group_rows[group]
        for name, need in needs.items():
            claimed = self._groups[group].chunks[name].unpacked
            if claimed > need + need // 8 + 64 * rows + _SLACK:
                raise FormatError(
                    f"{self._where}: row group {group}, column {name}: unpacks to {claimed} bytes, "
                    f"its shapes need {need}"
                )
        file = self._file if checksums else self._unchecked
        return _gather(file.read_row_group(group, columns=list(needs), use_threads=False).to_batches())

    def disk_bytes(self, group: int, column: str) -> int | None:
        return self._groups[group].chunks[column].stored

    def check_capacity(self, needs: Mapping[str, int]) -> None:
        for name, need in needs.items():
            _check_expansion(self._where, name, need, sum(group.chunks[name].unpacked for group in self._groups))

    def close(self) -> None:
        # Arrays already handed out keep the mapping alive.
        self._source.close()


class IpcContainer:
    """An Arrow IPC file, mapped: an uncompressed one is never copied."""

    def __init__(self, path: Path, where: str) -> None:
        self._where = where
        self._size = path.stat().st_size
        self._source = pa.memory_map(str(path))
        try:
            self._describe()
        except BaseException:
            self.close()
            raise

    def _describe(self) -> None:
        schema = pa.ipc.open_file(self._source).schema
        self.is_v2 = check_columns(schema, self._where)
        self._small = self._reader([name for name in V2.names if name in schema.names and name not in HEAVY], schema)
        self._heavy = self._reader([name for name in HEAVY if name in schema.names], schema)
        count = self._small.num_record_batches
        if count > MAX_ROWS:
            raise FormatError(f"{self._where}: claims {count} record batches, at most {MAX_ROWS} are read")
        self.metadata: bytes | None = None
        self._batches: list[pa.RecordBatch] = []
        for index in range(count):
            read = self._small.get_batch_with_custom_metadata(index)
            self._batches.append(read.batch)
            if index == count - 1 and read.batch.num_rows == 0:
                self.metadata = _own_metadata(dict(read.custom_metadata or {}), self._where)
                if self.metadata is None and count > 1:
                    raise FormatError(f"{self._where}: its last record batch is empty, and its metadata is lost")
        held = self._count_messages()
        if held > count:
            raise FormatError(f"{self._where}: holds {held} record batches, its footer lists {count}")
        self.group_rows = tuple(batch.num_rows for batch in self._batches)
        if sum(self.group_rows) > MAX_ROWS:
            raise FormatError(f"{self._where}: claims {sum(self.group_rows)} rows, at most {MAX_ROWS} are read")

    def _reader(self, names: Sequence[str], schema: pa.Schema) -> pa.ipc.RecordBatchFileReader:
        indices = sorted(schema.names.index(name) for name in names)
        return pa.ipc.open_file(self._source, options=pa.ipc.IpcReadOptions(included_fields=indices, use_threads=False))

    def _count_messages(self) -> int:
        """Record batches in the file's body: a damaged footer may list fewer, and rows would be lost without a word."""
        count = 0
        self._source.seek(_IPC_BODY)
        with suppress(pa.ArrowException, OSError):  # a body without an end mark runs into the footer
            for message in pa.ipc.MessageReader.open_stream(self._source):
                count += message.type == "record batch"
        return count

    def small(self) -> Columns:
        return _gather(self._batches)

    def heavy(self, group: int, needs: Mapping[str, int], checksums: bool) -> Columns:
        batch = self._heavy.get_batch(group)
        if batch.num_rows != self.group_rows[group]:
            raise FormatError(f"{self._where}: record batch {group} changed while it was read")
        return {name: column for name, column in _gather([batch]).items() if name in needs}

    def disk_bytes(self, group: int, column: str) -> int | None:
        return None

    def check_capacity(self, needs: Mapping[str, int]) -> None:
        for name, need in needs.items():
            _check_expansion(self._where, name, need, self._size)

    def close(self) -> None:
        self._source.close()


def _own_metadata(entries: Mapping[bytes, bytes], where: str) -> bytes | None:
    for key, value in entries.items():
        if key != METADATA_KEY and value.startswith(_JSON_START):
            raise FormatError(f"{where}: the key of its aq_jax metadata is damaged: {key[:40]!r}")
    return entries.get(METADATA_KEY)


def _check_expansion(where: str, column: str, need: int, stored: int) -> None:
    # Honest compression stays far below; without this a shape of 2^62 elements would look fine until it is read.
    if need > _MAX_EXPANSION * stored + (256 << 20):
        raise FormatError(f"{where}: column {column} holds {stored} bytes, the shapes of its rows need {need}")


def _gather(batches: Sequence[pa.RecordBatch]) -> Columns:
    columns: Columns = {}
    for batch in batches:
        for name, array in plain(batch).items():
            columns.setdefault(name, []).append(array)
    return columns
