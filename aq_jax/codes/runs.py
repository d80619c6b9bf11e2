"""The arithmetic of codes in whole bytes; it imports no array library."""

from __future__ import annotations

from math import gcd


def run_of(bits: int) -> tuple[int, int]:
    """Count the codes of a run, which are the fewest that fill whole bytes, and its bytes.

    >>> run_of(3), run_of(4), run_of(8)
    ((8, 3), (2, 1), (1, 1))
    """
    return 8 // gcd(8, bits), bits // gcd(8, bits)


def fills_bytes(length: int, bits: int) -> bool:
    """Tell whether a row of this many codes is a whole number of bytes."""
    return length * bits % 8 == 0


def overlaps(bits: int) -> list[tuple[int, int, int]]:
    """List which codes of a run have bits in which bytes: (byte, code, left shift of the code).

    >>> overlaps(3)
    [(0, 0, 0), (0, 1, 3), (0, 2, 6), (1, 2, -2), (1, 3, 1), (1, 4, 4), (1, 5, 7), (2, 5, -1), (2, 6, 2), (2, 7, 5)]
    """
    run, length = run_of(bits)
    return [(k, i, bits * i - 8 * k) for k in range(length) for i in range(run) if -bits < bits * i - 8 * k < 8]
