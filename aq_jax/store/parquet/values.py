"""Find the values of an uncompressed Parquet column in the file.

pyarrow copies a whole column chunk to give one of its values. Here only page headers are read, and the four bytes
before each value, so that a part of a value can be read alone. What this module does not know is left to pyarrow.

    page header (Thrift, see `wire`) | definition levels: their length (4 bytes), runs of them | values
    value                               its length (4 bytes), its bytes

There is one definition level a value, 0 for a null and 1 for all else, and none at all in a column that is required.
"""

from __future__ import annotations

import numpy as np

from aq_jax.store.parquet.wire import DATA_PAGE, PLAIN_ENCODING, RUN_ENCODING, Chunk, read_pages


def plain_values(file: memoryview, chunk: Chunk, optional: bool) -> list[np.ndarray] | None:
    """Find the values of a column chunk of byte arrays, as views of the mapped file.

    Args:
        file: The bytes of the file.
        chunk: The chunk of one column without lists.
        optional: Whether the column may have nulls.

    Returns:
        A view for each value; None if the chunk is compressed, holds nulls, dictionaries, or pages of another version,
        or cannot be determined, so that the caller must decode it.
    """
    if not chunk.plain or not 0 < chunk.start <= chunk.start + chunk.stored <= len(file):
        return None
    views = np.frombuffer(file, np.uint8)
    values: list[np.ndarray] = []
    try:
        for page in read_pages(file, chunk):
            if page.kind != DATA_PAGE or page.encoding != PLAIN_ENCODING or page.unpacked != page.end - page.start:
                return None
            if optional and page.levels != RUN_ENCODING:
                return None
            found = _page_values(views[page.start : page.end], page.values, optional)
            if found is None:
                return None
            values += found
            if len(values) >= chunk.values:
                break
    except ValueError:
        return None
    return values if len(values) == chunk.values else None


def _page_values(page: np.ndarray, count: int, optional: bool) -> list[np.ndarray] | None:
    """Find the values of one page, which fill it to its last byte; None if they do not."""
    if 4 * count > page.size:
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
    """Tell whether definition levels of one bit say that none of `count` values is null.

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
