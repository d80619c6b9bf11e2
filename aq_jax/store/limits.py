"""Limits on what a file may claim, and the errors for files that claim more, for Parquet and Arrow IPC alike."""

from __future__ import annotations

import errno
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pyarrow as pa

from aq_jax.errors import AqError, FormatError
from aq_jax.store.schema import METADATA_KEY

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_RAISED = (
    pa.ArrowException, OSError, ValueError, TypeError, OverflowError, struct.error, MemoryError, LookupError,
)  # fmt: skip
"""The errors that pyarrow, and the readers of its bytes, raise for a damaged file."""
MAX_ROWS = 1 << 22
_FEW_ROWS, _ROW_ON_DISK = 4096, 16
"""A file of more rows than the first number must have the second number of bytes for each."""
_SMALL, _SMALL_ROW = 16 << 20, 256
"""The most bytes of a small column in memory: a fixed number, and a number for each row."""
_MAX_EXPANSION = 1024
SLACK = 1 << 20
JSON_START = b'{"aliases":'
"""The beginning of canonical metadata, whose keys are sorted."""


@contextmanager
def translate_errors(where: str) -> Iterator[None]:
    """Turn errors of pyarrow about a damaged file into a FormatError that names the file."""
    try:
        yield
    except (AqError, FileNotFoundError, PermissionError):
        raise
    except _RAISED as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # the file is not to blame
        raise FormatError(f"{where}: damaged, or not a table of this format: {str(error)[:300]}") from error


def own_metadata(entries: Mapping[bytes, bytes], doubts: list[str]) -> bytes | None:
    """Find the table's metadata; if damage hides it under another key, add a doubt."""
    for key, value in entries.items():
        if key != METADATA_KEY and value.startswith(JSON_START):
            doubts.append(f"the key of its aq_jax metadata is damaged: {key[:40]!r}")
    return entries.get(METADATA_KEY)


def small_limit(rows: int) -> int:
    """Return the most bytes of a small column in memory."""
    return _SMALL + _SMALL_ROW * rows


def large_limits(needs: Mapping[str, int], rows: int) -> dict[str, int]:
    """Return the most bytes of a group's large columns, given those that the shapes of its rows require."""
    return {name: need + need // 8 + 64 * rows + SLACK for name, need in needs.items()}


def check_expansion(where: str, column: str, need: int, stored: int) -> None:
    """Refuse a column that is far too small for what the shapes of its rows claim."""
    # Honest compression stays far below; without this a shape of 2^62 elements would look fine until it is read.
    if need > _MAX_EXPANSION * stored + (256 << 20):
        raise FormatError(f"{where}: column {column} holds {stored} bytes, but the shapes of its rows need {need}")


def check_rows(where: str, rows: int, size: int) -> None:
    """Refuse more rows than a file of that size can hold."""
    # Each row becomes an object: a few bytes of run-length encoding must not make millions of them.
    most = min(MAX_ROWS, _FEW_ROWS + size // _ROW_ON_DISK)
    if not 0 <= rows <= most:
        raise FormatError(f"{where}: claims {rows} rows, but a file of {size} bytes holds at most {most}")


def check_widths(where: str, schema: pa.Schema, rows: int, size: int) -> None:
    """Refuse fixed-width values that would take more than the file: nulls take their width, too."""
    for field in schema:
        if pa.types.is_fixed_size_binary(field.type) and field.type.byte_width * rows > size + SLACK:
            raise FormatError(f"{where}: column {field.name} claims {rows} values of {field.type.byte_width} bytes")
