"""What a file may claim of itself, and how it is said that it claims more: the same in Parquet and Arrow IPC."""

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
"""By pyarrow, and by those who read its bytes, of a damaged file."""
MAX_ROWS = 1 << 22
_FEW_ROWS, _ROW_ON_DISK = 4096, 16
"""More rows than the first number must take as many bytes of the file each as the second says."""
_SMALL, _SMALL_ROW = 16 << 20, 256
"""Bytes that a small column may take in memory: so many, and for each row so many more."""
_MAX_EXPANSION = 1024
SLACK = 1 << 20
JSON_START = b'{"aliases":'
"""How canonical metadata begins: its keys are sorted."""


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn what pyarrow raises about a damaged file into a FormatError that names the file."""
    try:
        yield
    except (AqError, FileNotFoundError, PermissionError):
        raise
    except _RAISED as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # the file is not to blame
        raise FormatError(f"{where}: damaged, or not a table of this format: {str(error)[:300]}") from error


def own_metadata(entries: Mapping[bytes, bytes], doubts: list[str]) -> bytes | None:
    """Find the table's metadata; a doubt is added if damage hides it under another key."""
    for key, value in entries.items():
        if key != METADATA_KEY and value.startswith(JSON_START):
            doubts.append(f"the key of its aq_jax metadata is damaged: {key[:40]!r}")
    return entries.get(METADATA_KEY)


def small_limit(rows: int) -> int:
    """Bytes that a small column of so many rows may take in memory."""
    return _SMALL + _SMALL_ROW * rows


def heavy_limits(needs: Mapping[str, int], rows: int) -> dict[str, int]:
    """Bytes that a group's large columns may take, given those that the shapes of its rows ask for."""
    return {name: need + need // 8 + 64 * rows + SLACK for name, need in needs.items()}


def check_expansion(where: str, column: str, need: int, stored: int) -> None:
    """Refuse a column that is far too small for what the shapes of its rows claim."""
    # Honest compression stays far below; without this a shape of 2^62 elements would look fine until it is read.
    if need > _MAX_EXPANSION * stored + (256 << 20):
        raise FormatError(f"{where}: column {column} holds {stored} bytes, the shapes of its rows need {need}")


def check_rows(where: str, rows: int, size: int) -> None:
    """Refuse more rows than a file of that size can hold."""
    # Each row becomes an object: a few bytes that say "the same again" must not make millions of them.
    most = min(MAX_ROWS, _FEW_ROWS + size // _ROW_ON_DISK)
    if not 0 <= rows <= most:
        raise FormatError(f"{where}: claims {rows} rows, a file of {size} bytes holds at most {most}")


def check_widths(where: str, schema: pa.Schema, rows: int, size: int) -> None:
    """Refuse values of one width that would take more than the file: they take it even where they are null."""
    for field in schema:
        if pa.types.is_fixed_size_binary(field.type) and field.type.byte_width * rows > size + SLACK:
            raise FormatError(f"{where}: column {field.name} claims {rows} values of {field.type.byte_width} bytes")
