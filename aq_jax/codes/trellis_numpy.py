"""Decode trellis codes in NumPy: from a row of the table to values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from jaxtyping import Int8, Int32, UInt8, UInt16

from aq_jax.codes.runs import run_of
from aq_jax.codes.trellis import HASHES, STATE_BITS, TILE_ROWS, Trellis
from aq_jax.native import host

_STATES = 1 << STATE_BITS
_BLOCK = 1 << 13


@cache
def level_table(step_rows: int) -> Int8[np.ndarray, "states rows"]:
    """Tabulate the levels of each state, one for each row of a step; read-only.

    >>> level_table(1)[:4, 0].tolist()
    [9, -11, 33, -51]
    """
    table = np.stack([_hashed(*HASHES[row]) for row in range(step_rows)], axis=-1)
    table.setflags(write=False)
    return table


def _hashed(factor: int, summand: int) -> Int8[np.ndarray, "states"]:
    mixed = (np.arange(_STATES, dtype=np.uint64) * np.uint64(factor) + np.uint64(summand)) & np.uint64(0xFFFFFFFF)
    octets = mixed.astype("<u4").view(np.uint8).reshape(_STATES, 4)
    return ((octets.sum(axis=1, dtype=np.int32) >> 2) - 127).astype(np.int8)


def read(
    code: Trellis, data: UInt8[np.ndarray, "bytes"], scales: np.ndarray, shape: Sequence[int], out: np.ndarray
) -> None:
    """See `Code.read`."""
    out = out.reshape(-1, shape[-1])
    # Where all tiles but the last are whole, they lie as those of one matrix do.
    rows = shape[-2] if len(shape) > 2 and shape[-2] % TILE_ROWS else len(out)
    if host.dequantize_tiles(data, (code.step_bits, code.step_rows), scales, (len(out) // rows, rows, shape[-1]), out):
        return
    scales = scales.reshape(-1, 1)
    for own, levels in _tiles(code, data, rows, out.shape):
        np.multiply(np.ascontiguousarray(levels.T), scales[own], out=out[own], dtype=np.float32)


def row_sums(code: Trellis, data: UInt8[np.ndarray, "bytes"], shape: tuple[int, ...]) -> Int32[np.ndarray, "rows"]:
    """Sum the levels of each row of a matrix."""
    return np.concatenate([levels.sum(axis=0, dtype=np.int32) for _, levels in _tiles(code, data, shape[0], shape)])


def _tiles(
    code: Trellis, data: UInt8[np.ndarray, "bytes"], rows: int, shape: tuple[int, ...]
) -> Iterator[tuple[slice, Int8[np.ndarray, "columns tile_rows"]]]:
    """Decode tile after tile of a tensor [all rows, columns], whose matrices have so many rows each."""
    start = 0
    for matrix in range(0, shape[0], rows):
        for first in range(matrix, matrix + rows, TILE_ROWS):
            own = slice(first, min(first + TILE_ROWS, matrix + rows))
            stop = start + code.tile_bytes(own.stop - first, shape[1])
            yield own, tile_levels(code, data[start:stop], own.stop - first, shape[1])
            start = stop


def tile_levels(
    code: Trellis, stream: UInt8[np.ndarray, "bytes"], rows: int, columns: int
) -> Int8[np.ndarray, "columns rows"]:
    """Decode the levels of one tile, column by column."""
    table = level_table(code.step_rows)
    table = table[:, 0] if code.step_rows == 1 else table.view(np.int16)[:, 0]
    steps = rows * columns // code.step_rows
    levels = np.empty(steps, table.dtype)
    ring = _ring(stream, steps * code.step_bits)
    run, _ = run_of(code.step_bits)
    for start in range(0, steps, _BLOCK):
        count = min(_BLOCK, steps - start)
        states = _states(ring[start * code.step_bits // 8 :], code.step_bits, -(-count // run))
        # Every state is in the table; "clip" only spares NumPy the search for one that is not.
        table.take(states[:count], mode="clip", out=levels[start : start + count])
    return levels.view(np.int8).reshape(columns, rows)


def _ring(stream: UInt8[np.ndarray, "bytes"], bits: int) -> UInt8[np.ndarray, "longer"]:
    """Continue a tile's stream by its beginning, for the states that begin at its end; and by zeros."""
    whole, spare = divmod(bits, 8)
    first = int(stream[0]) | int(stream[1]) << 8
    last = int(stream[whole]) & ((1 << spare) - 1) if spare else 0
    return np.concatenate([stream[:whole], np.frombuffer((last | first << spare).to_bytes(16, "little"), np.uint8)])


def _states(ring: UInt8[np.ndarray, "bytes"], bits: int, runs: int) -> UInt16[np.ndarray, "steps"]:
    """Find the states of so many runs of steps, each of which begins at a byte."""
    run, length = run_of(bits)
    states = np.empty((runs, run), np.uint16)
    wide = ring[: runs * length + 3].astype(np.uint16)
    pairs = wide[:-1] | wide[1:] << 8
    for i in range(run):
        first, shift = divmod(bits * i, 8)
        state = pairs[first : first + runs * length : length] >> shift
        if shift + STATE_BITS > 16:
            state |= wide[first + 2 : first + 2 + runs * length : length] << (16 - shift)
        np.bitwise_and(state, _STATES - 1, out=states[:, i])
    return states.reshape(-1)
