"""Plain, vectorized NumPy for absmax quantization and packing, as one would write it without a library."""

from __future__ import annotations

import numpy as np

from benchmarks.peers import ROW, Peer


class NumpyVectorized(Peer):
    """Symmetric absmax, all groups at once; the first code of a byte in its low bits."""

    name = "NumPy"
    widths = {8: (ROW, 32, 64, 128), 4: (32, 64, 128), 2: (32, 64, 128)}  # noqa: RUF012
    packs = (4, 2)

    def quantize(self, w: np.ndarray, bits: int, group: int) -> tuple:
        qmax = 2 ** (bits - 1) - 1
        groups = w.reshape(-1, group or w.shape[-1])
        scale = np.abs(groups).max(axis=1) * np.float32(1 / qmax)
        scale[scale == 0] = 1
        codes = np.clip(np.round(groups * (1 / scale)[:, None]), -qmax - 1, qmax).astype(np.int8)
        if bits == 8:
            return codes.view(np.uint8).reshape(-1), scale, bits, w.shape
        return self.pack((codes + (qmax + 1)).astype(np.uint8), bits), scale, bits, w.shape

    def dequantize(self, q: tuple) -> np.ndarray:
        packed, scale, bits, shape = q
        if bits == 8:
            codes = packed.view(np.int8).astype(np.float32)
        else:
            codes = self.unpack(packed, bits).astype(np.float32) - 2 ** (bits - 1)
        return (codes.reshape(scale.size, -1) * scale[:, None]).reshape(shape)

    def stored_bits(self, q: tuple) -> int:
        return 8 * (q[0].nbytes + q[1].nbytes)

    def pack(self, codes: np.ndarray, bits: int) -> np.ndarray:
        run = 8 // bits
        unsigned = codes.reshape(-1, run)
        packed = unsigned[:, 0].copy()
        for i in range(1, run):
            packed |= unsigned[:, i] << (bits * i)
        return packed

    def unpack(self, packed: np.ndarray, bits: int) -> np.ndarray:
        shifts = np.arange(8 // bits, dtype=np.uint8) * bits
        return (packed.reshape(-1, 1) >> shifts) & (2**bits - 1)


def cosine_and_error(w: np.ndarray, v: np.ndarray) -> tuple[float, float]:
    """Compute cosine and relative squared error of dequantized weights, as a table records them."""
    flat, v = w.reshape(-1), v.reshape(-1)
    ww, vv, wv = float(np.dot(flat, flat)), float(np.dot(v, v)), float(np.dot(flat, v))
    return wv / (ww * vv) ** 0.5, (ww - 2 * wv + vv) / ww


def load() -> list[Peer]:
    """Load the peer, which is always there."""
    return [NumpyVectorized()]
