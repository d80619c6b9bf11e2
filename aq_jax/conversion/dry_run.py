"""Foretell a conversion: the rows that it would write and its notes, without writing anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from aq_jax.config import ConversionConfig
from aq_jax.conversion.corridor import allocate, check_source
from aq_jax.conversion.source import Source
from aq_jax.progress import Progress
from aq_jax.quantizers.eligibility import to_float16
from aq_jax.quantizers.treatment import kept_notes, treat
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
    """

    name: str
    shape: tuple[int, ...]
    quant_type: str
    bytes: int


@dataclass(frozen=True, slots=True)
class ExpectedResult:
    """Foretell what a conversion will write and say.

    Args:
        rows: The rows of the table.
        notes: The notes of the conversion, but for those that only the running model or the written file gives.
        allocation: The record of the chosen widths, if any (`calibration.allocation.Allocation`).
    """

    rows: list[ExpectedRow]
    notes: list[str]
    allocation: Mapping[str, Any] | None = None


def expected_result(source: Source, config: ConversionConfig, progress: Progress | None = None) -> ExpectedResult:
    """List the rows and notes of a conversion; without `allocate`, only tensors that may become float16 are read.

    Args:
        source: A source that a format opened.
        config: The conversion's config, with the overrides of its plan.
        progress: A callback that gets each tensor's name, its bytes, and the bytes of all, while widths are chosen.

    Raises:
        ConfigError, FormatError, OSError: as `corridor.to_table`, and `shards.run.convert_to_shards` for a folder.
    """
    if config.in_shards:
        from aq_jax.conversion.shards.run import check_folder

        _, notes = check_folder(source, Folder(config.output), config)
    else:
        check_table(config.output, config.compression)
        target, policy = split_url(config.output)[0], config.quantization
        _, notes = check_source(source, target, policy, config.requantize, config.calibration)
    record = None
    if config.allocate is not None and config.quantization is not None:
        widths = allocate(
            source, config.quantization, config.calibration, config.allocate, progress, config.output,
            config.compression, config.train is not None,
        )  # fmt: skip
        record, config = widths.record(), replace(config, quantization=widths.config)
    rows: list[ExpectedRow] = []
    treatments = {name: treat(config.quantization, name, *found) for name, found in source.shapes.items()}
    for name, treatment in treatments.items():
        shape, dtype = source.shapes[name]
        kind, size = treatment.quant_type, treatment.stored_bytes
        if config.quantization is None:
            kind, size = source.row_metadata.get(name, {}).get("quant_type", dtype.name), source.nbytes(name)
        elif treatment.half and (half := to_float16(np.asarray(source.read(name)))).dtype != np.float16:
            kind, size = "none", half.nbytes
        rows.append(ExpectedRow(name, shape, kind, size))
    return ExpectedResult(rows, kept_notes(treatments) + notes, record)
