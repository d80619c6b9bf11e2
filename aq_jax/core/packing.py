"""Codes to bytes and back: the format's bit stream, along the last axis.

Code i stands in bits [b*i, b*(i+1)) of a little-endian stream, as u = q + 2^(b-1):

    2 bits   u3u3 u2u2 u1u1 u0u0                      one byte
    4 bits   u1u1u1u1 u0u0u0u0                        one byte
    3 bits   u2u2 u1u1u1 u0u0u0 | u5 u4u4u4 u3u3u3 u2 | u7u7u7 u6u6u6 u5u5    three bytes

Only shifts, masks and sums: sub-byte dtypes are not used, because their conversions inside XLA have been
wrong without an error (openxla/xla pull request 47149).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8, Int32, Shaped


def run_length(bits: int) -> int:
    """How many codes fill whole bytes: 8 three-bit codes, 4 two-bit codes, 2 four-bit codes, 1 of eight bits."""
    return {8: 1, 4: 2, 3: 8, 2: 4}[bits]


def fills_bytes(length: int, bits: int) -> bool:
    """Whether a row of this many codes is a whole number of bytes."""
    return length * bits % 8 == 0


def pack(codes: Shaped[Array, "*lead length"], bits: int) -> Shaped[Array, "*lead bytes"]:
    """Signed codes to the format's bytes, each row on its own.

    Args:
        codes: in [-2^(bits-1), 2^(bits-1) - 1], of an integer or a float dtype; floats are rounded to the nearest
            integer, ties to even.
        bits: 8, 4, 3 or 2. Eight-bit codes are int8 as they are.

    Raises:
        ValueError: if a row is no whole number of bytes.

    >>> import jax.numpy as jnp
    >>> [hex(b) for b in pack(jnp.array([-2, -1, 0, 1]), 2)]
    ['0xe4']
    """
    if bits == 8:
        return _integers(codes, 0).astype(jnp.int8)
    *lead, length = codes.shape
    if not fills_bytes(length, bits):
        raise ValueError(f"{length} codes of {bits} bits are no whole number of bytes")
    run = run_length(bits)
    unsigned = _integers(codes, 2 ** (bits - 1))
    shifts = jnp.arange(run, dtype=jnp.int32) * bits
    if bits != 3:  # what stands above the code, a multiple of 256, leaves the byte alone
        words = jnp.sum(unsigned.reshape(*lead, length // run, run) << shifts, axis=-1)
        return words.astype(jnp.uint8)
    words = jnp.sum((unsigned & 7).reshape(*lead, length // run, run) << shifts, axis=-1)
    octets = words[..., None] >> jnp.array([0, 8, 16], jnp.int32)
    return (octets & 0xFF).astype(jnp.uint8).reshape(*lead, length // 8 * 3)


def _integers(codes: Shaped[Array, "*shape"], offset: int) -> Int32[Array, "*shape"]:
    """codes + offset in the low bits of integers; above them, for float codes, stands a constant.

    A small number that is added to 1.5 * 2^23 is rounded to the nearest integer, and stands in the low bits of the
    sum. A conversion, which has to mind NaN and values out of range, makes the loop a third slower in the cache.
    """
    if not jnp.issubdtype(codes.dtype, jnp.floating):
        return codes.astype(jnp.int32) + offset
    return lax.bitcast_convert_type(codes.astype(jnp.float32) + np.float32(1.5 * 2**23 + offset), jnp.int32)


def unpack(data: Shaped[Array, "*lead bytes"], bits: int) -> Int8[Array, "*lead length"]:
    """The inverse of `pack`: every code that the bytes hold.

    >>> import jax.numpy as jnp
    >>> unpack(jnp.array([0xE4], jnp.uint8), 2).tolist()
    [-2, -1, 0, 1]
    """
    return (
        _unsigned(data, bits).astype(jnp.int8)
        if bits == 8
        else (_unsigned(data, bits) - 2 ** (bits - 1)).astype(jnp.int8)
    )


def unpack_float(data: Shaped[Array, "*lead bytes"], bits: int) -> Float[Array, "*lead length"]:
    """As `unpack`, but straight to float32, which is what a dequantize multiplies."""
    if bits == 8:
        return data.astype(jnp.float32)
    return (_unsigned(data, bits) - 2 ** (bits - 1)).astype(jnp.float32)


def _unsigned(data: Array, bits: int) -> Array:
    if bits == 8:
        return data
    *lead, length = data.shape
    if bits == 3:
        octets = data.reshape(*lead, length // 3, 3).astype(jnp.int32)
        words = jnp.sum(octets << jnp.array([0, 8, 16], jnp.int32), axis=-1)
    else:
        words = data.astype(jnp.int32)
    run = run_length(bits)
    shifts = jnp.arange(run, dtype=jnp.int32) * bits
    codes = (words[..., None] >> shifts) & (2**bits - 1)
    return codes.reshape(*lead, length * 8 // bits)


__all__ = ["fills_bytes", "pack", "run_length", "unpack", "unpack_float"]
