"""NumPy in a Python loop over the groups, as in the published system."""

from __future__ import annotations

import numpy as np

from benchmarks.peers import ROW, Peer


class NumpyPlain(Peer):
    """Symmetric absmax, a group at a time; the loop packs the codes too."""

    name = "NumPy, a loop over groups"
    widths = {8: (ROW, 32, 64, 128), 4: (32, 64, 128), 2: (32, 64, 128)}  # noqa: RUF012

    def quantize(self, w: np.ndarray, bits: int, group: int) -> tuple:
        qmax, size = 2 ** (bits - 1) - 1, group or w.shape[1]
        flat = w.reshape(-1)
        count = flat.size // size
        scales, codes = np.empty(count, np.float32), np.empty((count, size * bits // 8), np.uint8)
        for i in range(count):
            part = flat[i * size : (i + 1) * size]
            largest = np.max(np.abs(part))
            scales[i] = largest / qmax if largest > 0 else 1
            q = np.clip(np.round(part / scales[i]), -qmax - 1, qmax).astype(np.int8)
            if bits == 8:
                codes[i] = q.view(np.uint8)
                continue
            unsigned, packed = (q + (qmax + 1)).astype(np.uint8), np.zeros(size * bits // 8, np.uint8)
            for j in range(8 // bits):
                packed |= unsigned[j :: 8 // bits] << (bits * j)
            codes[i] = packed
        return codes, scales, bits, w.shape

    def dequantize(self, q: tuple) -> np.ndarray:
        packed, scales, bits, shape = q
        out = np.empty((len(scales), packed.shape[1] * 8 // bits), np.float32)
        for i in range(len(scales)):
            if bits == 8:
                out[i] = packed[i].view(np.int8) * scales[i]
                continue
            for j in range(8 // bits):
                unsigned = (packed[i] >> (bits * j)) & (2**bits - 1)
                out[i, j :: 8 // bits] = (unsigned.astype(np.float32) - 2 ** (bits - 1)) * scales[i]
        return out.reshape(shape)

    def stored_bits(self, q: tuple) -> int:
        return 8 * (q[0].nbytes + q[1].nbytes)


def load() -> list[Peer]:
    """Load the peer, which is always there."""
    return [NumpyPlain()]
