"""How much memory the conversion of tensors takes: known before it begins, so that a limit can be kept."""

from __future__ import annotations

import os
from collections.abc import Collection

from aq_jax.config import Compression, QuantizationConfig
from aq_jax.conversion.source import Source
from aq_jax.quantizers.treatment import treat

PROCESS_BYTES = 250 << 20
"""What a process takes that has JAX, a compiled program and its tiles: twice what was measured."""
PARENT_BYTES = 150 << 20
"""What a process takes that only shares work out, to processes of their own."""


def machine_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def shard_bytes(
    source: Source, names: Collection[str], config: QuantizationConfig | None, compression: Compression
) -> tuple[int, str]:
    """The memory that these tensors take, one after the other, and which of them takes the most."""
    needs = ((treat(config, n, *source.shapes[n]).peak_bytes(compression) + source.held(n), n) for n in names)
    return max(needs)
