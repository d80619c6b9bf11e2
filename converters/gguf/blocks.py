"""Turn ggml's blocks into the codes and grids of a table's rows: bits move, and nothing is rounded.

Each function takes blocks [count, bytes] of one type, and gives the unsigned codes of each block in the bit stream's
order, uint8 [count, elements], or the stream itself, and the grids. Source: github.com/ggml-org/llama.cpp,
ggml-common.h and gguf-py/gguf/quants.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

_CHUNK = 1 << 20
"""The bytes of blocks that are turned at once: they and what is made of them stay in the caches."""


class Parts(NamedTuple):
    """The parts of a row: the bytes of its codes, scales, and zero points or minimums (empty if there are none)."""

    data: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray


def unpack(blocks: np.ndarray, name: str) -> Parts:
    """Turn all blocks of a tensor [count, bytes], of a type by its name.

    >>> block = np.frombuffer(bytes.fromhex("003c") + bytes(range(16)), np.uint8)[None]
    >>> unpack(block, "Q4_0").scales, unpack(block, "Q4_0").data[:4].tobytes().hex()
    (array([1.], dtype=float16), '10325476')
    """
    turn, count = _TURNS[name], len(blocks)
    step = max(_CHUNK // blocks.shape[1], 1)
    whole: list[np.ndarray] = []
    for start in range(0, max(count, 1), step):
        parts = turn(blocks[start : start + step])
        if not whole:
            whole = [np.empty((count, part.size // max(min(count, step), 1)), part.dtype) for part in parts]
        for out, part in zip(whole, parts, strict=True):
            out[start : start + step] = part.reshape(len(out[start : start + step]), -1)
    return Parts(*(out.reshape(-1) for out in whole))


_NOTHING = np.empty(0, np.float16)


def _halves(octets: np.ndarray) -> np.ndarray:
    """Copy pairs of bytes as float16."""
    return np.ascontiguousarray(octets).view(np.float16)


def _nibbles(octets: np.ndarray) -> np.ndarray:
    """Turn runs of bytes [..., n], low nibbles first, then the high ones, into a stream [..., 2, n / 2]."""
    words = np.ascontiguousarray(octets).view(np.uint16)
    out = np.empty((*words.shape[:-1], 2, words.shape[-1]), np.uint8)
    low = words & 0x0F0F
    out[..., 0, :] = low | low >> 4
    high = words >> 4 & 0x0F0F
    out[..., 1, :] = high | high >> 4
    return out


def _split(octets: np.ndarray) -> np.ndarray:
    """Split runs of bytes [..., n] into codes [..., 2, n], the low nibbles first."""
    out = np.empty((*octets.shape[:-1], 2, octets.shape[-1]), np.uint8)
    np.bitwise_and(octets, 15, out=out[..., 0, :])
    np.right_shift(octets, 4, out=out[..., 1, :])
    return out


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack unsigned codes, eight at a time: neighbours move together in lanes of 16, 32 and then 64 bits."""
    words = codes.reshape(-1, 8).view(np.uint64)
    for lane in (8, 16, 32):
        width = bits * lane // 8
        low = np.uint64(sum((2**width - 1) << at for at in range(0, 64, 2 * lane)))
        words = words & low | words >> np.uint64(lane - width) & low << np.uint64(width)
    return words.view(np.uint8).reshape(-1, 8)[:, :bits]


def _q4_0(blocks: np.ndarray) -> Parts:
    return Parts(_nibbles(blocks[:, 2:]), _halves(blocks[:, :2]), _NOTHING)


def _q4_1(blocks: np.ndarray) -> Parts:
    return Parts(_nibbles(blocks[:, 4:]), _halves(blocks[:, :2]), _halves(blocks[:, 2:4]))


def _fifth_bits(codes: np.ndarray, octets: np.ndarray) -> np.ndarray:
    """Add the fifth bits of 32 codes, one after the other in four bytes."""
    codes |= np.unpackbits(octets, axis=-1, bitorder="little").reshape(codes.shape) << 4
    return codes


def _q5_0(blocks: np.ndarray) -> Parts:
    return Parts(_pack(_fifth_bits(_split(blocks[:, 6:]), blocks[:, 2:6]), 5), _halves(blocks[:, :2]), _NOTHING)


def _q5_1(blocks: np.ndarray) -> Parts:
    codes = _fifth_bits(_split(blocks[:, 8:]), blocks[:, 4:8])
    return Parts(_pack(codes, 5), _halves(blocks[:, :2]), _halves(blocks[:, 2:4]))


def _q8_0(blocks: np.ndarray) -> Parts:
    return Parts(blocks[:, 2:], _halves(blocks[:, :2]), _NOTHING)


def _record(half: np.ndarray, integers: np.ndarray, bits: int) -> np.ndarray:
    """Join a half's bytes and unsigned integers [count, groups] to records."""
    return np.concatenate([half, _pack(integers, bits).reshape(len(half), -1)], axis=1)


def _six_bits(octets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split the 12 bytes of Q4_K and Q5_K into 8 scales and 8 minimums of 6 bits."""
    first, second, third = octets[:, :4], octets[:, 4:8], octets[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minimums = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return scales, minimums


def _k_grids(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales, minimums = _six_bits(blocks[:, 4:16])
    return _record(blocks[:, :2], scales, 6), _record(blocks[:, 2:4], minimums, 6)


def _q4_k(blocks: np.ndarray) -> Parts:
    return Parts(_nibbles(blocks[:, 16:].reshape(-1, 4, 32)), *_k_grids(blocks))


def _q5_k(blocks: np.ndarray) -> Parts:
    codes = _split(blocks[:, 48:].reshape(-1, 4, 32))  # [count, 4, 2, 32]
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # [count, 8, 32]
    codes |= high.reshape(codes.shape) << 4
    return Parts(_pack(codes, 5), *_k_grids(blocks))


def _q6_k(blocks: np.ndarray) -> Parts:
    codes = _split(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    codes |= high << 4
    return Parts(_pack(codes, 6), np.concatenate([blocks[:, 208:], blocks[:, 192:208]], axis=1), _NOTHING)


def _two_bits(octets: np.ndarray) -> np.ndarray:
    """Split 64 bytes into 256 codes: a byte has codes that are 32 apart."""
    return octets.reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3


def _q2_k(blocks: np.ndarray) -> Parts:
    integers = blocks[:, :16]
    scales, minimums = (
        _record(blocks[:, at : at + 2], part, 4) for at, part in ((80, integers & 15), (82, integers >> 4))
    )
    return Parts(_pack(_two_bits(blocks[:, 16:80]), 2), scales, minimums)


def _q3_k(blocks: np.ndarray) -> Parts:
    codes = _two_bits(blocks[:, 32:96])
    high = blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    codes |= high.reshape(codes.shape) << 2
    low, top = blocks[:, None, 96:104], blocks[:, None, 104:108]
    low = (low >> np.array([0, 4], np.uint8)[:, None] & 15).reshape(-1, 16)
    top = (top >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3).reshape(-1, 16)
    return Parts(_pack(codes, 3), _record(blocks[:, 108:], low | top << 4, 6), _NOTHING)


_TURNS: Mapping[str, Callable[[np.ndarray], Parts]] = MappingProxyType(
    {
        "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
        "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    }
)  # fmt: skip
