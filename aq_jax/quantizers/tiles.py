"""Quantize arrays of any size, tile by tile: few compilations, bounded memory.

The native library quantizes groups and channels of up to `TILE` elements where it can (`native_groups`); compiled
programs quantize the others (`compiled_tiles`). Memory is that of a tile and of one tensor's codes. `apply.quantize`,
of one array in memory, compiles once a shape instead, and runs on any device and under any transformation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np

from aq_jax.codes.rotation import rotate_rows
from aq_jax.config import QuantizationConfig, QuantSpec
from aq_jax.errors import AqError
from aq_jax.ops.kernels import choose_kernel
from aq_jax.quantizers import Quantizer
from aq_jax.quantizers.candidates import Quantized, TiledQuantizer
from aq_jax.quantizers.compiled_tiles import GroupsPerTile, TilesPerGroup
from aq_jax.quantizers.eligibility import Refused, refusal, to_float32
from aq_jax.quantizers.entry import recipes_of
from aq_jax.quantizers.lookup import data_free_quantizer
from aq_jax.quantizers.matrices import quantize_matrices
from aq_jax.quantizers.native_groups import NativeGroups
from aq_jax.quantizers.stream import TILE


def quantize_array(array: np.ndarray, config: QuantizationConfig, name: str) -> Quantized | Refused:
    """Quantize a whole array; see `quantize_pieces`."""
    pieces = quantize_pieces(array, config, name, [(0, array.size)])
    return pieces if isinstance(pieces, Refused) else next(iter(pieces))


def quantize_pieces(
    array: np.ndarray, config: QuantizationConfig, name: str, pieces: list[tuple[int, int]]
) -> Iterator[Quantized] | Refused:
    """Quantize an array piece by piece, as the rows of a table hold it.

    Args:
        array: A floating array of any strides, which is read tile by tile.
        config: The tensor's config (`QuantizationConfig.for_tensor`).
        name: The tensor's name, for errors.
        pieces: Ranges (start, stop) of elements of the flattened array; each begins at a group and a byte.

    A rotated tensor needs memory for a second copy, in float32.

    Returns:
        One result a piece, computed when asked for; or the reason why the tensor is kept as it is.

    Raises:
        AqError: for weights that are not finite or out of range, unless the config says to keep them.
    """
    quantizer = data_free_quantizer(config, name)
    spec = config.spec_for(array.shape, name)
    if spec.coding.matrices:
        return quantize_matrices(array, config, name, pieces)
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.size == 0:
        count = spec.group_count(array.shape)
        zeros = np.zeros(count if spec.coding.zero_points else 0, np.float32)
        return iter([Quantized(np.empty(0, np.uint8), np.ones(count, np.float32), zeros, 1.0, 0.0)])
    rotated = rotate_rows(to_float32(flat), spec.rotation) if spec.rotation else flat
    grids = cast(Quantizer, quantizer)
    tiled = _tiled(rotated, spec.group_elements(array.shape), spec, grids, config.symmetric)
    # A refusal and the best candidate are known once the whole tensor has been read. One piece is read once; several
    # are read again for their codes, because not all of them may fit in memory.
    whole = tiled.candidates(0, flat.size, keep=len(pieces) == 1)
    best = min(whole, key=lambda candidate: candidate.sums[3])
    scales = best.scales
    # Groups that look like zeros may hold numbers too small for a float32 scale.
    suspicious = not best.sound or ((scales == 1) & (best.zero_points == 0)).any()
    why = refusal(array, spec, scales, name, best.sound) if suspicious else None
    if why is not None:
        if config.on_nonfinite == "error":
            raise AqError(str(why))
        return why
    if len(pieces) == 1:
        return iter([best.finish(spec.coding)])
    index = whole.index(best)
    return (tiled.candidates(start, stop, keep=True)[index].finish(spec.coding) for start, stop in pieces)


def _tiled(flat: np.ndarray, size: int, spec: QuantSpec, quantizer: Quantizer, symmetric: bool) -> TiledQuantizer:
    """Choose the way to quantize a flat tensor whose groups have so many elements."""
    long = size > TILE or spec.quant_axis != 0
    size = min(size, flat.size) if long else size
    _, kernel = choose_kernel("quantize", None, size, spec.coding)
    if long:
        return TilesPerGroup(flat, size, spec, quantizer, symmetric, kernel)
    recipes = recipes_of(quantizer, spec.coding, symmetric, size)
    if recipes and hasattr(kernel, "solve"):
        return NativeGroups(flat, size, spec, recipes)
    return GroupsPerTile(flat, size, spec, quantizer, symmetric, kernel)
