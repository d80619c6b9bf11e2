"""Thrift's compact protocol, read and written again: how footers and page headers of Parquet are made to lie."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

INTEGERS = (4, 5, 6)
_BOOLS, _BYTE, _DOUBLE, _BINARY, _LISTS, _STRUCT = (1, 2), 3, 7, 8, (9, 10), 12


@dataclass
class Items:
    """A list."""

    kind: int
    values: list[Any]


@dataclass
class Struct:
    """Fields by number: kind and value."""

    fields: dict[int, tuple[int, Any]] = field(default_factory=dict)

    def __getitem__(self, number: int) -> Any:
        value = self.fields[number][1]
        return value.values if isinstance(value, Items) else value

    def __setitem__(self, number: int, value: Any) -> None:
        self.fields[number] = (self.fields[number][0], value)

    def __contains__(self, number: int) -> bool:
        return number in self.fields

    def integers(self) -> Iterator[tuple[Struct, int, str]]:
        """Every integer below: the struct that holds it, its number there, and its path."""
        for number, (kind, value) in self.fields.items():
            if kind in INTEGERS:
                yield self, number, str(number)
            below = value.values if isinstance(value, Items) else [value]
            for index, item in enumerate(below):
                if isinstance(item, Struct):
                    for owner, inner, path in item.integers():
                        yield owner, inner, f"{number}[{index}].{path}"


def decode(data: bytes, at: int = 0) -> tuple[Struct, int]:
    """The struct that begins there, and where it ends."""
    reader = _Reader(data, at)
    return reader.struct(), reader.at


def encode(value: Struct) -> bytes:
    """The bytes of a struct."""
    out, last = bytearray(), 0
    for number, (kind, inner) in value.fields.items():
        if 0 < number - last < 16:
            out.append((number - last) << 4 | kind)
        else:
            out.append(kind)
            out += _varint(_zigzag(number))
        last = number
        if kind not in _BOOLS:
            out += _value(kind, inner)
    return bytes(out) + b"\0"


def _value(kind: int, value: Any) -> bytes:
    if kind in INTEGERS:
        return _varint(_zigzag(value))
    if kind == _BINARY:
        return _varint(len(value)) + value
    if kind == _STRUCT:
        return encode(value)
    if kind in _LISTS:
        count = len(value.values)
        head = bytes([count << 4 | value.kind]) if count < 15 else bytes([0xF0 | value.kind]) + _varint(count)
        return head + b"".join(_value(value.kind, item) for item in value.values)
    return struct.pack("<d", value) if kind == _DOUBLE else bytes([value])


def _zigzag(value: int) -> int:
    return value << 1 if value >= 0 else (-value << 1) - 1


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


class _Reader:
    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def struct(self) -> Struct:
        found, number = Struct(), 0
        while head := self.take(1)[0]:
            number = number + (head >> 4) if head >> 4 else self.integer()
            kind = head & 15
            found.fields[number] = (kind, kind == 1 if kind in _BOOLS else self.value(kind))
        return found

    def value(self, kind: int) -> Any:
        if kind in INTEGERS:
            return self.integer()
        if kind == _BINARY:
            return self.take(self.varint())
        if kind == _STRUCT:
            return self.struct()
        if kind in _LISTS:
            head = self.take(1)[0]
            count = head >> 4 if head >> 4 != 15 else self.varint()
            return Items(head & 15, [self.value(head & 15) for _ in range(count)])
        return struct.unpack("<d", self.take(8))[0] if kind == _DOUBLE else self.take(1)[0]

    def take(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]

    def varint(self) -> int:
        value = shift = 0
        while (byte := self.take(1)[0]) > 127:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift

    def integer(self) -> int:
        value = self.varint()
        return value >> 1 ^ -(value & 1)
