"""Decode trellis codes in JAX: from the arrays of a QTensor to levels and values. Only integers are computed with."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8, Int32, UInt8

from aq_jax.codes.bits_jax import multiples
from aq_jax.codes.runs import run_of
from aq_jax.codes.trellis import HASHES, STATE_BITS, TILE_ROWS, Trellis

_MASK = (1 << STATE_BITS) - 1


def state_levels(states: Int32[Array, "*shape"], row: int) -> Int32[Array, "*shape"]:
    """Compute the levels of states, for one of the rows of a step.

    >>> import jax.numpy as jnp
    >>> state_levels(jnp.arange(4), 0).tolist()
    [9, -11, 33, -51]
    """
    factor, summand = HASHES[row]
    mixed = states.astype(jnp.uint32) * np.uint32(factor) + np.uint32(summand)
    pairs = (mixed & np.uint32(0xFF00FF)) + (mixed >> np.uint32(8) & np.uint32(0xFF00FF))
    total = (pairs + (pairs >> np.uint32(16))) & np.uint32(0xFFFF)
    return (total >> np.uint32(2)).astype(jnp.int32) - 127


def levels(code: Trellis, q: Any) -> Int8[Array, "*lead rows length"]:
    """See `Code.levels`."""
    rows, columns = q.rows, q.length
    lead, whole = q.codes.shape[:-1], rows // TILE_ROWS
    size = code.tile_bytes(TILE_ROWS, columns)
    tiles = q.codes[..., : whole * size].reshape(*lead, whole, size)
    parts = [_tile_levels(code, tiles, TILE_ROWS, columns).reshape(*lead, whole * TILE_ROWS, columns)] if whole else []
    if rows % TILE_ROWS:
        parts.append(_tile_levels(code, q.codes[..., whole * size :], rows % TILE_ROWS, columns))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-2)


def _tile_levels(
    code: Trellis, stream: UInt8[Array, "*lead bytes"], rows: int, columns: int
) -> Int8[Array, "*lead rows columns"]:
    lead, steps = stream.shape[:-1], rows * columns // code.step_rows
    states = _states(stream, code.step_bits, steps)
    each = [state_levels(states, row).astype(jnp.int8) for row in range(code.step_rows)]
    return jnp.stack(each, axis=-1).reshape(*lead, columns, rows).swapaxes(-1, -2)


def _states(stream: UInt8[Array, "*lead bytes"], bits: int, steps: int) -> Int32[Array, "*lead steps"]:
    """Find the states of all steps of tiles; each stream is a ring."""
    run, length = run_of(bits)
    runs, (whole, spare) = -(-steps // run), divmod(steps * bits, 8)
    octets = stream.astype(jnp.int32)
    first = octets[..., :1] | octets[..., 1:2] << 8  # what follows the end
    last = octets[..., whole:] & ((1 << spare) - 1) if spare else 0
    ring = [octets[..., :whole], *((last | first << spare) >> shift & 0xFF for shift in (0, 8))]
    octets = jnp.concatenate(ring, axis=-1)
    octets = jnp.pad(octets, [(0, 0)] * (octets.ndim - 1) + [(0, runs * length - whole)])
    triples = octets[..., :-2] | octets[..., 1:-1] << 8 | octets[..., 2:] << 16
    triples = triples.reshape(*stream.shape[:-1], runs, length)
    found = [triples[..., bits * i // 8] >> bits * i % 8 & _MASK for i in range(run)]
    return jnp.stack(found, axis=-1).reshape(*stream.shape[:-1], runs * run)[..., :steps]


def take(
    code: Trellis, table: Any, ids: Int[Array, "*batch"], inside: Bool[Array, "*batch"]
) -> Float[Array, "*batch width"]:
    """See `Code.take`. Each state is found by itself: of a tile only the bytes of its row's states are read.

    Raises:
        ValueError: for a table whose bytes cannot be counted in 32 bits.
    """
    rows, columns, bits = table.rows, table.length, code.step_bits
    if max(table.codes.size + 2, TILE_ROWS * columns * bits) > np.iinfo(np.int32).max:
        raise ValueError(f"a table of {table.codes.size} bytes of {code.name} cannot be indexed in 32 bits; cut it")
    ids = jnp.minimum(ids, rows - 1).astype(jnp.int32)[..., None]
    tile, row = ids // TILE_ROWS, ids % TILE_ROWS
    high = jnp.minimum(rows - tile * TILE_ROWS, TILE_ROWS) // code.step_rows  # steps of a column
    bit = (multiples(1, columns, ids.ndim) * high + row // code.step_rows) * bits
    left = jnp.minimum(high * columns * bits - bit, STATE_BITS)  # bits before the end of the ring
    start = tile * code.tile_bytes(TILE_ROWS, columns)
    octets = jnp.take(table.codes, jnp.stack([start + bit // 8 + i for i in range(3)], axis=-1), mode="clip")
    first = jnp.take(table.codes, jnp.stack([start, start + 1], axis=-1), mode="clip").astype(jnp.int32)
    states = _join(octets.astype(jnp.int32)) >> bit % 8 & (1 << left) - 1 | _join(first) << left
    found = state_levels(states & _MASK, 0)
    for other in range(1, code.step_rows):
        found = jnp.where(row % code.step_rows == other, state_levels(states & _MASK, other), found)
    scale = jnp.take(table.scale, ids[..., 0], axis=0)
    return jnp.where(inside[..., None], found.astype(jnp.float32) * scale, jnp.nan)


def _join(octets: Int32[Array, "*shape bytes"]) -> Int32[Array, "*shape"]:
    return sum((octets[..., i] << 8 * i for i in range(1, octets.shape[-1])), octets[..., 0])
