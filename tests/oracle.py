"""What the numerics are, once more: slow, in plain NumPy and Python integers, written from the specification alone.

Nothing here imports aq_jax. Every operation is one float32 operation, in the order in which it is specified.
"""

from __future__ import annotations

import math

import numpy as np

f32 = np.float32


def code_range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def group_elements(shape: tuple[int, ...], per_channel: bool = False, group_size: int = 0) -> int:
    """How many consecutive elements of the row-major flattened tensor share a grid."""
    if group_size:
        return group_size
    return math.prod(shape[1:]) if per_channel else math.prod(shape)


def groups_of(w: np.ndarray, per_channel: bool = False, group_size: int = 0) -> list[np.ndarray]:
    """The groups in their order; the last may be short."""
    flat = w.astype(f32).ravel()
    size = group_elements(w.shape, per_channel, group_size)
    return [flat[start : start + size] for start in range(0, flat.size, size)]


def absmax(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.float32, np.float32]:
    """(codes, scale, zero point) of one group."""
    qmin, qmax = code_range(bits)
    if x.min() == x.max():
        return constant(x)
    scale = f32(np.abs(x).max() * f32(1 / qmax))
    inverse = f32(f32(1) / scale)
    codes = np.clip(np.round(x * inverse), qmin, qmax)
    return codes.astype(int), scale, f32(0)


def minmax(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.float32, np.float32]:
    qmin, qmax = code_range(bits)
    n = qmax - qmin
    lo, hi = x.min(), x.max()
    if lo == hi:
        return constant(x)
    share = f32(1 / n)
    scale = f32(f32(hi * share) - f32(lo * share))
    inverse = f32(f32(1) / scale)
    codes = np.clip(np.round((x - lo) * inverse), 0, n) + qmin
    return codes.astype(int), scale, f32(f32(qmin) - f32(lo * inverse))


def constant(x: np.ndarray) -> tuple[np.ndarray, np.float32, np.float32]:
    """One value c: scale |c| and the code sign(c), which is exact; zeros have the scale 1."""
    c = x[0]
    return np.full(x.size, int(np.sign(c))), f32(1) if c == 0 else f32(abs(c)), f32(0)


SOLVERS = {"absmax": absmax, "minmax": minmax}


def quantize(
    w: np.ndarray, bits: int, solver: str, per_channel: bool = False, group_size: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes of the flattened tensor, scales, zero points)."""
    solved = [SOLVERS[solver](group, bits) for group in groups_of(w, per_channel, group_size)]
    codes = [code for codes, _, _ in solved for code in codes.tolist()]
    return np.array(codes, int), np.array([s for _, s, _ in solved], f32), np.array([z for _, _, z in solved], f32)


def dequantize(
    codes: np.ndarray,
    scales: np.ndarray,
    zero_points: np.ndarray,
    shape: tuple[int, ...],
    per_channel: bool = False,
    group_size: int = 0,
) -> np.ndarray:
    """(q - zero_point) * scale, in float32."""
    group = np.arange(codes.size) // group_elements(shape, per_channel, group_size)
    values = (codes.ravel().astype(f32) - zero_points.ravel()[group]) * scales.ravel()[group]
    return values.astype(f32).reshape(shape)


def pack(codes: list[int], bits: int) -> bytes:
    """The little-endian bit stream: code i in bits [bits * i, bits * (i + 1)) of one large integer."""
    if bits == 8:
        return bytes(code % 256 for code in codes)
    stream = 0
    for i, code in enumerate(codes):
        stream |= (code + 2 ** (bits - 1)) << (bits * i)
    return stream.to_bytes(math.ceil(len(codes) * bits / 8), "little")


def unpack(data: bytes, bits: int, count: int) -> list[int]:
    if bits == 8:
        return [byte - 256 if byte > 127 else byte for byte in data[:count]]
    stream = int.from_bytes(data, "little")
    return [(stream >> (bits * i)) % 2**bits - 2 ** (bits - 1) for i in range(count)]


def codes_of(q) -> np.ndarray:
    """The codes of a QTensor, read out of its bytes."""
    codes = np.asarray(q.codes)
    if codes.dtype == np.int8:
        return codes.astype(int)
    rows = [unpack(row.tobytes(), q.spec.bits, q.length) for row in codes.reshape(-1, codes.shape[-1])]
    return np.array(rows, int).reshape(q.shape)


def stream_codes(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The codes of a stored tensor of any size: whole runs of bytes one after the other."""
    raw, step = data.tobytes(), bits  # 8 codes are `bits` bytes
    codes = [code for i in range(0, len(raw), step) for code in unpack(raw[i : i + step], bits, 8)]
    return np.array(codes[:count] if bits < 8 else unpack(raw, 8, count), int)


def row_codes(x: np.ndarray) -> tuple[np.ndarray, np.float32, np.float32]:
    """(codes, scale, offset) of one row of activations: its range on 256 levels."""
    lo, hi = x.min(), x.max()
    scale = max(f32(f32(hi - lo) * f32(1 / 255)), f32(2**-100))
    codes = np.round((x - lo) * f32(f32(1) / scale)) - 128
    return codes.astype(int), scale, f32(lo + f32(f32(128) * scale))


def int8_dot(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(x @ W.T by sums of integers, the sum of the magnitudes that were added) for grids [outputs, groups]."""
    (outputs, inputs), groups = codes.shape, scales.shape[1]
    y, magnitude = np.zeros((2, len(x), outputs))
    for i, row in enumerate(x):
        qx, sx, ox = row_codes(row)
        for j in range(outputs):
            for part in range(groups):
                group = slice(part * inputs // groups, (part + 1) * inputs // groups)
                a, b = qx[group].astype(np.int64), codes[j, group].astype(np.int64)
                sw, zw = float(scales[j, part]), float(zero_points[j, part])
                y[i, j] += sw * (float(sx) * (a @ b - zw * a.sum()) + float(ox) * (b.sum() - len(b) * zw))
                magnitude[i, j] += sw * (float(sx) * abs(a) + abs(float(ox))) @ (abs(b) + abs(zw))
    return y, magnitude


def unrotate(w: np.ndarray, block: int) -> np.ndarray:
    """Each block of the last axis times the transposed rotation matrix, one element after the other."""
    out = np.zeros(w.shape, np.float64)
    flat, to = w.reshape(-1, block), out.reshape(-1, block)
    for i in range(block):
        ones_in_a_row = sum(f"{i:b}"[k : k + 2] == "11" for k in range(i.bit_length()))
        for j in range(block):
            sign = (-1) ** (ones_in_a_row + (i & j).bit_count())
            to[:, i] += flat[:, j] * sign / math.sqrt(block)
    return out
