"""Estimate the memory that a conversion takes, before it begins, so that a limit can be kept."""

from __future__ import annotations

import math
import os
from collections.abc import Collection

from aq_jax.config import Compression, QuantizationConfig
from aq_jax.conversion.source import Source
from aq_jax.quantizers.treatment import COPIES, treat
from aq_jax.store import pieces
from aq_jax.store.schema import GROUP_BYTES

PROCESS_BYTES = 250 << 20
"""The memory of a process that has JAX, a compiled program and its tiles: twice what was measured."""
PARENT_BYTES = 150 << 20
"""The memory of a process that only hands out work to others."""


def machine_memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory(
    source: Source, names: Collection[str], config: QuantizationConfig | None, compression: Compression
) -> tuple[int, str]:
    """Return the peak memory of converting these tensors one after the other, and the tensor that needs it."""
    return max((_written(source, name, config, compression) + source.read_memory(name), name) for name in names)


def _written(source: Source, name: str, config: QuantizationConfig | None, compression: Compression) -> int:
    """Bound the memory of writing a tensor, beside the tensor itself."""
    if config is None and source.row_metadata and name in source.quantized:  # its codes are written as they are
        shape, dtype = source.shapes[name]
        cuts = pieces(shape, dtype.name)
        largest = source.nbytes(name) * max(stop - start for start, stop in cuts) // max(math.prod(shape), 1)
        return COPIES[compression] * largest + GROUP_BYTES
    return treat(config, name, *source.shapes[name]).peak_bytes(compression)
