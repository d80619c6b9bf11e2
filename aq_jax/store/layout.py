"""Count the bytes, groups and pieces of a tensor: integer arithmetic before anything is allocated."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from aq_jax.codes import CODES
from aq_jax.store.schema import DTYPES, PIECE_BYTES, WHOLE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence


def column_bytes(
    count: int,
    shape: Sequence[int],
    dtype: str,
    quant_type: str | None,
    quant_axis: int = -1,
    group_size: int = 0,
) -> dict[str, int]:
    """Count the bytes of `count` elements of a tensor in each of the three large columns.

    >>> column_bytes(231, (7, 33), "float32", "int2", 0, 128), column_bytes(231, (7, 33), "bfloat16", None)["data"]
    ({'data': 58, 'scales': 8, 'zero_points': 8}, 462)
    """
    code = CODES.get(quant_type or "")
    if code is None:
        return {"data": count * DTYPES[stored_dtype(dtype, quant_type)].itemsize, "scales": 0, "zero_points": 0}
    groups = group_count(count, shape, quant_axis, group_size)
    return {
        "data": code.data_bytes(count, shape),
        "scales": code.grid_count(groups) * DTYPES[code.grid_dtype].itemsize,
        "zero_points": code.zero_count(groups) * DTYPES[code.zero_dtype].itemsize if code.zero_points else 0,
    }


def stored_dtype(dtype: str, quant_type: str | None) -> str:
    """Return the dtype of an unquantized row's bytes: `fp16` and `fp32` rows override `dtype`."""
    return {"fp16": "float16", "fp32": "float32"}.get(quant_type or "", dtype)


def group_length(shape: Sequence[int], quant_axis: int, group_size: int) -> int:
    """Count the elements that share one scale; 0 means all of them (per tensor)."""
    if group_size:
        return group_size
    return prod(shape[1:]) if quant_axis == 0 else 0


def group_count(count: int, shape: Sequence[int], quant_axis: int, group_size: int) -> int:
    """Count the scales of a row that holds `count` elements of a tensor of this shape.

    >>> group_count(231, (7, 33), 0, 128), group_count(231, (7, 33), 0, 0), group_count(231, (7, 33), -1, 0)
    (2, 7, 1)
    """
    length = group_length(shape, quant_axis, group_size)
    if length:
        return -(-count // length)
    return shape[0] if quant_axis == 0 and not group_size else 1


def cut_step(shape: Sequence[int], quant_type: str | None, quant_axis: int, group_size: int) -> int:
    """Return the number of elements at whose multiples pieces of a tensor start: whole groups and whole bytes."""
    code = CODES.get(quant_type or "")
    return 8 if code is None else code.cut_step(group_length(shape, quant_axis, group_size) or 1, shape)


def pieces(
    shape: Sequence[int],
    dtype: str,
    quant_type: str | None = None,
    quant_axis: int = -1,
    group_size: int = 0,
    *,
    limit: int = WHOLE_BYTES,
) -> list[tuple[int, int]]:
    """Cut a tensor into rows: (start, stop) in elements of the flattened tensor.

    >>> pieces((10, 10), "float32")
    [(0, 100)]
    >>> pieces((10, 10), "float32", "int2", 0, 12, limit=200)
    [(0, 48), (48, 96), (96, 100)]

    Args:
        limit: The bytes, in the tensor's own dtype, above which it is cut; a piece exceeds it only if one step does.
            If groups are so short that their scales take more, the bytes of scales count.
    """
    total, itemsize = prod(shape), DTYPES[dtype].itemsize
    if quant_type in CODES and (length := group_length(shape, quant_axis, group_size)):
        itemsize = max(itemsize, -(-4 // length))
    if total * itemsize <= limit:
        return [(0, total)]
    step = cut_step(shape, quant_type, quant_axis, group_size)
    size = max(min(limit, PIECE_BYTES) // itemsize // step, 1) * step
    return [(start, min(start + size, total)) for start in range(0, total, size)]
