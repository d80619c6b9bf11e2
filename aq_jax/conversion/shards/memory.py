"""How much memory the conversion of a tensor takes: known before it begins, so that a limit can be kept."""

from __future__ import annotations

import math
import os
from collections.abc import Collection

import numpy as np

from aq_jax.config import Compression, QuantizationConfig
from aq_jax.conversion.source import Source
from aq_jax.quantizers.lookup import candidates
from aq_jax.quantizers.treatment import treat
from aq_jax.store import pieces
from aq_jax.store.layout import data_bytes, group_count
from aq_jax.store.schema import GROUP_BYTES

PROCESS_BYTES = 250 << 20
"""What a process takes that has JAX, a compiled program and its tiles: twice what was measured."""
PARENT_BYTES = 150 << 20
"""What a process takes that only shares work out, to processes of their own."""


def machine_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def tensor_bytes(
    shape: tuple[int, ...],
    dtype: np.dtype,
    config: QuantizationConfig | None,
    name: str,
    compression: Compression = "none",
) -> int:
    """Bytes that are in memory at most, beside the tensor itself, while it is quantized and written.

    >>> tensor_bytes((1024, 1024), np.dtype("float32"), QuantizationConfig("int8"), "w") >> 20
    11
    """
    treatment = None if config is None else treat(config, name, shape, dtype)
    # What goes into Parquet is copied twice there: into a page, and into the page behind its header; or once more.
    copies = 2 if compression == "none" else 3
    if treatment is not None and (spec := treatment.spec) and (quantizer := treatment.quantizer):
        cuts = pieces(shape, dtype.name, spec.quant_type, spec.quant_axis, spec.group_size)
        largest = max(stop - start for start, stop in cuts)
        codes = data_bytes(largest, dtype.name, spec.quant_type)
        made = codes * candidates(quantizer, spec.bits, treatment.policy.symmetric)
        if largest * spec.bits % 8 or spec.group_elements(shape) * spec.bits % 8:
            made += 2 * largest  # a byte a code, until all can be packed
        groups = group_count(math.prod(shape), shape, spec.quant_axis, spec.group_size)
        turned = 4 * math.prod(shape) if spec.rotation else 0
        need = made + copies * codes + 6 * 8 * groups + turned
    elif treatment is not None and treatment.half:
        largest = max(stop - start for start, stop in pieces(shape, dtype.name))
        need = 2 * math.prod(shape) + copies * largest * 2
    else:
        cuts = pieces(shape, dtype.name)
        need = copies * max(stop - start for start, stop in cuts) * dtype.itemsize
    return need + GROUP_BYTES


def shard_bytes(
    source: Source, names: Collection[str], config: QuantizationConfig | None, compression: Compression
) -> tuple[int, str]:
    """The memory that these tensors take, one after the other, and which of them takes the most."""
    needs = ((tensor_bytes(*source.shapes[n], config, n, compression) + source.held(n), n) for n in names)
    return max(needs)
