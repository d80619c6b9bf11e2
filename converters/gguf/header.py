"""Read the header of a GGUF file: its fields, and the extents of its tensors.

Nothing that the header says is believed: each length and count is compared with what is left of the file before
anything is made of it, and tensors must lie one after the other, as the programs that read such files demand.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from aq_jax.converters.gguf.types import TYPES, TensorType
from aq_jax.errors import FormatError
from aq_jax.store.mapping import map_file

T = TypeVar("T", str, int, bool)
MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MAX_AXES = 4
_MAX_NAME = 63
_MAX_KEY = 65535
_MAX_ELEMENTS = 2**59
_MOST_FIELDS, _MOST_TENSORS, _MOST_TEXTS = 1 << 16, 1 << 16, 1 << 22
_U32, _BOOL, _STRING, _ARRAY, _U64 = 4, 7, 8, 9, 10
_NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_LAYOUTS = {kind: struct.Struct(f"<{letter}") for kind, letter in zip(_NUMBERS, "BbHhIifBQqd", strict=True)}
_LEAST_FIELD, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8
"""The bytes of the shortest field, and of the shortest entry of a tensor."""


_KINDS = {str: "text", int: "a whole number", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """The extent of a tensor.

    Args:
        name: The tensor's name in the file.
        shape: The tensor's shape, the last axis contiguous: the file has the axes in the other order.
        type: The tensor's type.
        offset: The offset of its bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a file.

    Args:
        path: The file.
        version: The version of the format.
        fields: The fields by key: numbers, booleans and text; arrays of numbers as NumPy arrays, of text as `Texts`.
        tensors: The extents of the tensors, in order.
    """

    path: Path
    version: int
    fields: dict[str, Any]
    tensors: tuple[Tensor, ...]


class Texts(Sequence[str]):
    """An array of text, decoded when it is asked for."""

    def __init__(self, where: str, memory: memoryview, spans: np.ndarray) -> None:
        self._where, self._memory, self._spans = where, memory, spans

    def __len__(self) -> int:
        return len(self._spans) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, stop = int(self._spans[index]) + 8, int(self._spans[index + 1])
        return _decode(self._memory[start:stop], f"{self._where}[{index}]")

    def __iter__(self) -> Iterator[str]:
        spans = self._spans.tolist()
        for index, start in enumerate(spans[:-1]):
            yield _decode(self._memory[start + 8 : spans[index + 1]], f"{self._where}[{index}]")


def field_of(fields: Mapping[str, Any], key: str, kind: type[T], where: object) -> T | None:
    """Return a field that must be text (str), a whole number (int), or true or false (bool); None if it is missing.

    Raises:
        FormatError: for a field of another kind.

    >>> field_of({"general.architecture": "bert"}, "general.architecture", str, "m.gguf")
    'bert'
    """
    found = fields.get(key)
    if found is not None and (not isinstance(found, kind) or (kind is int and isinstance(found, bool))):
        raise FormatError(f"{where}: {key} is {str(found)[:40]}; wanted {_KINDS[kind]}")
    return found


def read_header(path: Path) -> Header:
    """Read the header of a file on this machine.

    Raises:
        FormatError: if the file is none of GGUF 2 or 3, is cut or damaged, or holds a type that is not known.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(8)
        if start[:4] != MAGIC or len(start) < 8:
            raise FormatError(f"{path}: begins with {start[:4]!r}; wanted {MAGIC!r}: is it a GGUF file?")
        size = os.fstat(file.fileno()).st_size
        memory = map_file(file)
    (version,) = struct.unpack("<I", start[4:])
    if version not in VERSIONS:
        big = " (of a big-endian machine)" if int.from_bytes(start[4:], "big") in VERSIONS else ""
        raise FormatError(f"{path}: is of version {version}{big}; wanted 2 or 3, little-endian: convert it again")
    reader = _Reader(path, memory)
    count, fields = reader.number(_U64, "the number of tensors"), reader.fields()
    alignment = fields.get(ALIGNMENT, _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment < 1 or alignment & (alignment - 1):
        raise FormatError(f"{path}: {ALIGNMENT} is {str(alignment)[:40]}; wanted a power of two")
    return Header(path, version, fields, tuple(reader.tensors(count, alignment, size)))


class _Reader:
    """A position in a mapped file."""

    def __init__(self, path: Path, memory: memoryview) -> None:
        self.path, self.memory, self.at = path, memory, 8

    @property
    def left(self) -> int:
        return len(self.memory) - self.at

    def number(self, kind: int, what: str) -> Any:
        layout = _LAYOUTS[kind]
        if layout.size > self.left:
            raise FormatError(f"{self.path}: is cut: {what} would lie at byte {self.at} of {len(self.memory)}")
        (found,) = layout.unpack_from(self.memory, self.at)
        self.at += layout.size
        return found

    def count(self, what: str, least: int, most: int = 2**63) -> int:
        """Read a count of things that have at least so many bytes each."""
        found = self.number(_U64, what)
        if found > most:
            raise FormatError(f"{self.path}: {what} is {found}; wanted at most {most}")
        if found * least > self.left:
            raise FormatError(
                f"{self.path}: {what} is {found}, which would take {found * least} bytes or more; "
                f"{self.left} are left: it is cut or damaged"
            )
        return found

    def text(self, what: str, most: int | None = None) -> str:
        size = self.count(f"the length of {what}", 1)
        if most is not None and size > most:
            raise FormatError(f"{self.path}: {what} has {size} bytes; wanted at most {most}")
        found = _decode(self.memory[self.at : self.at + size], f"{self.path}: {what}")
        self.at += size
        return found

    def fields(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for index in range(self.count("the number of fields", _LEAST_FIELD, _MOST_FIELDS)):
            key = self.text(f"the key of field {index}", _MAX_KEY)
            if key in found:
                raise FormatError(f"{self.path}: has the key {key[:80]!r} twice; wanted each once")
            found[key] = self.value(key[:80], self.number(_U32, f"the type of {key[:80]!r}"))
        return found

    def value(self, key: str, kind: int) -> Any:
        if kind in _NUMBERS:
            found = self.number(kind, repr(key))
            if kind == _BOOL and found > 1:
                raise FormatError(f"{self.path}: {key!r} is a boolean of {found}; wanted 0 or 1")
            return bool(found) if kind == _BOOL else found
        if kind == _STRING:
            return self.text(repr(key))
        if kind == _ARRAY:
            return self.array(key, self.number(_U32, f"the type of the elements of {key!r}"))
        raise FormatError(f"{self.path}: {key!r} is of type {kind}; wanted one of 0 to 12")

    def array(self, key: str, kind: int) -> np.ndarray | Texts:
        if kind == _STRING:
            return self.texts(key, self.count(f"the length of {key!r}", 8, _MOST_TEXTS))
        if kind not in _NUMBERS:
            raise FormatError(f"{self.path}: {key!r} has elements of type {kind}; wanted numbers or text")
        dtype = np.dtype(_NUMBERS[kind])
        count = self.count(f"the length of {key!r}", dtype.itemsize)
        found = np.frombuffer(self.memory, dtype, count, self.at)
        self.at += found.nbytes
        return found

    def texts(self, key: str, count: int) -> Texts:
        spans = np.empty(count + 1, np.int64)
        at, end, unpack = self.at, len(self.memory), struct.Struct("<Q").unpack_from
        for index in range(count):
            spans[index] = at
            size = unpack(self.memory, at)[0] if at + 8 <= end else end
            at += 8 + size
            if at > end:
                raise FormatError(f"{self.path}: is cut or damaged: {key!r}[{index}] would end at byte {at} of {end}")
        spans[count] = self.at = at
        return Texts(f"{self.path}: {key!r}", self.memory, spans)

    def tensors(self, count: int, alignment: int, size: int) -> Iterator[Tensor]:
        if count > _MOST_TENSORS or count * _LEAST_TENSOR > self.left:
            raise FormatError(
                f"{self.path}: says that it holds {count} tensors, whose entries would take {count * _LEAST_TENSOR} "
                f"bytes or more; {self.left} are left: it is cut or damaged"
            )
        entries = [self.entry(index) for index in range(count)]
        start, at, seen = -(-self.at // alignment) * alignment, 0, set[str]()
        for name, shape, kind, offset in entries:
            if name in seen:
                raise FormatError(f"{self.path}: holds tensor {name!r} twice; wanted each name once")
            seen.add(name)
            if offset != at:
                raise FormatError(f"{self.path}: {name} lies at offset {offset}; wanted {at}, after the one before it")
            end = at + kind.nbytes(shape)
            if start + end > size:
                raise FormatError(
                    f"{self.path}: is cut: {name}, {kind.name} {list(shape)}, ends at byte {start + end} of {size}"
                )
            yield Tensor(name, shape, kind, start + at)
            at = -(-end // alignment) * alignment

    def entry(self, index: int) -> tuple[str, tuple[int, ...], TensorType, int]:
        name = self.text(f"the name of tensor {index}", _MAX_NAME)
        if not name:
            raise FormatError(f"{self.path}: tensor {index} has no name")
        axes = self.number(_U32, f"the number of axes of {name}")
        if axes > _MAX_AXES:
            raise FormatError(f"{self.path}: {name} has {axes} axes; wanted at most {_MAX_AXES}")
        shape = tuple(self.number(_U64, f"the shape of {name}") for _ in range(axes))[::-1]
        product = 1
        for length in shape:
            product *= max(length, 1)
        if product >= _MAX_ELEMENTS or any(length >= 2**31 for length in shape):
            raise FormatError(f"{self.path}: {name} has shape {list(shape)}, which is too large for any memory")
        number = self.number(_U32, f"the type of {name}")
        if number not in TYPES:
            raise FormatError(f"{self.path}: {name} is of type {number}, which is not known; known are 0 to 39")
        kind = TYPES[number]
        if kind.block > 1 and (not shape or shape[-1] % kind.block):
            raise FormatError(
                f"{self.path}: {name} is {kind.name} of shape {list(shape)}; its last axis must be a multiple of "
                f"{kind.block}"
            )
        return name, shape, kind, self.number(_U64, f"the offset of {name}")


def _decode(data: memoryview, where: str) -> str:
    try:
        return bytes(data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{where} is no UTF-8: {error.reason}") from None
