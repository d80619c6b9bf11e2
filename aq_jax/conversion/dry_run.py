"""List the rows that a conversion would write, without writing them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aq_jax.config import ConversionConfig
from aq_jax.conversion.corridor import check_source
from aq_jax.conversion.source import Source
from aq_jax.quantizers.eligibility import to_float16
from aq_jax.quantizers.treatment import Treatment, treat
from aq_jax.store import check_table
from aq_jax.store.folders import Folder, split_url


@dataclass(frozen=True, slots=True)
class ExpectedRow:
    """A row that a conversion will write.

    Args:
        name: The tensor's name.
        shape: The tensor's shape.
        quant_type: The row's quant_type.
        bytes: An upper bound of the row's bytes, before scales are compressed.
        treatment: The decision about the tensor.
    """

    name: str
    shape: tuple[int, ...]
    quant_type: str
    bytes: int
    treatment: Treatment


def check_output(source: Source, config: ConversionConfig) -> None:
    """Refuse what a conversion would refuse to write, and where it would refuse to write.

    Raises:
        FormatError, OSError: as `corridor.to_table`, and `shards.run.convert_to_shards` for a folder.
    """
    if config.in_shards:
        from aq_jax.conversion.shards.run import check_folder

        check_folder(source, Folder(config.output), config.quantization, config.requantize)
    else:
        check_table(config.output, config.compression)
        check_source(source, split_url(config.output)[0], config.quantization, config.requantize)


def expected_rows(source: Source, config: ConversionConfig) -> list[ExpectedRow]:
    """List the rows that would be written; only the values of tensors that may be kept in float16 are read.

    Args:
        source: A source that a format opened.
        config: The conversion's config, with the overrides of its plan and with chosen widths.
    """
    rows: list[ExpectedRow] = []
    for name, (shape, dtype) in source.shapes.items():
        treatment = treat(config.quantization, name, shape, dtype)
        kind, size = treatment.quant_type, treatment.stored_bytes
        if config.quantization is None:
            kind, size = source.row_metadata.get(name, {}).get("quant_type", dtype.name), source.nbytes(name)
        elif treatment.half and (half := to_float16(np.asarray(source.read(name)))).dtype != np.float16:
            kind, size = "none", half.nbytes
        rows.append(ExpectedRow(name, shape, kind, size, treatment))
    return rows
