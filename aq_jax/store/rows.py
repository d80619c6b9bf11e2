"""Define the rows of a table, and the bytes that each needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np

from aq_jax.codes import CODES, Code
from aq_jax.store.layout import column_bytes, stored_dtype
from aq_jax.store.schema import DTYPES

_NO_FLOATS = np.empty(0, np.float32)


def _no_floats() -> np.ndarray:
    return _NO_FLOATS


class _Derived:
    """The properties that follow from a row's `quant_type`."""

    __slots__ = ()
    quant_type: str | None

    @property
    def code(self) -> Code | None:
        """The code of `data`; None if the row is not quantized."""
        return CODES.get(self.quant_type or "")

    @property
    def bits(self) -> int | None:
        """The bits of a code; None if the row is not quantized."""
        return None if self.code is None else self.code.bits

    def column_dtype(self, column: str) -> np.dtype:
        """Return the dtype of one of the three large columns."""
        if column == "data":
            return DTYPES["uint8"]
        if self.code is None:
            return DTYPES["float32"]
        return DTYPES[self.code.zero_dtype if column == "zero_points" else self.code.grid_dtype]

    @property
    def quantized(self) -> bool:
        """Tell whether `data` holds codes."""
        return self.code is not None


@dataclass(frozen=True, slots=True, eq=False)
class Row(_Derived):
    """One row: a tensor, or a piece of one.

    >>> row = Row("bias", (2,), "float32", np.zeros(8, np.uint8), 2)
    >>> row.quantized, row.bits
    (False, None)
    """

    layer_name: str
    shape: tuple[int, ...]
    """The whole tensor's shape, also in a piece."""
    dtype: str
    """The tensor's dtype before quantization: a canonical name."""
    data: np.ndarray
    """uint8, one axis: codes or raw bytes."""
    num_params: int
    """The number of elements in this row."""
    quant_type: str | None = None
    """None in a V1 row."""
    scales: np.ndarray = field(default_factory=_no_floats)
    zero_points: np.ndarray = field(default_factory=_no_floats)
    quant_axis: int = -1
    group_size: int = 0
    rotation: int = 0
    solver: str | None = None
    cosine: float | None = None
    rel_mse: float | None = None
    digest: bytes | None = None


@dataclass(frozen=True, slots=True)
class RowInfo(_Derived):
    """A row without its arrays, which an open table knows."""

    layer_name: str
    shape: tuple[int, ...]
    dtype: str
    num_params: int
    position: int
    """Index of the row in the table, or in the folder of tables."""
    disk_bytes: int
    """The bytes of data, scales and zero_points on disk."""
    quant_type: str | None = None
    quant_axis: int = -1
    group_size: int = 0
    rotation: int = 0
    solver: str | None = None
    cosine: float | None = None
    rel_mse: float | None = None
    digest: bytes | None = None


class Sealed(NamedTuple):
    """The cells of a written row that the table's metadata seals; see `digest.statistics_digest`."""

    digest: bytes | None
    solver: str | None
    cosine: float | None
    rel_mse: float | None


def row_location(where: str, position: int, name: str) -> str:
    """Name a row in an error text.

    >>> row_location("model.parquet", 17, "bias")
    'model.parquet: row 17 (bias)'
    """
    return f"{where}: row {position} ({name if len(name) <= 60 else name[:59] + '…'})"


def element_count(row: Row | RowInfo) -> int:
    """Count the elements of the whole tensor."""
    return prod(row.shape)


def describe(row: Row | RowInfo) -> str:
    """Describe a row's layout in a few words, for error texts."""
    part = "" if row.num_params == element_count(row) else f" (piece of {row.num_params} elements)"
    return f"shape {list(row.shape)} {row.quant_type or row.dtype}{part}"


def row_bytes(row: Row | RowInfo) -> dict[str, int]:
    """Count the bytes that each of the three large columns must hold for this row."""
    return column_bytes(row.num_params, row.shape, row.dtype, row.quant_type, row.quant_axis, row.group_size)


def data_span(row: Row | RowInfo, start: int, stop: int) -> tuple[int, int]:
    """Find the bytes of `data` that hold these elements; codes are read at multiples of their `read_step`."""
    if row.code is not None:
        return row.code.span(start, stop, row.shape)
    size = DTYPES[stored_dtype(row.dtype, row.quant_type)].itemsize
    return start * size, stop * size


def cut_grids(row: Row, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut out the scales and zero points of groups `start` to `stop` of a quantized row."""
    assert row.code is not None  # noqa: S101
    scales, zeros = row.scales[row.code.grid_count(start) : row.code.grid_count(stop)], row.zero_points
    return scales, row.code.cut_zeros(zeros, start, stop) if zeros.size else zeros
