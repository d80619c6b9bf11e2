"""Unpack codes from words of 32 bits: to signed ones, q = u - 2^(b-1)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int8, Integer

from aq_jax.codes.bits import unpack_codes
from aq_jax.codes.runs import run_of

_WORD = 32


def dense_words(count: int, bits: int) -> int:
    """Count the words of codes that may cross from one into the next.

    >>> dense_words(32, 3), dense_words(10, 4)
    (3, 2)
    """
    return -(-count * bits // _WORD)


def whole_words(count: int, bits: int) -> int:
    """Count the words of codes that do not cross: each word ends with spare bits, unless its codes fill it.

    >>> whole_words(32, 3)
    4
    """
    return -(-count // (_WORD // bits))


def unpack_rows(words: Integer[np.ndarray, "rows words"], bits: int, count: int) -> Int8[np.ndarray, "rows count"]:
    """Unpack the first `count` codes of each row, which lie one after the other from the lowest bit on.

    >>> unpack_rows(np.array([[0x76543210]], np.uint32), 4, 8)
    array([[-8, -7, -6, -5, -4, -3, -2, -1]], dtype=int8)
    """
    rows, (run, length) = words.shape[0], run_of(bits)
    data = np.ascontiguousarray(words).view(np.uint8).reshape(rows, words.shape[1] * words.itemsize)
    if bits == 8:
        return (data[:, :count] ^ np.uint8(0x80)).view(np.int8)
    runs = -(-count // run)
    missing = max(0, runs * length - data.shape[1])
    data = np.pad(data, ((0, 0), (0, missing))) if missing else data[:, : runs * length]
    return unpack_codes(data, bits, rows * runs * run).reshape(rows, runs * run)[:, :count]


def unpack_whole_words(
    words: Integer[np.ndarray, "rows words"], bits: int, count: int
) -> Int8[np.ndarray, "rows count"]:
    """Unpack rows of words whose codes do not cross from one into the next.

    >>> unpack_whole_words(np.array([[0b010001, 0b111]], np.uint32), 3, 11)[0, [0, 1, 2, 10]]
    array([-3, -2, -4,  3], dtype=int8)
    """
    each = _WORD // bits
    found = np.empty((*words.shape, each), np.int8)
    for i in range(each):
        found[..., i] = (words.view(np.uint32) >> np.uint32(bits * i)) & np.uint32((1 << bits) - 1)
    found -= np.int8(1 << (bits - 1)) if bits < 8 else np.int8(-128)
    return found.reshape(words.shape[0], -1)[:, :count]
