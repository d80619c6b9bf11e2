"""The bit stream of `codes.bits` in JAX, along the last axis.

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

from aq_jax.codes.runs import fills_bytes, run_of


def pack(codes: Shaped[Array, "*lead length"], bits: int) -> Shaped[Array, "*lead bytes"]:
    """Pack signed codes into the format's bytes, each row on its own.

    Args:
        codes: Codes in [-2^(bits-1), 2^(bits-1) - 1], of an integer or a float dtype; floats are rounded to the nearest
            integer, ties to even.
        bits: The bits of a code, 2 to 8. Eight-bit codes are int8 as they are.

    Raises:
        ValueError: if a row is not a whole number of bytes.

    >>> import jax.numpy as jnp
    >>> [hex(b) for b in pack(jnp.array([-2, -1, 0, 1]), 2)]
    ['0xe4']
    """
    if bits == 8:  # without the mask, a program for GPUs gave -1 for each code (jaxlib 0.11.2, H100)
        return ((_integers(codes, 128) & 0xFF) - 128).astype(jnp.int8)
    *lead, length = codes.shape
    if not fills_bytes(length, bits):
        raise ValueError(f"{length} codes of {bits} bits are not a whole number of bytes")
    run, words, octets = _run(bits)
    unsigned = _integers(codes, 2 ** (bits - 1))
    if octets > 1:  # else what stands above a code, a multiple of 256, leaves the byte alone
        unsigned = unsigned & (2**bits - 1)
    shifts = multiples(bits, run // words, len(lead) + 3)
    parts = jnp.sum(unsigned.reshape(*lead, length // run, words, run // words) << shifts, axis=-1, dtype=jnp.int32)
    if words == 1:
        stream = parts >> multiples(8, octets, len(lead) + 2)
    else:  # the second word follows the first within a byte
        stream = jnp.stack([_octet(parts, k, bits * run // words) for k in range(octets)], axis=-1)
    return (stream & 0xFF).astype(jnp.uint8).reshape(*lead, length * bits // 8)


def _octet(words: Int32[Array, "*lead 2"], k: int, width: int) -> Int32[Array, "*lead"]:
    """Take byte k of two words of `width` bits; the bits above it are not cleared."""
    first, second = words[..., 0], words[..., 1]
    if 8 * k + 8 <= width:
        return first >> (8 * k)
    if 8 * k >= width:
        return second >> (8 * k - width)
    return first >> (8 * k) | second << (width - 8 * k)


def _run(bits: int) -> tuple[int, int, int]:
    """Return the codes of a run, the words of up to 32 bits that they are assembled in, and the bytes.

    >>> _run(3), _run(5), _run(2)
    ((8, 1, 3), (8, 2, 5), (4, 1, 1))
    """
    run, octets = run_of(bits)
    return run, 1 if octets <= 4 else 2, octets


def _integers(codes: Shaped[Array, "*shape"], offset: int) -> Int32[Array, "*shape"]:
    """Add an offset to codes, in the low bits of integers; for float codes, the high bits hold a constant.

    Adding a small number to 1.5 * 2^23 rounds it to the nearest integer, in the low bits of the sum. A conversion must
    handle NaN and values out of range, which makes the loop a third slower in the cache.
    """
    if not jnp.issubdtype(codes.dtype, jnp.floating):
        return codes.astype(jnp.int32) + offset
    return lax.bitcast_convert_type(codes.astype(jnp.float32) + np.float32(1.5 * 2**23 + offset), jnp.int32)


def unpack(data: Shaped[Array, "*lead bytes"], bits: int) -> Int8[Array, "*lead length"]:
    """Undo `pack`: unpack every code that the bytes hold.

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
    """Unpack codes straight to float32, which dequantizing multiplies."""
    if bits == 8:
        return data.astype(jnp.float32)
    return (_unsigned(data, bits) - 2 ** (bits - 1)).astype(jnp.float32)


def _unsigned(data: Array, bits: int) -> Array:
    if bits == 8:
        return data
    *lead, length = data.shape
    run, words, octets = _run(bits)
    run, width = run // words, bits * run // words
    runs = data.reshape(*lead, length // octets, octets).astype(jnp.int32)
    shifts = multiples(bits, run, len(lead) + 2)
    parts = []
    for word in range(words):
        first, spare = divmod(width * word, 8)
        own = runs[..., first : (width * (word + 1) - 1) // 8 + 1]
        own = own << multiples(8, own.shape[-1], len(lead) + 2)
        whole = jnp.sum(own, axis=-1, dtype=jnp.int32) if octets > 1 else own[..., 0]
        parts.append((whole[..., None] >> (shifts + spare)) & (2**bits - 1))
    codes = parts[0] if words == 1 else jnp.concatenate(parts, axis=-1)
    return codes.reshape(*lead, length * 8 // bits)


def multiples(of: int, count: int, axes: int) -> Int32[Array, "..."]:
    """Count 0, of, 2 of, ... along the last of several axes, so that no rank promotion is needed.

    >>> multiples(3, 4, 2).tolist()
    [[0, 3, 6, 9]]
    """
    return lax.broadcasted_iota(jnp.int32, (1,) * (axes - 1) + (count,), axes - 1) * of


__all__ = ["pack", "unpack", "unpack_float"]
