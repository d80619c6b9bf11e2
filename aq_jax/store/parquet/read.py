"""Read mapped Parquet files; the claims of footer and pages are compared before anything is unpacked."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aq_jax.errors import FormatError
from aq_jax.store.columns import Columns, check_columns, gather
from aq_jax.store.limits import (
    JSON_START,
    SLACK,
    check_expansion,
    check_rows,
    check_widths,
    large_limits,
    own_metadata,
    small_limit,
)
from aq_jax.store.parquet.values import plain_values
from aq_jax.store.parquet.wire import (
    DICTIONARY_ENCODINGS,
    DICTIONARY_PAGE,
    PREFIX_ENCODING,
    Chunk,
    Group,
    read_groups,
    read_pages,
)
from aq_jax.store.schema import LARGE_COLUMNS, MAX_AXES, V2

if TYPE_CHECKING:
    from collections.abc import Mapping

_MAX_FOOTER_ITEMS = 1 << 18
_BYTE_COLUMNS = frozenset(field.name for field in V2 if field.type in (pa.string(), pa.binary()))


class ParquetContainer:
    """A mapped Parquet file."""

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
        check_rows(self._where, footer.num_rows, self._source.size())
        self.is_v2 = check_columns(schema, self._where)
        self.metadata = own_metadata(footer.metadata or {}, self.doubts)
        check_widths(self._where, schema, footer.num_rows, self._source.size())
        self.names = schema.names
        if self.metadata is None and not self.doubts and JSON_START in raw:
            self.doubts.append("its aq_jax metadata is there, but damage hides it")
        self.group_rows = tuple(group.rows for group in self._groups)
        if sum(self.group_rows) != footer.num_rows or min(self.group_rows, default=0) < 0:
            raise FormatError(
                f"{self._where}: claims {footer.num_rows} rows, but its row groups {sum(self.group_rows)}"
            )
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
        absent = [name for name in LARGE_COLUMNS if name in self.names and name not in group.chunks]
        if absent:
            raise FormatError(f"{here}: has no column {absent[0]}")
        for name, chunk in group.chunks.items():
            # A column of nulls or of equal values may claim billions of them in a few bytes.
            if chunk.values > group.rows * (MAX_AXES + 1):
                raise FormatError(f"{here}, column {name}: claims {chunk.values} values for {group.rows} rows")

    def _check_small(self, rows: int) -> None:
        """Refuse small columns that would unpack to too many bytes, before they are read."""
        limit = small_limit(rows)
        sizes: dict[str, int] = {}
        for index, group in enumerate(self._groups):
            for path, chunk in group.chunks.items():
                name = path.partition(".")[0]
                if name in V2.names and name not in LARGE_COLUMNS:
                    here = f"{self._where}: row group {index}, column {name}"
                    sizes[path] = sizes.get(path, 0) + self._check_pages(chunk, here, limit)
                    if sizes[path] > limit:
                        raise FormatError(
                            f"{here}: unpacks to {sizes[path]} bytes; wanted at most {limit} for {rows} rows"
                        )

    def _check_pages(self, chunk: Chunk, here: str, limit: int) -> int:
        """Refuse pages that unpack to more than the footer says of their column; count the bytes that they unpack to.

        pyarrow takes the memory that a page asks for, whatever the footer says.
        """
        if not 0 < chunk.start <= chunk.start + chunk.stored <= self._source.size():
            raise FormatError(f"{here}: claims {chunk.stored} bytes at {chunk.start}, which is outside the file")
        size = pages = 0
        for page in read_pages(self._bytes, chunk):
            size, pages = size + page.unpacked, pages + 1
            if size > chunk.unpacked + chunk.unpacked // 8 + SLACK or pages > chunk.values + 2:
                raise FormatError(
                    f"{here}: page {pages} unpacks to {page.unpacked} bytes, but all pages to {chunk.unpacked}"
                )
            coded = page.kind == DICTIONARY_PAGE or page.encoding in DICTIONARY_ENCODINGS
            if coded and not chunk.dictionary:
                raise FormatError(f"{here}: has a dictionary that the footer does not list")
            most = page.unpacked // 4 if page.kind == DICTIONARY_PAGE else chunk.values  # no value has fewer bytes
            if page.values > most:
                raise FormatError(f"{here}: page {pages} claims {page.values} values, but holds at most {most}")
            if page.encoding == PREFIX_ENCODING and page.values * page.unpacked > limit:
                raise FormatError(
                    f"{here}: {page.values} values share prefixes and may take {page.values * page.unpacked} bytes; "
                    f"wanted at most {limit}: write it without DELTA_BYTE_ARRAY"
                )
        return size

    def read_small(self) -> Columns:
        names = [name for name in V2.names if name in self.names and name not in LARGE_COLUMNS]
        limit = small_limit(sum(self.group_rows))
        batches = self._file.read(columns=names, use_threads=False).to_batches()
        return gather(batches, dict.fromkeys(names, limit))

    def read_small_column(self, group: int, column: str) -> list[pa.Array]:
        batches = self._file.read_row_group(group, columns=[column], use_threads=False).to_batches()
        return gather(batches, {column: small_limit(self.group_rows[group])}).get(column, [])

    def extent(self, group: int, column: str) -> tuple[int, int]:
        chunks = self._groups[group].chunks
        found = [chunk for path, chunk in chunks.items() if path.partition(".")[0] == column]
        return (found[0].start, found[0].start + found[0].stored) if found else (0, self._source.size())

    def read_large(self, group: int, needs: Mapping[str, int], checksums: bool) -> Columns:
        limits = large_limits(needs, self.group_rows[group])
        for name, need in needs.items():
            chunk, here = self._groups[group].chunks[name], f"{self._where}: row group {group}, column {name}"
            if chunk.unpacked > limits[name]:
                raise FormatError(f"{here}: unpacks to {chunk.unpacked} bytes, but its shapes need {need}")
            self._check_pages(chunk, here, limits[name])
        file = self._file if checksums else self._unchecked
        return gather(file.read_row_group(group, columns=list(needs), use_threads=False).to_batches(), limits)

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
        values = plain_values(self._bytes, self._groups[group].chunks["data"], data.max_definition_level == 1)
        return values if values is not None and len(values) == self.group_rows[group] else None

    def disk_bytes(self, group: int, column: str) -> int | None:
        return self._groups[group].chunks[column].stored

    def check_capacity(self, needs: Mapping[str, int]) -> None:
        for name, need in needs.items():
            check_expansion(self._where, name, need, sum(group.chunks[name].unpacked for group in self._groups))

    def close(self) -> None:
        # Arrays already handed out keep the mapping alive.
        self._source.close()
