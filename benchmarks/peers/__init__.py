"""The peers that we are compared with: one file each, which names no more of its library than it must.

A file's `load()` imports the library and returns its contenders, or raises `MissingLibrary` with the reason.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

ROW = 0  # a group size: all of a row
MODULES = (
    "ours",
    "numpy_plain",
    "numpy_vectorized",
    "torchao_peer",
    "quanto_peer",
    "hqq_peer",
    "qwix_peer",
    "gguf_peer",
    "ggml_peer",
    "safetensors_peer",
    "onnxruntime_peer",
)


class MissingLibrary(Exception):  # noqa: N818 - nothing went wrong
    """The error of a missing library, which its text names."""


class Peer(ABC):
    """A way to quantize: a library with given options."""

    name: str
    widths: Mapping[int, tuple[int, ...]]  # bits -> group sizes
    note: str = ""  # a note for readers, such as that codes are not packed
    slow: bool = False  # slower by orders of magnitude: left out of quick runs
    decodes: bool = True  # whether `dequantize` is the library's own, and worth timing
    packs: tuple[int, ...] = ()  # widths that it packs by separate functions

    def prepare(self, w: np.ndarray) -> Any:
        """Turn a matrix into the library's own array, before the clock starts."""
        return w

    @abstractmethod
    def quantize(self, w: Any, bits: int, group: int) -> Any:
        """Quantize an arranged matrix [outputs, inputs], whose groups lie in rows; return when the work is done."""

    @abstractmethod
    def dequantize(self, q: Any) -> np.ndarray:
        """Dequantize a matrix to float32."""

    @abstractmethod
    def stored_bits(self, q: Any) -> int:
        """Count the bits of codes, scales and zeros as the library stores them."""

    def packed_bits(self, q: Any) -> int:
        """Count the bits if codes were packed, which some libraries leave to others."""
        return self.stored_bits(q)

    def prepare_codes(self, codes: np.ndarray, bits: int) -> Any:
        """Arrange codes, 0 to 2^bits - 1 in bytes, as `pack` takes them."""
        return codes

    def pack(self, codes: Any, bits: int) -> Any:
        """Pack arranged codes into as many bits as they need."""
        raise NotImplementedError

    def unpack(self, packed: Any, bits: int) -> Any:
        """Invert `pack`."""
        raise NotImplementedError


def load(module: str) -> list[Peer]:
    """Load the contenders of one of MODULES.

    Raises:
        MissingLibrary: if its library is missing.
    """
    return importlib.import_module(f"benchmarks.peers.{module}").load()


def library(name: str) -> ModuleType:
    """Import a module.

    Raises:
        MissingLibrary: if it is missing, or does not work with the installed packages.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0]
        reason = f"{missing} is not installed" if missing else " ".join(str(error).split())[:200]
        raise MissingLibrary(reason) from None


def group_note(theirs: int, ours: int) -> str:
    """Write the note about a peer that has no groups of our size."""
    return "" if theirs == ours else f"theirs in groups of {theirs}" if theirs else "theirs in rows"


def nearest_group(peer: Peer, bits: int, group: int) -> int:
    """Find a peer's group size that is nearest to the wanted one; a row counts as very long."""
    return min(peer.widths[bits], key=lambda size: abs((size or 2**20) - (group or 2**20)))
