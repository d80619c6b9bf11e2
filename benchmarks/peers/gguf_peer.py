"""gguf: llama.cpp's blocks of 32, by the NumPy code of its Python package. (Its two-bit blocks only read.)"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.peers import Peer, library


class Gguf(Peer):
    """One of the block types; scales are float16.

    Args:
        gguf: The library.
        kind: The name of the type, whose digit is the width.
    """

    def __init__(self, gguf: ModuleType, kind: str) -> None:
        self.name = f"gguf {kind}"
        self.widths = {int(kind[1]): (32,)}
        self._quants, self._kind = library("gguf.quants"), gguf.GGMLQuantizationType[kind]

    def quantize(self, w: Any, bits: int, group: int) -> np.ndarray:
        return self._quants.quantize(w, self._kind)

    def dequantize(self, q: np.ndarray) -> np.ndarray:
        return self._quants.dequantize(q, self._kind)

    def stored_bits(self, q: np.ndarray) -> int:
        return 8 * q.nbytes


def load() -> list[Peer]:
    """Load the types that it can write."""
    gguf = library("gguf")
    return [Gguf(gguf, kind) for kind in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")]
