"""The bit stream of codes, in NumPy: code i takes bits [b*i, b*(i+1)), stored as q + 2^(b-1), lowest bit first.

    3 bits, byte 0          byte 1                    byte 2
    v0 v0 v0 v1 v1 v1 v2 v2 | v2 v3 v3 v3 v4 v4 v4 v5 | v5 v5 v6 v6 v6 v7 v7 v7

Streams are taken by runs: the fewest codes that fill whole bytes. Eight-bit codes are signed bytes as they are.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from aq_jax.codes.runs import overlaps, run_of
from aq_jax.errors import FormatError


def unpack_codes(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unpack the first `count` codes of a bit stream to int8; spare bits are ignored.

    A table lookup gives several codes at a time: those of a byte, or of up to 14 bits.

    >>> unpack_codes(np.array([0b11100100], np.uint8), 2, 4)
    array([-2, -1,  0,  1], dtype=int8)
    """
    data = np.ascontiguousarray(data)
    if bits == 8:
        return data.view(np.int8)[:count]
    width, (_, length) = _word(bits), run_of(bits)
    if width != 8:
        missing = -data.size % length
        octets = (np.concatenate([data, np.zeros(missing, np.uint8)]) if missing else data).reshape(-1, length)
        words = np.empty((octets.shape[0], length * 8 // width), np.uint16)
        for i in range(words.shape[1]):
            first, shift = divmod(width * i, 8)
            word = octets[:, first].astype(np.uint32 if shift + width > 16 else np.uint16) >> shift
            for octet in range(first + 1, (width * (i + 1) - 1) // 8 + 1):
                word |= octets[:, octet].astype(word.dtype) << (8 * (octet - first) - shift)
            words[:, i] = word & ((1 << width) - 1)
        data = words
    # Every index is in the table; "clip" only spares NumPy the search for one that is not.
    return _table(bits).take(data.reshape(-1), mode="clip").view(np.int8)[:count]


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack int8 codes into a bit stream of uint8; spare bits are zero.

    >>> pack_codes(np.array([-2, -1, 0, 1], np.int8), 2)
    array([228], dtype=uint8)

    Raises:
        FormatError: if a code does not fit in `bits` bits.
    """
    half = 1 << (bits - 1)
    codes = np.ascontiguousarray(codes, np.int8).reshape(-1)
    if codes.size and (codes.min() < -half or codes.max() >= half):
        raise FormatError(f"codes range from {codes.min()} to {codes.max()}; {bits} bits hold {-half} to {half - 1}")
    if bits == 8:
        return codes.view(np.uint8)
    run, length = run_of(bits)
    values = np.zeros(-(-codes.size // run) * run, np.uint8)
    np.add(codes, np.int8(half), out=values[: codes.size].view(np.int8))
    values = values.reshape(-1, run)
    stream = np.zeros((values.shape[0], length), np.uint8)
    for octet, i, shift in overlaps(bits):
        stream[:, octet] |= values[:, i] << np.uint8(shift) if shift >= 0 else values[:, i] >> np.uint8(-shift)
    return stream.reshape(-1)[: -(-codes.size * bits // 8)]


def _word(bits: int) -> int:
    """Count the bits of one lookup: whole codes, and a whole number of lookups a run."""
    return {2: 8, 3: 12, 4: 8}.get(bits, 2 * bits)


@cache
def _table(bits: int) -> np.ndarray:
    """Tabulate the codes of each word, packed into one integer."""
    width = _word(bits)
    words = np.arange(1 << width, dtype=np.int64)[:, None]
    values = (words >> (bits * np.arange(width // bits))) & ((1 << bits) - 1)
    codes = (values - (1 << (bits - 1))).astype(np.int8)
    return codes.view({2: np.uint16, 4: np.uint32}[width // bits])[:, 0]
