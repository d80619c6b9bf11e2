"""A small BERT of random weights: a table, and the side files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bert_oracle as oracle

import aq_jax as aq


def make(
    folder: Path,
    config: aq.QuantizationConfig | str | None = None,
    fields: Mapping[str, Any] = oracle.CONFIG,
    name: str = "m.parquet",
) -> Path:
    """Write all of it into a folder, and give the path of the table; `fields` are those of config.json."""
    weights = oracle.weights(fields)
    oracle.write_side_files(folder, fields)
    aq.save(folder / name, weights if config is None else aq.quantize_tree(weights, config))
    return folder / name
