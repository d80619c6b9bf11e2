"""Sizes of the column chunks of a Parquet file, from its footer.

pyarrow has them too, but its accessor ends the whole process on some damaged footers (a C++ exception that it does not
catch). The footer is a Thrift struct in the compact protocol; four of its structs matter here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

_BOOLS, _BYTE, _INTS, _DOUBLE, _BINARY, _LISTS, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12
_MAX_DEPTH = 16


@dataclass(frozen=True, slots=True)
class Chunk:
    """One column of one row group."""

    values: int
    unpacked: int
    """Bytes of its pages when they are decompressed."""
    stored: int
    """Bytes of its pages on disk."""


@dataclass(frozen=True, slots=True)
class Group:
    """One row group: its rows, and its chunks by the path of their column."""

    rows: int
    chunks: dict[str, Chunk]


def read_groups(footer: bytes) -> list[Group]:
    """The row groups that a footer lists.

    Raises:
        ValueError: it is not a Parquet footer.
    """
    try:
        # FileMetaData.row_groups is 4. RowGroup.columns is 1, num_rows 3. ColumnChunk.meta_data is 3.
        # ColumnMetaData.path_in_schema is 3, num_values 5, total_uncompressed_size 6, total_compressed_size 7.
        groups: list[Group] = []
        for group in _Reader(footer).struct(0).get(4, []):
            chunks = [column[3] for column in group[1]]
            named = {b".".join(c[3]).decode(): Chunk(values=c[5], unpacked=c[6], stored=c[7]) for c in chunks}
            groups.append(Group(group[3], named))
    except (KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"the Parquet footer is damaged ({type(error).__name__} {error})") from error
    return groups


class _Reader:
    """Thrift's compact protocol: structs become dicts by field number."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

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
        value = self._data[self._at]
        self._at += 1
        return value

    def _take(self, count: int) -> bytes:
        value = self._data[self._at : self._at + count]
        if len(value) != count:
            raise IndexError("past the end")
        self._at += count
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
