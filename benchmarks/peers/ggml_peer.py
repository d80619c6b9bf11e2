"""ggml: llama.cpp's blocks of 256 at three and two bits, by its own C library, which its Python package lacks."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.peers import MissingLibrary, Peer, library

VARIABLE = "AQ_JAX_GGML"  # the file libggml-base of llama.cpp, which is built from its sources
KINDS = {"Q3_K": 3, "Q2_K": 2}


class Ggml(Peer):
    """One of the types; blocks run over the ends of rows that 256 does not divide, where llama.cpp takes other types.

    Args:
        gguf: The Python package.
        ggml: The C library.
        kind: The name of the type.
    """

    decodes = False

    def __init__(self, gguf: ModuleType, ggml: ctypes.CDLL, kind: str) -> None:
        self.name = f"ggml {kind}"
        self.widths = {KINDS[kind]: (256,)}
        self._quants, self._kind = library("gguf.quants"), gguf.GGMLQuantizationType[kind]
        self._encode = ggml.ggml_quantize_chunk
        self._encode.restype = ctypes.c_size_t
        self._encode.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def quantize(self, w: Any, bits: int, group: int) -> tuple[np.ndarray, tuple[int, ...]]:
        flat = np.resize(np.ascontiguousarray(w, np.float32), (-(-w.size // 256), 256))
        out = np.empty(flat.nbytes, np.uint8)
        size = self._encode(int(self._kind), flat.ctypes.data, out.ctypes.data, 0, *flat.shape, None)
        return out[:size].reshape(len(flat), -1), w.shape

    def dequantize(self, q: tuple[np.ndarray, tuple[int, ...]]) -> np.ndarray:
        blocks, shape = q
        flat = self._quants.dequantize(blocks, self._kind).reshape(-1)
        return flat[: int(np.prod(shape))].reshape(shape)

    def stored_bits(self, q: tuple[np.ndarray, tuple[int, ...]]) -> int:
        return 8 * q[0].nbytes


def load() -> list[Peer]:
    """Load the types that the Python package can read and not write."""
    gguf, path = library("gguf"), os.environ.get(VARIABLE, "")
    if not Path(path).is_file():
        raise MissingLibrary(f"ggml is not installed: {VARIABLE} names no file of it")
    ggml = ctypes.CDLL(path)
    return [Ggml(gguf, ggml, kind) for kind in KINDS]
