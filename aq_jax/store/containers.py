"""Parquet and Arrow IPC files behind one face: small columns at once, large ones a row group at a time."""

from __future__ import annotations

import errno
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aq_jax.errors import AqError, FormatError
from aq_jax.store.columns import byte_views, check_columns, plain
from aq_jax.store.footer import (
    DICTIONARY_ENCODINGS,
    DICTIONARY_PAGE,
    PREFIX_ENCODING,
    Chunk,
    Group,
    read_groups,
    read_pages,
)
from aq_jax.store.mapping import map_file
from aq_jax.store.messages import check_messages
from aq_jax.store.pages import plain_values
from aq_jax.store.schema import HEAVY, MAX_AXES, METADATA_KEY, V2

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

MAX_ROWS = 1 << 22
_FEW_ROWS, _ROW_ON_DISK = 4096, 16
"""More rows than the first number must take as many bytes of the file each as the second says."""
_SMALL, _SMALL_ROW = 16 << 20, 256
"""Bytes that a small column may take in memory: so many, and for each row so many more."""
_MAX_FOOTER_ITEMS = 1 << 18
_MAX_EXPANSION = 1024
_SLACK = 1 << 20
_JSON_START = b'{"aliases":'
"""How canonical metadata begins: its keys are sorted."""

_BYTE_COLUMNS = frozenset(field.name for field in V2 if field.type in (pa.string(), pa.binary()))

Columns = dict[str, list[pa.Array]]


class Container(Protocol):
    """One file."""

    is_v2: bool
    metadata: bytes | None
    group_rows: tuple[int, ...]
    """Rows in each row group or record batch."""
    names: list[str]
    """Of its columns."""
    maps_grids: bool
    """Whether `heavy`, not asked for `data`, gives views of the file; else scales and zero points are read whole."""
    doubts: list[str]
    """Why the file is not to be trusted, although some of it can be read: only `survey` goes on when there are any."""

    def small(self) -> Columns:
        """The small columns of all rows."""
        ...

    def small_of(self, group: int, column: str) -> list[pa.Array]:
        """One small column of one group."""
        ...

    def place(self, group: int, column: str) -> tuple[int, int]:
        """The bytes of the file in which a group's column is, maybe with others."""
        ...

    def heavy(self, group: int, needs: Mapping[str, int], checksums: bool) -> Columns:
        """The large columns of one group; `needs` says how many bytes the rows' shapes ask for.

        `checksums` asks for the container's own, where it has any.
        """
        ...

    def mapped(self, group: int) -> list[np.ndarray] | None:
        """Each row's `data` as a view of the mapped file, unread; None where the file has no such bytes."""
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
        LookupError,
    ) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # the file is not to blame
        raise FormatError(f"{where}: damaged, or not a table of this format: {str(error)[:300]}") from error


def open_container(path: Path, where: str) -> Container:
    """Opens a file by what it is, not by what it is called."""
    data = _mapped(path)
    if not data:
        raise FormatError(f"{where}: is empty")
    magic = bytes(data[:6])
    if magic[:4] == b"PAR1":
        return ParquetContainer(data, where)
    if magic == b"ARROW1":
        return IpcContainer(data, where)
    raise FormatError(f"{where}: not a Parquet or Arrow IPC file (it starts with {magic!r})")


