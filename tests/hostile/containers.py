"""The structure of small Parquet and Arrow IPC files: where things begin and end, and how to change them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa
from hostile import thrift

# Numbers of the fields that are used, in Parquet's thrift: FileMetaData, RowGroup, ColumnChunk, ColumnMetaData.
GROUPS, COLUMNS, META, PATH, CODEC = 4, 1, 3, 3, 4
UNPACKED, STORED, DATA_PAGE, DICTIONARY_PAGE = 6, 7, 9, 11
PAGE_UNPACKED, PAGE_STORED = 2, 3


class Parquet:
    """A Parquet file, taken apart."""

    def __init__(self, content: bytes) -> None:
        length = struct.unpack("<I", content[-8:-4])[0]
        self.content = content
        self.footer_start = len(content) - 8 - length
        self.footer, _ = thrift.decode(content, self.footer_start)

    def chunks(self) -> list[thrift.Struct]:
        """ColumnMetaData of every column chunk, in order."""
        return [column[META] for group in self.footer[GROUPS] for column in group[COLUMNS]]

    def chunk(self, name: str) -> thrift.Struct:
        return next(chunk for chunk in self.chunks() if chunk[PATH][0] == name.encode())

    def pages(self, chunk: thrift.Struct) -> list[tuple[int, int, int, thrift.Struct]]:
        """(start, start of the body, end, header) of each page of a chunk."""
        at = min(chunk[number] for number in (DATA_PAGE, DICTIONARY_PAGE) if number in chunk)
        end, found = at + chunk[STORED], []
        while at < end:
            header, body = thrift.decode(self.content, at)
            found.append((at, body, body + header[PAGE_STORED], header))
            at = found[-1][2]
        return found

    def boundaries(self) -> list[int]:
        """Where magic bytes, page headers, page bodies, column chunks and the footer begin and end."""
        found = {0, 4, self.footer_start, len(self.content) - 8, len(self.content) - 4}
        for chunk in self.chunks():
            for start, body, end, _ in self.pages(chunk):
                found |= {start, body, end}
        return sorted(found)

    def with_footer(self, footer: bytes | None = None) -> bytes:
        """The file with the footer as it has been changed, or with another."""
        text = thrift.encode(self.footer) if footer is None else footer
        return self.content[: self.footer_start] + text + struct.pack("<I", len(text)) + b"PAR1"

    def with_page(self, chunk: thrift.Struct, page: int, change: Callable[[thrift.Struct], None]) -> bytes:
        """The file with one page header changed, and every offset in the footer set right."""
        start, body, _, header = self.pages(chunk)[page]
        change(header)
        text = thrift.encode(header)
        moved = Parquet(self.content)
        target = moved.chunks()[self.chunks().index(chunk)]
        delta = len(text) - (body - start)
        target[STORED] += delta
        target[UNPACKED] += delta
        for other in moved.chunks():
            for number in (DATA_PAGE, DICTIONARY_PAGE):
                if number in other and other[number] > start:
                    other[number] += delta
        moved.content = self.content[:start] + text + self.content[body:]
        moved.footer_start += delta
        return moved.with_footer()


@dataclass(frozen=True)
class Message:
    """Of an Arrow IPC file: where it begins, its metadata, its body, and where it ends."""

    start: int
    metadata: int
    body: int
    end: int


class Ipc:
    """An Arrow IPC file, taken apart."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        length = struct.unpack("<i", content[-10:-6])[0]
        self.footer_start = len(content) - 10 - length
        self.messages: list[Message] = []
        at = 8
        while at < self.footer_start:
            marker, size = struct.unpack("<Ii", content[at : at + 8])
            if marker != 0xFFFFFFFF or size == 0:
                break
            body = pa.ipc.read_message(pa.BufferReader(content[at:])).body
            stop = at + 8 + size
            self.messages.append(Message(at, at + 8, stop, stop + (body.size if body is not None else 0)))
            at = self.messages[-1].end

    def buffers(self) -> Iterator[tuple[Message, int, int]]:
        """(its message, start, end) of every buffer of the record batches."""
        memory = pa.py_buffer(self.content)
        with pa.ipc.open_file(pa.BufferReader(memory)) as file:
            batches = [file.get_batch(index) for index in range(file.num_record_batches)]
        for batch in batches:
            for column in batch.columns:
                for buffer in column.buffers():
                    start = buffer.address - memory.address if buffer is not None else -1
                    if buffer is not None and 0 <= start < len(self.content):
                        message = next(m for m in self.messages if m.body <= start <= m.end)
                        yield message, start, start + buffer.size

    def boundaries(self) -> list[int]:
        """Where magic bytes, messages, their metadata, bodies, body buffers and the footer begin and end."""
        found = {0, 6, 8, self.footer_start, len(self.content) - 10, len(self.content) - 6}
        for message in self.messages:
            found |= {message.start, message.metadata, message.body, message.end}
        for _, start, stop in self.buffers():
            found |= {start, stop}
        return sorted(found)

    def blocks(self) -> list[int]:
        """Where the footer's entries of the messages with bodies are: offset, metadata length, body length."""
        places = []
        for message in self.messages[1:]:
            entry = struct.pack("<qi4xq", message.start, message.body - message.start, message.end - message.body)
            places.append(self.content.index(entry, self.footer_start))
        return places

    def entry(self, message: Message, start: int, stop: int) -> int | None:
        """Where the message's metadata says (offset, length) of a buffer."""
        place = self.content.find(
            struct.pack("<qq", start - message.body, stop - start), message.metadata, message.body
        )
        return None if place < 0 else place


def patched(content: bytes, at: int, data: bytes) -> bytes:
    """Other bytes in the place of some."""
    return content[:at] + data + content[at + len(data) :]
