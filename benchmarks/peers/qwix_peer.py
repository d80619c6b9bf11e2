"""qwix: quantization for JAX; narrow integers take a byte each in memory."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.peers import ROW, Peer, library


class Qwix(Peer):
    """`qwix.quantize`, jitted.

    Args:
        name: The contender's name.
        method: The calibration method, "absmax" or "minmax".
        qwix: The library.
    """

    note = "codes not packed"

    def __init__(self, name: str, method: str, qwix: ModuleType) -> None:
        import jax

        self.name = name
        self.widths = {8: (ROW, 32), 4: (32, 64, 128)} | ({2: (32, 64, 128)} if method == "absmax" else {})

        @partial(jax.jit, static_argnames=("bits", "group"))
        def quantize(w: Any, bits: int, group: int) -> Any:
            tiles = {1: group} if group else {}
            return qwix.quantize(w, f"int{bits}", channelwise_axes=(0,), tiled_axes=tiles, calibration_method=method)

        self._quantize, self._dequantize = quantize, jax.jit(qwix.dequantize)

    def prepare(self, w: np.ndarray) -> Any:
        import jax

        return jax.device_put(w)

    def quantize(self, w: Any, bits: int, group: int) -> Any:
        import jax

        return jax.block_until_ready(self._quantize(w, bits, group))

    def dequantize(self, q: Any) -> np.ndarray:
        return np.asarray(self._dequantize(q))

    def stored_bits(self, q: Any) -> int:
        arrays = [q.qvalue, q.scale] + ([] if q.zero_point is None else [q.zero_point])
        return 8 * sum(array.nbytes for array in arrays)

    def packed_bits(self, q: Any) -> int:
        bits = int(str(q.qtype).removeprefix("int"))
        zeros = 0 if q.zero_point is None else q.zero_point.size
        return bits * (q.qvalue.size + zeros) + 8 * q.scale.nbytes


def load() -> list[Peer]:
    """Load the symmetric and the asymmetric method."""
    qwix = library("qwix")
    return [Qwix("qwix absmax", "absmax", qwix), Qwix("qwix minmax", "minmax", qwix)]
