"""Where the values of an uncompressed Parquet column lie in the file.

pyarrow copies a whole column chunk to give one of its values. Here only page headers are read, and the four bytes
before each value, so that a part of a value can be read alone. What this module does not know is left to pyarrow.

    page header (Thrift, see `footer`) | definition levels: their length (4 bytes), runs of them | values
    value                               its length (4 bytes), its bytes

There is one definition level a value, 0 for a null and 1 for all else, and none at all in a column that is required.
"""

from __future__ import annotations

import numpy as np

from aq_jax.store.footer import Chunk, read_page_header

_LONGEST_HEADER = 1 << 12
_DATA_PAGE, _PLAIN, _RLE = 0, 0, 3


def plain_values(file: np.ndarray, chunk: Chunk, optional: bool) -> list[np.ndarray] | None:
    """The values of a column chunk of byte arrays, as views of the mapped file.

    Args:
        file: uint8, the file's bytes.
        chunk: of one column without lists in it.
        optional: whether the column may have nulls.

    Returns:
        A view for each value; None if the chunk is compressed, holds nulls, dictionaries, or pages of another version,
        or cannot be made out, so that somebody else has to judge it.
    """
    if not isinstance(chunk.first, int) or not 0 < chunk.first <= chunk.first + chunk.stored <= file.size:
        return None
    at, end = chunk.first, chunk.first + chunk.stored
    values: list[np.ndarray] = []
    while at < end and len(values) < chunk.values:
        try:
            fields, size = read_page_header(file[at : min(end, at + _LONGEST_HEADER)].tobytes())
        except ValueError:
            return None
        # PageHeader.type is 1, uncompressed_page_size 2, compressed_page_size 3, data_page_header 5.
        # DataPageHeader.num_values is 1, encoding 2, definition_level_encoding 3.
        length, page = fields.get(3), fields.get(5)
        if fields.get(1) != _DATA_PAGE or fields.get(2) != length or not isinstance(page, dict):
            return None
        if page.get(2) != _PLAIN or (optional and page.get(3) != _RLE) or not isinstance(length, int):
            return None
        start, at = at + size, at + size + length
        found = _page_values(file[start:at], page.get(1), optional) if start <= at <= end else None
        if found is None:
            return None
        values += found
    return values if len(values) == chunk.values else None


def _page_values(page: np.ndarray, count: object, optional: bool) -> list[np.ndarray] | None:
    """The values of one page, which fill it to its last byte; None if they do not."""
    if not isinstance(count, int) or not 0 <= 4 * count <= page.size:
        return None
    at = 0
    if optional:
        if page.size < 4:
            return None
        at = 4 + _number(page, 0)
        if not _all_ones(page[4:at].tobytes() if at <= page.size else b"", count):
            return None
    ends: list[tuple[int, int]] = []
    for _ in range(count):
        start = at + 4
        if start > page.size:
            return None
        at = start + _number(page, at)
        ends.append((start, at))
    return [page[start:stop] for start, stop in ends] if at == page.size else None


def _number(page: np.ndarray, at: int) -> int:
    return int.from_bytes(page[at : at + 4].tobytes(), "little")


def _all_ones(levels: bytes, count: int) -> bool:
    """Whether definition levels of one bit say that none of `count` values is a null.

    They are runs: a number n whose lowest bit tells the kind, then one byte that is repeated n >> 1 times, or n >> 1
    bytes of eight levels each.
    """
    at = 0
    while count > 0:
        head = shift = 0
        while True:
            if at >= len(levels) or shift > 28:
                return False
            head |= (levels[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if levels[at - 1] < 128:
                break
        run, packed = head >> 1, head & 1
        body = levels[at : at + (run if packed else 1)]
        held = min(8 * run if packed else run, count)
        ones = (1 << held) - 1 if packed else 1
        if not held or int.from_bytes(body, "little") & (ones if packed else 255) != ones:
            return False
        at, count = at + len(body), count - held
    return True
