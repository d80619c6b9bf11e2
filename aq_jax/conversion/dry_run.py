"""What a conversion would write, without writing it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aq_jax.config import ConversionConfig
from aq_jax.conversion.corridor import check_source
from aq_jax.conversion.source import Source
from aq_jax.quantizers.screen import to_half
from aq_jax.quantizers.treatment import treat
from aq_jax.store import check_table
from aq_jax.store.folders import Folder, split_url


@dataclass(frozen=True, slots=True)
class Planned:
    """A row that a conversion will write: bytes are an upper bound, before scales are compressed.

    Args:
        vector: whether it is left alone for being a norm or a bias by its name (see `quantizers.treatment.treat`).
    """

    name: str
    shape: tuple[int, ...]
    quant_type: str
    bytes: int
    vector: bool = False


def check_output(source: Source, config: ConversionConfig) -> None:
    """Refuse what a conversion would refuse to write, or to write to.

    Raises:
        FormatError, OSError: as `corridor.to_table`, and `shards.run.convert_to_shards` for a folder.
    """
    if config.in_shards:
        from aq_jax.conversion.shards.run import check_folder

        check_folder(source, Folder(config.output), config.quantization)
    else:
        check_table(config.output, config.compression)
        check_source(source, split_url(config.output)[0], config.quantization)


def dry_run(source: Source, config: ConversionConfig) -> list[Planned]:
    """Say what would be written. Only tensors that may be kept in float16 are looked at.

    Args:
        source: that a format has opened.
        config: with the overrides of its plan; widths are chosen.
    """
    rows: list[Planned] = []
    for name, (shape, dtype) in source.shapes.items():
        treatment = treat(config.quantization, name, shape, dtype)
        kind, size = treatment.quant_type, treatment.stored_bytes
        if config.quantization is None:
            kind, size = source.rows.get(name, {}).get("quant_type", dtype.name), source.size(name)
        elif treatment.half and (half := to_half(np.asarray(source.read(name)))).dtype != np.float16:
            kind, size = "none", half.nbytes
        rows.append(Planned(name, shape, kind, size, treatment.vector))
    return rows
