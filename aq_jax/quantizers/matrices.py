"""Quantize tensors whose code is chosen a matrix at a time, and cut the result into the pieces of a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np

from aq_jax.codes.rotation import rotate_rows
from aq_jax.config import QuantizationConfig
from aq_jax.errors import AqError
from aq_jax.quantizers.candidates import Quantized, fit_of
from aq_jax.quantizers.eligibility import Refused, refusal, to_float32
from aq_jax.quantizers.entry import MatrixQuantizer
from aq_jax.quantizers.lookup import data_free_quantizer
from aq_jax.quantizers.trellis import NO_SCALE


def quantize_matrices(
    array: np.ndarray, config: QuantizationConfig, name: str, pieces: list[tuple[int, int]]
) -> Iterator[Quantized] | Refused:
    """Quantize an array of matrices; see `tiles.quantize_pieces`. All of its codes are in memory."""
    quantizer = cast(MatrixQuantizer, data_free_quantizer(config, name))
    spec = config.spec_for(array.shape, name)
    code, none = spec.coding, np.empty(0, np.float32)
    if array.size == 0:
        ones = np.ones(spec.group_count(array.shape), np.float32)
        return iter([Quantized(np.empty(0, np.uint8), ones, none, 1.0, 0.0)])
    w = np.ascontiguousarray(to_float32(array))
    found = quantizer.encode(rotate_rows(w, spec.rotation) if spec.rotation else w, code)
    blank = (found.scales == NO_SCALE).any()
    why = refusal(array, spec, found.scales, name, found.sound, NO_SCALE) if blank or not found.sound else None
    if why is not None:
        if config.on_nonfinite == "error":
            raise AqError(str(why))
        return why
    errors, row = fit_of(found.sums), array.shape[-1]
    return (
        Quantized(
            found.data[slice(*code.span(start, stop, array.shape))],
            found.scales[start // row : -(-stop // row)], none, *errors,
        )
        for start, stop in pieces
    )  # fmt: skip
