"""Read Thrift: the sizes of a Parquet file's column chunks from its footer, and of their pages from their headers.

pyarrow has them too, but its accessor ends the whole process on some damaged footers (a C++ exception that it does not
catch), and it takes the memory that a page header asks for before it looks at the page. Both are Thrift structs in the
compact protocol; seven of its structs matter here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_BOOLS, _BYTE, _INTS, _DOUBLE, _BINARY, _LISTS, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12
_MAX_DEPTH = 16
_LONGEST_HEADER = 1 << 24
_MAX_ITEMS = 1 << 22
"""The most fields and list items of one struct: each takes many times the byte that it may have in the file."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One column of one row group."""

    values: int
    unpacked: int
    """The bytes of its pages after decompression."""
    stored: int
    """The bytes of its pages on disk."""
    start: int
    """The offset of its pages in the file."""
    dictionary: bool
    """True if the chunk may have a dictionary."""
    plain: bool
    """Whether its pages are in this file, neither compressed nor encrypted, and without a dictionary."""


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a chunk."""

    kind: int
    unpacked: int
    start: int
    """The offset of the data after its header."""
    end: int
    values: int
    encoding: int
    levels: int
    """The encoding of its definition levels; of a page of the second version, something else."""


DATA_PAGE, DICTIONARY_PAGE = 0, 2
PLAIN_ENCODING, RUN_ENCODING = 0, 3
DICTIONARY_ENCODINGS = (2, 8)
PREFIX_ENCODING = 7
"""DELTA_BYTE_ARRAY: a value may repeat all of the one before it and add a byte."""


@dataclass(frozen=True, slots=True)
class Group:
    """One row group: its rows, and its chunks by the path of their column."""

    rows: int
    chunks: dict[str, Chunk]


def read_groups(footer: bytes) -> list[Group]:
    """Parse the row groups that a footer lists.

    Raises:
        ValueError: it is not a Parquet footer.
    """
    try:
        # FileMetaData.row_groups is 4. RowGroup.columns is 1, num_rows 3. ColumnChunk.meta_data is 3.
        # ColumnMetaData.encodings is 2, path_in_schema 3, codec 4 (0: uncompressed), num_values 5,
        # total_uncompressed_size 6, total_compressed_size 7, data_page_offset 9, dictionary_page_offset 11.
        # ColumnChunk.file_path is 1, crypto_metadata 8.
        groups: list[Group] = []
        for group in _Reader(footer).struct(0).get(4, []):
            chunks = [_chunk(column) for column in group[1]]
            groups.append(Group(group[3], dict(chunks)))
    except (KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"the Parquet footer is damaged ({type(error).__name__} {error})") from error
    return groups


def _chunk(column: dict[int, Any]) -> tuple[str, Chunk]:
    found = column[3]
    offset = found.get(11, 0)
    start = offset if 0 < offset < found[9] else found[9]
    coded = offset > 0 or any(encoding in DICTIONARY_ENCODINGS for encoding in found.get(2, ()))
    plain = found.get(4) == 0 and not offset and not column.keys() & {1, 8}
    return b".".join(found[3]).decode(), Chunk(found[5], found[6], found[7], start, coded, plain)


def read_pages(data: memoryview, chunk: Chunk) -> Iterator[Page]:
    """Iterate over the pages of a chunk, so that each can be checked before the next is looked for.

    Raises:
        ValueError: there is no page where one should be.
    """
    at, end = chunk.start, chunk.start + chunk.stored
    while at < end:
        reader = _Reader(data[: min(end, at + _LONGEST_HEADER)], at)
        try:
            # PageHeader.type is 1, uncompressed_page_size 2, compressed_page_size 3, data_page_header 5,
            # dictionary_page_header 7, data_page_header_v2 8. In those num_values is 1, encoding 2, in the last 4,
            # and definition_level_encoding 3.
            header = reader.struct(0)
            kind, unpacked, stored = header[1], header[2], header[3]
            about: dict[int, Any] = header.get(5) or header.get(7) or header.get(8) or {}
            encoding = about.get(4 if 8 in header else 2, 0)
            values, levels = about.get(1, 0), about.get(3, 0)
            page = Page(kind, unpacked, reader.at, reader.at + stored, values, encoding, levels)
            whole = stored >= 0 and unpacked >= 0 and page.values >= 0 and page.end <= end
        except (KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
            raise ValueError(f"the page header at byte {at} is damaged ({type(error).__name__} {error})") from error
        if not whole:
            raise ValueError(f"the page header at byte {at} claims {stored} bytes, unpacked {unpacked}")
        yield page
        at = page.end


class _Reader:
    """A reader of Thrift's compact protocol: structs become dicts by field number."""

    def __init__(self, data: bytes | memoryview, at: int = 0) -> None:
        self._data = data
        self._left = _MAX_ITEMS
        self.at = at

    def struct(self, depth: int) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            fields[number] = kind == 1 if kind in _BOOLS else self._value(kind, depth + 1)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("the Parquet footer is nested too deep")
        self._left -= 8 if kind == _STRUCT else 1
        if self._left < 0:
            raise ValueError(f"the Parquet footer has more than {_MAX_ITEMS} items")
        if kind in _INTS:
            return self._integer()
        if kind == _BINARY:
            return self._take(self._varint())
        if kind == _STRUCT:
            return self.struct(depth)
        if kind in _LISTS:
            head = self._byte()
            count = head >> 4 if head >> 4 != 15 else self._varint()
            return [self._value(head & 15, depth + 1) for _ in range(count)]
        if kind in _BOOLS or kind == _BYTE:
            return self._byte()
        if kind == _DOUBLE:
            return struct.unpack("<d", self._take(8))[0]
        raise ValueError(f"the Parquet footer has a field of unknown kind {kind}")

    def _byte(self) -> int:
        value = self._data[self.at]
        self.at += 1
        return value

    def _take(self, count: int) -> bytes:
        value = bytes(self._data[self.at : self.at + count])
        if len(value) != count:
            raise IndexError("past the end")
        self.at += count
        return value

    def _varint(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("the Parquet footer has a number that does not end")

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
