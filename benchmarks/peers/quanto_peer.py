"""optimum-quanto: 8 bits a row, 4 and 2 bits in groups with a float shift, packed."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.peers import ROW, Peer, library
from benchmarks.peers.torch_threads import load_torch


class Quanto(Peer):
    """`quantize_weight` with one of its optimizers.

    Args:
        name: The contender's name.
        quanto: The library.
        optimizer: The optimizer of widths below eight bits.
        torch: The torch module.
    """

    packs = (4, 2)

    def __init__(self, name: str, quanto: ModuleType, optimizer: str, torch: ModuleType) -> None:
        self.name, self._quanto, self._torch = name, quanto, torch
        self._below, self._eight = getattr(quanto, optimizer)(), quanto.AbsmaxOptimizer()
        self.slow = optimizer == "HqqOptimizer"
        below = {4: (32, 64, 128), 2: (32, 64, 128)}
        self.widths = below if self.slow else {8: (ROW,), **below}

    def prepare(self, w: np.ndarray) -> Any:
        return self._torch.from_numpy(w)

    def quantize(self, w: Any, bits: int, group: int) -> Any:
        kind = getattr(self._quanto, f"qint{bits}")
        with self._torch.no_grad():
            if bits == 8:
                scale = self._eight(w, qtype=kind, axis=0)
                return self._quanto.quantize_weight(w, qtype=kind, axis=0, scale=scale)
            scale, shift = self._below(w, qtype=kind, axis=0, group_size=group)
            return self._quanto.quantize_weight(w, qtype=kind, axis=0, scale=scale, shift=shift, group_size=group)

    def dequantize(self, q: Any) -> np.ndarray:
        return q.dequantize().numpy()

    def stored_bits(self, q: Any) -> int:
        shift = getattr(q, "_shift", None)
        codes = getattr(q._data, "_data", q._data)  # a PackedTensor reports the size of the unpacked codes
        return 8 * (codes.nbytes + q._scale.nbytes + (0 if shift is None else shift.nbytes))

    def prepare_codes(self, codes: np.ndarray, bits: int) -> Any:
        return self._torch.from_numpy(codes)

    def pack(self, codes: Any, bits: int) -> Any:
        return library("optimum.quanto.tensor.packed").PackedTensor.pack(codes, bits)

    def unpack(self, packed: Any, bits: int) -> Any:
        return packed.unpack()


def load() -> list[Peer]:
    """Load its two optimizers."""
    torch = load_torch()
    quanto = library("optimum.quanto")
    return [
        Quanto("quanto", quanto, "MaxOptimizer", torch),
        Quanto("quanto, HQQ", quanto, "HqqOptimizer", torch),
    ]
