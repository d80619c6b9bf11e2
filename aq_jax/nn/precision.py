"""Round embeddings to fewer bits, by sentence-transformers' definitions."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Integer

from aq_jax.errors import AqError

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]


def check_precision(precision: str) -> None:
    """Check the name of a precision.

    Raises:
        AqError: for another.
    """
    if precision not in get_args(Precision):
        raise AqError(f"precision = {precision!r}; wanted one of {', '.join(get_args(Precision))}")


def quantize_embeddings(
    embeddings: Float[np.ndarray, "texts width"],
    precision: Precision,
    ranges: Float[np.ndarray, "2 width"] | None = None,
) -> Integer[np.ndarray, "texts numbers"] | Float[np.ndarray, "texts width"]:
    """Round embeddings.

    Args:
        embeddings: The embeddings.
        precision: "int8" and "uint8" number 256 levels between the ends of a dimension's range; "binary" and "ubinary"
            keep a bit that says whether a number is above 0, eight in a byte, the first in its highest bit; "float32"
            keeps all.
        ranges: The least and the largest number of each dimension; by default those of these embeddings.

    Raises:
        AqError: for another precision, and for ranges of fewer than two embeddings.

    >>> some = np.array([[0.0, -1.0], [1.0, 1.0], [0.5, 3.0]], np.float32)
    >>> quantize_embeddings(some, "int8").tolist()
    [[-128, -128], [126, -1], [-1, 126]]
    >>> quantize_embeddings(some, "ubinary").tolist()
    [[0], [192], [192]]
    """
    check_precision(precision)
    if precision == "float32":
        return embeddings
    if precision in ("binary", "ubinary"):
        bits = np.packbits(embeddings > 0, axis=-1)
        return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    if ranges is None:
        if len(embeddings) == 1:
            raise AqError(f"precision = {precision!r}: found one embedding, which has no ranges; wanted two or more")
        ranges = np.stack([embeddings.min(0), embeddings.max(0)]) if len(embeddings) else np.zeros((2, 1), np.float32)
    least, most = ranges.astype(np.float32)
    steps = (most - least) / np.float32(255)
    levels = np.clip(np.floor((embeddings - least) / np.where(steps == 0, np.float32(1), steps)), 0, 255)
    return levels.astype(np.uint8) if precision == "uint8" else (levels - 128).astype(np.int8)
