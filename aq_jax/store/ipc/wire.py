"""Find the messages of an Arrow IPC file, and check that its footer and their own headers agree.

Arrow believes what a message says of its own length, and of that of its buffers when they are decompressed, and takes
the memory first. Footer and messages are FlatBuffers; five of their tables matter here.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass

from aq_jax.errors import FormatError

MAGIC = b"ARROW1"
_BODY = 8
"""The offset of the first message, after the magic bytes."""
_PREFIX = struct.Struct("<Ii")
_MARKER = 0xFFFFFFFF
_BLOCK = struct.Struct("<qi4xq")
_PAIR = struct.Struct("<qq")
_DICTIONARY, _RECORDS = 2, 3


@dataclass(frozen=True, slots=True)
class Message:
    """A record batch, or a dictionary, in the file."""

    start: int
    end: int
    kind: int
    rows: int
    """The number of rows that it claims."""


def check_messages(data: memoryview, where: str) -> list[Message]:
    """List the record batches of the footer, in order, after checking that the file agrees.

    Raises:
        FormatError: it lists too few, too many, overlapping or misplaced ones, or one leads out of itself.
        struct.error, IndexError, ValueError: there is no footer, or no message where one should be.
    """
    end = len(data) - len(MAGIC) - 4
    if end < _BODY or bytes(data[end + 4 :]) != MAGIC:
        raise ValueError(f"its end is missing: the last bytes are not {MAGIC!r}")
    (length,) = struct.unpack_from("<i", data, end)
    if not 0 < length <= end - _BODY:
        raise ValueError(f"its footer would have {length} bytes, the file has {len(data)}")
    footer = _Table.root(data[end - length : end])
    blocks = [*footer.structs(2, _BLOCK), *footer.structs(3, _BLOCK)]
    listed = [_message(data, where, *block, limit=end - length) for block in blocks]
    inside = sorted(listed, key=lambda message: message.start)
    if any(first.end > second.start for first, second in itertools.pairwise(inside)):
        raise FormatError(f"{where}: its footer lists messages that overlap")
    batches = [message for message in listed if message.kind == _RECORDS]
    if batches != [message for message in inside if message.kind == _RECORDS]:
        raise FormatError(f"{where}: its footer lists record batches in another order than the file holds")
    held = _count(data, end - length)
    if held > len(batches):
        raise FormatError(f"{where}: holds {held} record batches, but its footer lists {len(batches)}")
    return batches


def _message(data: memoryview, where: str, start: int, head: int, body: int, limit: int) -> Message:
    here = f"{where}: message at byte {start}"
    if not (start >= _BODY and head > 8 and body >= 0 and start + head + body <= limit):
        raise FormatError(f"{here}: claims {head} and {body} bytes, which are outside the file")
    marker, size = _PREFIX.unpack_from(data, start)
    # Files of 2019 and before have no marker in front of the size.
    found, prefix = (size, 8) if marker == _MARKER else (marker, 4)
    if found + prefix != head:
        raise FormatError(f"{here}: says that its head has {found + prefix} bytes, but the footer says {head}")
    message = _Table.root(data[start + prefix : start + head])
    if message.integer(3, "<q") != body:
        raise FormatError(
            f"{here}: says that its body has {message.integer(3, '<q')} bytes, but the footer says {body}"
        )
    kind = message.integer(1, "<B")
    if kind not in (_DICTIONARY, _RECORDS):
        raise FormatError(f"{here}: is not a record batch")
    batch = message.table(2) if kind == _RECORDS else message.table(2).table(1)
    if batch.has(3):
        raise FormatError(f"{here}: is compressed; write the file again uncompressed, or as Parquet")
    for offset, length in batch.structs(2, _PAIR):
        if offset < 0 or length < 0 or offset + length > body:
            raise FormatError(f"{here}: has a buffer at {offset} of {length} bytes, but its body has {body}")
    return Message(start, start + head + body, kind, batch.integer(0, "<q"))


def _count(data: memoryview, limit: int) -> int:
    """Count the record batches in the file's body: a damaged footer may list fewer, and rows would be lost silently."""
    count, at = 0, _BODY
    try:
        while at + _PREFIX.size <= limit:
            marker, size = _PREFIX.unpack_from(data, at)
            if marker != _MARKER or size <= 0 or at + 8 + size > limit:
                break
            message = _Table.root(data[at + 8 : at + 8 + size])
            count += message.integer(1, "<B") == _RECORDS
            at += 8 + size + max(message.integer(3, "<q"), 0)
    except (ValueError, struct.error, IndexError):
        pass  # what follows is no message; those that the footer lists have been checked
    return count


class _Table:
    """One table of a FlatBuffer: its fields by number, each checked to lie within the bytes."""

    def __init__(self, data: memoryview, at: int) -> None:
        self._data, self._at = data, at
        self._fields = at - self._read("<i", at)
        self._size = self._read("<H", self._fields)

    @classmethod
    def root(cls, data: memoryview) -> _Table:
        return cls(data, struct.unpack_from("<I", data)[0])

    def _read(self, kind: str, at: int) -> int:
        if at < 0:  # which Python would count from the end
            raise ValueError("a FlatBuffer leads out of itself")
        return struct.unpack_from(kind, self._data, at)[0]

    def _find_field(self, number: int) -> int:
        """Find the offset of a field; 0 if the table does not have it."""
        if 4 + 2 * number >= self._size:
            return 0
        offset = self._read("<H", self._fields + 4 + 2 * number)
        return self._at + offset if offset else 0

    def has(self, number: int) -> bool:
        return self._find_field(number) != 0

    def integer(self, number: int, kind: str) -> int:
        offset = self._find_field(number)
        return self._read(kind, offset) if offset else 0

    def table(self, number: int) -> _Table:
        if not (offset := self._find_field(number)):
            raise ValueError("a FlatBuffer lacks a table")
        return _Table(self._data, offset + self._read("<I", offset))

    def structs(self, number: int, kind: struct.Struct) -> list[tuple[int, ...]]:
        if not (offset := self._find_field(number)):
            return []
        offset += self._read("<I", offset)
        count = self._read("<I", offset)
        stop = offset + 4 + count * kind.size
        if stop > len(self._data):
            raise ValueError(f"a FlatBuffer's list claims {count} entries")
        return list(kind.iter_unpack(self._data[offset + 4 : stop]))
