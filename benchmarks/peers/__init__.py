"""Wrap the libraries that ours is measured beside: a file each, which names no more of its library than it must.

A file's `load()` imports the library and returns its contenders, or raises `Absent` with the reason.
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
    "safetensors_peer",
    "onnxruntime_peer",
)


class Absent(Exception):  # noqa: N818 - nothing went wrong
    """A library is not there; the text says which."""


class Peer(ABC):
    """A way to quantize: of a library with given options."""

    name: str
    widths: Mapping[int, tuple[int, ...]]  # bits -> sizes of groups that it has
    note: str = ""  # what a reader should know, such as that codes are not packed
    slow: bool = False  # by orders of magnitude: left out of quick runs
    decodes: bool = True  # whether `dequantize` is the library's own, and worth timing
    packs: tuple[int, ...] = ()  # bits that it packs by functions of their own

    def arrange(self, w: np.ndarray) -> Any:
        """Make a matrix the library's own array, before the clock starts."""
        return w

    @abstractmethod
    def quantize(self, w: Any, bits: int, group: int) -> Any:
        """Quantize a matrix [outputs, inputs], arranged, in groups of its rows; return when the work is done."""

    @abstractmethod
    def dequantize(self, q: Any) -> np.ndarray:
        """Compute the values that a quantized matrix stands for, in float32."""

    @abstractmethod
    def stored_bits(self, q: Any) -> int:
        """Count the bits of codes, scales and zeros as the library stores them."""

    def needed_bits(self, q: Any) -> int:
        """Count the bits if codes were packed, where the library leaves that to others."""
        return self.stored_bits(q)

    def arrange_codes(self, codes: np.ndarray, bits: int) -> Any:
        """Arrange codes 0 to 2^bits - 1 in bytes, as `pack` takes them."""
        return codes

    def pack(self, codes: Any, bits: int) -> Any:
        """Codes, arranged, in as many bits as they need."""
        raise NotImplementedError

    def unpack(self, packed: Any, bits: int) -> Any:
        """Undo `pack`."""
        raise NotImplementedError


def load(module: str) -> list[Peer]:
    """Load the contenders of one of MODULES.

    Raises:
        Absent: if its library is not there.
    """
    return importlib.import_module(f"benchmarks.peers.{module}").load()


def library(name: str) -> ModuleType:
    """Import a module.

    Raises:
        Absent: if it is not there, or does not go with what is.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0]
        reason = f"{missing} is not installed" if missing else " ".join(str(error).split())[:200]
        raise Absent(reason) from None


def other_group(theirs: int, ours: int) -> str:
    """Note for readers that a peer has no groups of our size."""
    return "" if theirs == ours else f"theirs in groups of {theirs}" if theirs else "theirs in rows"


def nearest(peer: Peer, bits: int, group: int) -> int:
    """Choose the size of a peer's groups that is nearest to one, counting a row as very long."""
    return min(peer.widths[bits], key=lambda size: abs((size or 2**20) - (group or 2**20)))
