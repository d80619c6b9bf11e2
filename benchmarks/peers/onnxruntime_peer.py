"""ONNX Runtime: the kernels that quantize the weights of its MatMulNBits, in blocks, packed."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.peers import Peer, library


class OnnxRuntime(Peer):
    """Asymmetric blocks of its MatMulNBitsQuantizer; decoded by NumPy, after the operator's documentation.

    Args:
        kernels: The library's compiled module.
    """

    name = "onnxruntime"
    widths = {8: (32, 128), 4: (32, 64, 128), 2: (32, 64, 128)}  # noqa: RUF012
    decodes = False

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels = kernels

    def prepare(self, w: np.ndarray) -> Any:
        return np.ascontiguousarray(w.T)  # the operator's [inputs, outputs]

    def quantize(self, w: Any, bits: int, group: int) -> tuple:
        inputs, outputs = w.shape
        blocks, run = -(-inputs // group), 8 // bits
        codes = np.zeros((outputs, blocks, group // run), np.uint8)
        zeros = np.zeros((outputs, -(-blocks // run)), np.uint8)
        scales = np.zeros((outputs, blocks), np.float32)
        kernel = getattr(self._kernels, f"quantize_matmul_{bits}bits")
        kernel(codes, w, scales, zeros, group, outputs, inputs, False)
        return codes, scales, zeros, bits, inputs

    def dequantize(self, q: tuple) -> np.ndarray:
        codes, scales, zeros, bits, inputs = q
        outputs, blocks, _ = codes.shape
        shifts = np.arange(8 // bits, dtype=np.uint8) * bits
        values = ((codes[..., None] >> shifts) & (2**bits - 1)).reshape(outputs, blocks, -1).astype(np.float32)
        points = ((zeros[..., None] >> shifts) & (2**bits - 1)).reshape(outputs, -1)[:, :blocks]
        return ((values - points[..., None]) * scales[..., None]).reshape(outputs, -1)[:, :inputs]

    def stored_bits(self, q: tuple) -> int:
        return 8 * sum(array.nbytes for array in q[:3])


def load() -> list[Peer]:
    """Load the peer, whose kernels only newer versions have."""
    library("onnxruntime")
    return [OnnxRuntime(library("onnxruntime.capi._pybind_state"))]