class ParquetContainer:
    """A Parquet file, mapped."""

    maps_grids = False

    def __init__(self, data: memoryview, where: str) -> None:
        self._where = where
        self.doubts: list[str] = []
        self._bytes = data
        self._source = pa.BufferReader(pa.py_buffer(data))
        try:
            # Small columns are always read with page checksums: the digests of rows do not cover all of them.
            raw = self._footer_bytes()
            self._groups = read_groups(raw)
            self._file = self._open(None, len(raw), checksums=True)
            self._unchecked = self._open(self._file.metadata, len(raw), checksums=False)
            self._describe(raw)
        except BaseException:
            self.close()
            raise

    def _open(self, metadata: pq.FileMetaData | None, length: int, *, checksums: bool) -> pq.ParquetFile:
        # Values that rows share stay shared until it is known how many bytes they come to.
        chunks = [item for group in self._groups for item in group.chunks.items()]
        shared = {path for path, chunk in chunks if chunk.dictionary and path in _BYTE_COLUMNS}
        return pq.ParquetFile(
            self._source,
            metadata=metadata,
            read_dictionary=sorted(shared) or None,
            pre_buffer=False,
            page_checksum_verification=checksums,
            thrift_string_size_limit=length,
            # Memory for a list is taken before its items are read, of which each has several bytes.
            thrift_container_size_limit=min(_MAX_FOOTER_ITEMS, 16 + length // 8),
        )

    def _describe(self, raw: bytes) -> None:
        footer, schema = self._file.metadata, self._file.schema_arrow
        _check_rows(self._where, footer.num_rows, self._source.size())
        self.is_v2 = check_columns(schema, self._where)
        self.metadata = _own_metadata(footer.metadata or {}, self.doubts)
        _check_widths(self._where, schema, footer.num_rows, self._source.size())
        self.names = schema.names
        if self.metadata is None and not self.doubts and _JSON_START in raw:
            self.doubts.append("its aq_jax metadata is there, but damage hides it")
        self.group_rows = tuple(group.rows for group in self._groups)
        if sum(self.group_rows) != footer.num_rows or min(self.group_rows, default=0) < 0:
            raise FormatError(f"{self._where}: claims {footer.num_rows} rows, its row groups {sum(self.group_rows)}")
        for index, group in enumerate(self._groups):
            self._check_group(group, f"{self._where}: row group {index}")
        self._check_small(footer.num_rows)

    def _footer_bytes(self) -> bytes:
        size = self._source.size()
        if size < 12 or self._source.read_at(4, size - 4) != b"PAR1":
            raise ValueError("its end is missing: the last bytes are not b'PAR1'")
        (length,) = struct.unpack("<I", self._source.read_at(4, size - 8))
        if length > size - 12:
            raise ValueError(f"its footer would have {length} bytes, the file has {size}")
        return self._source.read_at(length, size - 8 - length)

    def _check_group(self, group: Group, here: str) -> None:
        absent = [name for name in HEAVY if name in self.names and name not in group.chunks]
        if absent:
            raise FormatError(f"{here}: has no column {absent[0]}")
        for name, chunk in group.chunks.items():
            # A column of nulls or of equal values may claim billions of them in a few bytes.
            if chunk.values > group.rows * (MAX_AXES + 1):
                raise FormatError(f"{here}, column {name}: claims {chunk.values} values for {group.rows} rows")

    def _check_small(self, rows: int) -> None:
        """Refuses small columns that would unpack to much, before they are read."""
        limit = _SMALL + _SMALL_ROW * rows
        sizes: dict[str, int] = {}
        for index, group in enumerate(self._groups):
            for path, chunk in group.chunks.items():
                name = path.partition(".")[0]
                if name in V2.names and name not in HEAVY:
                    here = f"{self._where}: row group {index}, column {name}"
                    sizes[path] = sizes.get(path, 0) + self._check_pages(chunk, here, limit)
                    if sizes[path] > limit:
                        raise FormatError(f"{here}: unpacks to {sizes[path]} bytes, {rows} rows are allowed {limit}")

    def _check_pages(self, chunk: Chunk, here: str, limit: int) -> int:
        """Refuses pages that unpack to more than the footer says of their column; how many bytes they unpack to.

        pyarrow takes the memory that a page asks for, whatever the footer says.
        """
        if not 0 < chunk.start <= chunk.start + chunk.stored <= self._source.size():
            raise FormatError(
                f"{here}: claims {chunk.stored} bytes at {chunk.start}, there is no such place in the file"
            )
        size = pages = 0
        for page in read_pages(self._bytes, chunk):
            size, pages = size + page.unpacked, pages + 1
            if size > chunk.unpacked + chunk.unpacked // 8 + _SLACK or pages > chunk.values + 2:
                raise FormatError(f"{here}: page {pages} unpacks to {page.unpacked} bytes, all to {chunk.unpacked}")
            coded = page.kind == DICTIONARY_PAGE or page.encoding in DICTIONARY_ENCODINGS
            if coded and not chunk.dictionary:
                raise FormatError(f"{here}: has a dictionary that the footer does not know of")
            most = page.unpacked // 4 if page.kind == DICTIONARY_PAGE else chunk.values  # no value has fewer bytes
            if page.values > most:
                raise FormatError(f"{here}: page {pages} claims {page.values} values, at most {most} can be in it")
            if page.encoding == PREFIX_ENCODING and page.values * page.unpacked > limit:
                raise FormatError(
                    f"{here}: {page.values} values share prefixes and may come to {page.values * page.unpacked} bytes, "
                    f"{limit} are allowed; write it without DELTA_BYTE_ARRAY"
                )
        return size

    def small(self) -> Columns:
        names = [name for name in V2.names if name in self.names and name not in HEAVY]
        limit = _SMALL + _SMALL_ROW * sum(self.group_rows)
        batches = self._file.read(columns=names, use_threads=False).to_batches()
        return _gather(batches, dict.fromkeys(names, limit))

    def small_of(self, group: int, column: str) -> list[pa.Array]:
        batches = self._file.read_row_group(group, columns=[column], use_threads=False).to_batches()
        return _gather(batches, {column: _SMALL + _SMALL_ROW * self.group_rows[group]}).get(column, [])

    def place(self, group: int, column: str) -> tuple[int, int]:
        chunks = self._groups[group].chunks
        found = [chunk for path, chunk in chunks.items() if path.partition(".")[0] == column]
        return (found[0].start, found[0].start + found[0].stored) if found else (0, self._source.size())

    def heavy(self, group: int, needs: Mapping[str, int], checksums: bool) -> Columns:
        limits = _heavy_limits(needs, self.group_rows[group])
        for name, need in needs.items():
            chunk, here = self._groups[group].chunks[name], f"{self._where}: row group {group}, column {name}"
            if chunk.unpacked > limits[name]:
                raise FormatError(f"{here}: unpacks to {chunk.unpacked} bytes, its shapes need {need}")
            self._check_pages(chunk, here, limits[name])
        file = self._file if checksums else self._unchecked
        return _gather(file.read_row_group(group, columns=list(needs), use_threads=False).to_batches(), limits)

    def mapped(self, group: int) -> list[np.ndarray] | None:
        leaves = map(self._file.schema.column, range(len(self._file.schema)))
        data = next((leaf for leaf in leaves if leaf.path == "data"), None)
        if (
            data is None
            or data.physical_type != "BYTE_ARRAY"
            or data.max_repetition_level
            or data.max_definition_level > 1
        ):
            return None
        values = plain_values(
            np.frombuffer(self._bytes, np.uint8), self._groups[group].chunks["data"], data.max_definition_level == 1
        )
        return values if values is not None and len(values) == self.group_rows[group] else None

    def disk_bytes(self, group: int, column: str) -> int | None:
        return self._groups[group].chunks[column].stored

    def check_capacity(self, needs: Mapping[str, int]) -> None:
        for name, need in needs.items():
            _check_expansion(self._where, name, need, sum(group.chunks[name].unpacked for group in self._groups))

    def close(self) -> None:
        # Arrays already handed out keep the mapping alive.
        self._source.close()


class IpcContainer:
    """An Arrow IPC file, mapped."""

    maps_grids = True

    def __init__(self, data: memoryview, where: str) -> None:
        self._where = where
        self.doubts: list[str] = []
        self._bytes, self._size = data, len(data)
        self._source = pa.BufferReader(pa.py_buffer(data))
        try:
            self._describe()
        except BaseException:
            self.close()
            raise

    def _describe(self) -> None:
        messages = self._messages = check_messages(self._bytes, self._where)
        _check_rows(self._where, sum(message.rows for message in messages), self._size)
        schema = pa.ipc.open_file(self._source).schema
        self.is_v2 = check_columns(schema, self._where)
        _check_widths(self._where, schema, sum(message.rows for message in messages), self._size)
        self._small = self._reader([name for name in V2.names if name in schema.names and name not in HEAVY], schema)
        self.names = schema.names
        self._heavy = self._reader([name for name in HEAVY if name in schema.names], schema)
        self._views = pa.ipc.open_file(self._source)
        count = self._small.num_record_batches
        self.metadata: bytes | None = None
        self._batches: list[pa.RecordBatch | None] = []
        for index in range(count):
            try:
                read = self._small.get_batch_with_custom_metadata(index)
            except (pa.ArrowException, OSError, ValueError) as error:
                start, stop = self.place(index, "")
                self.doubts.append(f"record batch {index}, bytes {start} to {stop}, is damaged: {str(error)[:200]}")
                self._batches.append(None)
                continue
            self._batches.append(read.batch)
            if index == count - 1 and read.batch.num_rows == 0:
                self.metadata = _own_metadata(dict(read.custom_metadata or {}), self.doubts)
                if self.metadata is None and count > 1 and not self.doubts:
                    self.doubts.append("its last record batch is empty, and its metadata is lost to some damage")
        self.group_rows = tuple(
            message.rows if batch is None else batch.num_rows
            for batch, message in zip(self._batches, messages, strict=True)
        )
        _check_rows(self._where, sum(self.group_rows), self._size)

    def _reader(self, names: Sequence[str], schema: pa.Schema) -> pa.ipc.RecordBatchFileReader:
        indices = sorted(schema.names.index(name) for name in names)
        return pa.ipc.open_file(self._source, options=pa.ipc.IpcReadOptions(included_fields=indices, use_threads=False))

    def small(self) -> Columns:
        rows = sum(self.group_rows)
        batches = [batch for batch in self._batches if batch is not None]
        return _gather(batches, dict.fromkeys(V2.names, _SMALL + _SMALL_ROW * rows))

    def small_of(self, group: int, column: str) -> list[pa.Array]:
        batch = self._batches[group]
        if batch is None:
            raise ValueError(f"record batch {group} is damaged")
        return _gather([batch.select([column])], {column: _SMALL + _SMALL_ROW * batch.num_rows}).get(column, [])

    def place(self, group: int, column: str) -> tuple[int, int]:
        return self._messages[group].start, self._messages[group].end

    def heavy(self, group: int, needs: Mapping[str, int], checksums: bool) -> Columns:
        # A reader of some columns copies them, one of all columns gives views of the file.
        batch = (self._heavy if "data" in needs else self._views).get_batch(group).select(list(needs))
        if batch.num_rows != self.group_rows[group]:
            raise FormatError(f"{self._where}: record batch {group} changed while it was read")
        return _gather([batch], _heavy_limits(needs, batch.num_rows))

    def mapped(self, group: int) -> list[np.ndarray] | None:
        file = np.frombuffer(self._bytes, np.uint8)
        start, stop = file.ctypes.data, file.ctypes.data + file.size
        column = self._views.get_batch(group).column("data")
        column.validate(full=True)
        if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
            return None
        views = [view for view in byte_views(column) if view is not None]
        # What was decompressed is elsewhere.
        inside = all(start <= view.ctypes.data <= stop - view.size for view in views if view.size)
        return views if inside and len(views) == self.group_rows[group] else None

    def disk_bytes(self, group: int, column: str) -> int | None:
        return None

    def check_capacity(self, needs: Mapping[str, int]) -> None:
        for name, need in needs.items():
            _check_expansion(self._where, name, need, self._size)

    def close(self) -> None:
        self._source.close()


def _mapped(path: Path) -> memoryview:
    """A file's bytes, of which those are read that are looked at.

    It is opened once, so that all of them are of one file, also when another takes its name meanwhile. pyarrow's own
    mapping would have the system fetch whatever it reads through.
    """
    with path.open("rb") as file:
        return map_file(file)


def _own_metadata(entries: Mapping[bytes, bytes], doubts: list[str]) -> bytes | None:
    for key, value in entries.items():
        if key != METADATA_KEY and value.startswith(_JSON_START):
            doubts.append(f"the key of its aq_jax metadata is damaged: {key[:40]!r}")
    return entries.get(METADATA_KEY)


def _check_expansion(where: str, column: str, need: int, stored: int) -> None:
    # Honest compression stays far below; without this a shape of 2^62 elements would look fine until it is read.
    if need > _MAX_EXPANSION * stored + (256 << 20):
        raise FormatError(f"{where}: column {column} holds {stored} bytes, the shapes of its rows need {need}")


def _check_rows(where: str, rows: int, size: int) -> None:
    # Each row becomes an object: a few bytes that say "the same again" must not make millions of them.
    most = min(MAX_ROWS, _FEW_ROWS + size // _ROW_ON_DISK)
    if not 0 <= rows <= most:
        raise FormatError(f"{where}: claims {rows} rows, a file of {size} bytes holds at most {most}")


def _check_widths(where: str, schema: pa.Schema, rows: int, size: int) -> None:
    # Values of one width take it even where they are null.
    for field in schema:
        if pa.types.is_fixed_size_binary(field.type) and field.type.byte_width * rows > size + _SLACK:
            raise FormatError(f"{where}: column {field.name} claims {rows} values of {field.type.byte_width} bytes")


def _heavy_limits(needs: Mapping[str, int], rows: int) -> dict[str, int]:
    """Bytes that a group's large columns may take, given those that the shapes of its rows ask for."""
    return {name: need + need // 8 + 64 * rows + _SLACK for name, need in needs.items()}


def _gather(batches: Sequence[pa.RecordBatch], limits: Mapping[str, int]) -> Columns:
    columns: Columns = {}
    for batch in batches:
        for name, array in plain(batch, limits).items():
            columns.setdefault(name, []).append(array)
    return columns
