"""What one would write without this library: plain, vectorized NumPy for absmax quantization and packing."""

from __future__ import annotations

import numpy as np


def quantize(w: np.ndarray, bits: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (packed below eight bits) and scales for groups of `size` consecutive elements."""
    groups = w.reshape(-1, size)
    qmax = 2 ** (bits - 1) - 1
    scale = np.abs(groups).max(axis=1) * np.float32(1 / qmax)
    scale[scale == 0] = 1
    codes = np.clip(np.round(groups * (1 / scale)[:, None]), -qmax - 1, qmax).astype(np.int8)
    if bits == 8:
        return codes.view(np.uint8), scale
    run = 8 // bits
    unsigned = (codes + (qmax + 1)).astype(np.uint8).reshape(-1, run)
    packed = unsigned[:, 0].copy()
    for i in range(1, run):
        packed |= unsigned[:, i] << (bits * i)
    return packed, scale


def fit(w: np.ndarray, packed: np.ndarray, scale: np.ndarray, bits: int) -> tuple[float, float]:
    """Cosine and relative squared error, as a table records them."""
    qmax = 2 ** (bits - 1) - 1
    if bits == 8:
        codes = packed.view(np.int8).astype(np.float32)
    else:
        shifts = np.arange(8 // bits, dtype=np.uint8) * bits
        codes = ((packed.reshape(-1, 1) >> shifts) & (2**bits - 1)).astype(np.float32) - (qmax + 1)
    v = (codes.reshape(scale.size, -1) * scale[:, None]).reshape(-1)
    flat = w.reshape(-1)
    ww, vv, wv = float(np.dot(flat, flat)), float(np.dot(v, v)), float(np.dot(flat, v))
    return wv / (ww * vv) ** 0.5, (ww - 2 * wv + vv) / ww
