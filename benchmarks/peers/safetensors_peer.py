"""safetensors: floats as they are, in one buffer with a header; the peer of loading a table."""

from __future__ import annotations

import numpy as np

from benchmarks.peers import ROW, Peer, library


class Safetensors(Peer):
    """float16 in a safetensors buffer."""

    name = "float16 in safetensors"
    widths = {16: (ROW,)}  # noqa: RUF012

    def quantize(self, w: np.ndarray, bits: int, group: int) -> bytes:
        return library("safetensors.numpy").save({"w": w.astype(np.float16)})

    def dequantize(self, q: bytes) -> np.ndarray:
        return library("safetensors.numpy").load(q)["w"].astype(np.float32)

    def stored_bits(self, q: bytes) -> int:
        return 8 * len(q)


def load() -> list[Peer]:
    """Load the peer."""
    library("safetensors.numpy")
    return [Safetensors()]
