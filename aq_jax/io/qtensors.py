"""Read rows as QTensors, and make rows of QTensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from aq_jax.config import QuantSpec
from aq_jax.core.bitstream import from_stream, to_stream
from aq_jax.core.frameworks import floating_dtype, to_jax_dtype, to_numpy
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import FormatError
from aq_jax.io.dense import decode_as
from aq_jax.store import Row, RowInfo, TableReader, aligned_copy, cut_grids, pieces


def read_packed(table: TableReader, name: str, dtype: Any = None, *, copy: bool = True) -> Any:
    """Read one tensor as a QTensor of NumPy leaves, or as an array if it is not quantized, ready for one transfer."""
    target = floating_dtype(dtype)
    rows = table.read_tensor(name)
    keep = aligned_copy if copy else np.asarray
    if rows[0].quantized:
        return packed_tensor(rows, keep)
    array = to_jax_dtype(decode_as(rows, target, table.path), name)
    return array if array.flags.writeable else keep(array)


def packed_tensor(rows: Sequence[Row], keep: Callable[[np.ndarray], np.ndarray] = np.asarray) -> QTensor:
    """Make a QTensor of NumPy leaves from quantized rows; `keep` copies each array, or not."""
    data = rows[0].data if len(rows) == 1 else np.concatenate([row.data for row in rows])
    scales, zeros = join_grids(rows)
    return from_stream(keep(data), keep(scales), keep(zeros), rows[0].shape, spec_of(rows[0]))


def stored_tensor(rows: Sequence[Row]) -> QTensor:
    """Make a QTensor for another table: of the code of the rows, where `packed_tensor` has another in memory.

    Pieces, whose grids may be several, get the code in memory.
    """
    row, spec = rows[0], spec_of(rows[0])
    if row.code is None or row.code.in_memory is row.code or len(rows) > 1:
        return packed_tensor(rows)
    spec = dataclasses.replace(spec, code=row.code.plain_name)
    return from_stream(row.data, row.scales, row.zero_points, row.shape, spec)


def join_grids(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Join the scales and zero points that all rows of a quantized tensor have in memory.

    Raises:
        FormatError: if the rows of a tensor with one grid have several.
    """
    code = rows[0].code
    assert code is not None  # noqa: S101
    own = [code.memory_grids(row.scales, row.zero_points) for row in rows]
    scales, zeros = (np.concatenate([grids[which] for grids in own]) for which in range(2))
    if rows[0].quant_axis < 0:  # every piece repeats the one grid of the tensor
        if (scales != scales[0]).any() or (zeros != zeros[:1]).any():
            raise FormatError(f"{rows[0].layer_name}: pieces of one grid have scales {scales.tolist()}; wanted one")
        scales, zeros = scales[:1], zeros[:1]
    return scales, zeros


def spec_of(row: Row | RowInfo) -> QuantSpec:
    """Return the numerics of a quantized row in memory."""
    assert row.code is not None  # noqa: S101
    channels, code = row.quant_axis == 0 and not row.group_size, row.code.in_memory
    return QuantSpec(code.bits, channels, row.group_size, row.rotation, code.plain_name)


def packed_rows(name: str, q: QTensor, dtype: str = "float32") -> Iterator[Row]:
    """Make the rows of a QTensor, whose weights had this dtype: its codes as one bit stream, flattened."""
    arrays = {part: getattr(q, part) for part in ("codes", "scale", "zero_point")}
    parts = {part: to_numpy(array, f"{name}.{part}") for part, array in arrays.items() if array is not None}
    stream, scales, zeros = to_stream(dataclasses.replace(q, **parts))
    spec, size = q.spec, q.spec.group_elements(q.shape)
    cuts = pieces(q.shape, dtype, spec.quant_type, spec.quant_axis, spec.group_size)
    for start, stop in cuts:
        # The one grid of a tensor is repeated in each piece; and channels have a grid each even if they are empty.
        data = stream[slice(*spec.coding.span(start, stop, q.shape))]
        row = Row(
            name, q.shape, dtype, data, stop - start, spec.quant_type,
            scales, zeros, spec.quant_axis, spec.group_size, spec.rotation,
        )  # fmt: skip
        if spec.quant_axis == 0 and len(cuts) > 1:
            own = cut_grids(row, start // size, -(-stop // size))
            row = dataclasses.replace(row, scales=own[0], zero_points=own[1])
        yield row
