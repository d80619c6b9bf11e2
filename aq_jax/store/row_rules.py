"""Check every rule that a row must follow, alone and in the order of a table.

Sizes are Python integers, so that no claim in a file can overflow, and they are compared before anything is allocated.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from operator import index
from typing import TYPE_CHECKING

import numpy as np

from aq_jax.codes import CODES
from aq_jax.errors import FormatError
from aq_jax.store.layout import cut_step
from aq_jax.store.rows import Row, cut_grids, describe, element_count, row_bytes, row_location
from aq_jax.store.schema import (
    DTYPES,
    MAX_AXES,
    MAX_VALUE_BYTES,
    READ_TYPES,
    ROTATIONS,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aq_jax.codes import Code
    from aq_jax.store.rows import Row, RowInfo

_LARGEST_ITEM = max(dtype.itemsize for dtype in DTYPES.values())


def check(row: Row | RowInfo, where: str) -> None:
    """Refuse a row that breaks a rule of the format; `where` names file and row, see `row_location`.

    Raises:
        FormatError: naming the row, what was found and what was wanted.
    """
    for violation in _violations(row):  # the first is enough: later rules rest on earlier ones
        raise FormatError(f"{where}: {violation}")


def check_arrays(row: Row, where: str, looked_at: Sequence[tuple[int, int]] | None) -> None:
    """Check a row's arrays; its other cells are checked already.

    Args:
        row: The row with all its bytes.
        where: The row's location, for errors.
        looked_at: The ranges of groups whose scales and zero points may be read; None for all.
    """
    for violation in _array_violations(row, looked_at):
        raise FormatError(f"{where}: {violation}")


def _violations(row: Row | RowInfo) -> Iterator[str]:
    if not is_name(row.layer_name):
        yield "layer_name must be a non-empty string of valid Unicode"
    if len(row.shape) > MAX_AXES:
        yield f"shape has {len(row.shape)} axes, at most {MAX_AXES} are allowed"
    shape = tuple(map(index, row.shape))  # integers of NumPy would overflow, and be remembered as equal
    if why := _layout_violation(
        row.code, shape, row.dtype, row.num_params, row.quant_type, row.quant_axis, row.group_size, row.rotation
    ):
        yield why
    if row.digest is not None and len(row.digest) != 32:
        yield f"digest holds {len(row.digest)} bytes, not 32"
    if isinstance(row, Row):
        yield from _array_violations(row)


@lru_cache(1024)  # a model's layers have few layouts, and each row is asked about
def _layout_violation(
    code: Code | None,
    shape: tuple[int, ...],
    dtype: str,
    num_params: int,
    quant_type: str | None,
    axis: int,
    size: int,
    rotation: int,
) -> str:
    """Say which rule a row's small cells break, the first one; "" if none."""
    total = prod(shape)
    if dtype not in DTYPES:
        return f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}"
    if quant_type is not None and code is None and quant_type not in READ_TYPES:
        return f"unknown quant_type {quant_type[:60]!r}; known are {', '.join((*CODES, *READ_TYPES))}"
    if not all(0 <= n < 2**31 for n in shape):
        return f"shape {list(shape)} has an axis outside 0 to 2^31 - 1"
    # An empty axis must not hide the size of the others: NumPy refuses such shapes too.
    if prod(max(n, 1) for n in shape) * _LARGEST_ITEM >= 2**63:
        return f"shape {list(shape)} is too large for any memory"
    if not 0 < num_params <= total and num_params != total:
        return f"num_params is {num_params}, shape {list(shape)} has {total} elements"
    if code is None:
        if (axis, size) != (-1, 0):
            return f"quant_axis is {axis} and group_size {size}, but an unquantized row has -1 and 0"
        return f"rotation is {rotation}, which {quant_type} rows do not have" if rotation else ""
    if not ((axis in (-1, 0) and size == 0) or (axis == 0 and size > 0)):
        return (
            f"quant_axis is {axis} and group_size {size}: must be -1 and 0 (per tensor), 0 and 0 (per channel), "
            "or 0 and a positive size (per group)"
        )
    if (axis, size) == (0, 0) and not shape:
        return "a tensor without axes cannot be quantized per channel; use quant_axis -1"
    if why := code.refuses_layout(shape, axis, size):
        return why
    if code.name != code.plain_name or (rotation and code.name == code.rotated_name):
        length = shape[-1] if shape else 1
        if rotation not in ROTATIONS or length % rotation:
            wanted = f"a power of two from {ROTATIONS[0]} to {ROTATIONS[-1]} that divides the last axis"
            return f"rotation is {rotation}, {quant_type} of shape {list(shape)} needs {wanted}"
        return ""
    return f"rotation is {rotation}, which {quant_type} rows do not have" if rotation else ""


def _array_violations(row: Row, looked_at: Sequence[tuple[int, int]] | None = None) -> Iterator[str]:
    for column, wanted in row_bytes(row).items():
        values: np.ndarray = getattr(row, column)
        kind = row.column_dtype(column)
        if values.dtype != kind or values.ndim != 1:
            yield f"{column} must be a {kind.name} array of one axis, not {values.dtype} {list(values.shape)}"
        if values.nbytes != wanted:
            yield f"{column} holds {values.nbytes} bytes, {describe(row)} needs {wanted}"
        if wanted > MAX_VALUE_BYTES:
            yield f"{column} holds {wanted} bytes, one value may hold {MAX_VALUE_BYTES}; store pieces, see `pieces`"
    if row.code is None or not row.scales.size + row.zero_points.size:
        return
    grids = [(row.scales, row.zero_points)]
    if looked_at is not None:
        grids = [cut_grids(row, start, stop) for start, stop in looked_at]
    for scales, zeros in grids:
        if scales.size + zeros.size and (why := row.code.refuses_grids(scales, zeros)):
            yield why


def is_name(name: object) -> bool:
    """Return whether a tensor may have that name."""
    try:
        return isinstance(name, str) and bool(name) and bool(name.encode())
    except UnicodeEncodeError:
        return False


class RowOrder:
    """A check of rows in order: names must be distinct, and pieces complete, adjacent and alike.

    >>> order = RowOrder()
    >>> order.add(Row("a", (2,), "float32", np.zeros(8, np.uint8), 2), "t", 0)
    >>> order.finish("t")
    >>> order.names
    ['a']
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._seen: set[str] = set()
        self._first: Row | RowInfo | None = None
        self._missing = 0

    def add(self, row: Row | RowInfo, where: str, position: int) -> None:
        """Check the next row.

        Raises:
            FormatError: if the name was there before, or pieces are missing, misplaced or unlike each other.
        """
        here = row_location(where, position, row.layer_name)
        if self._missing and self._first is not None and row.layer_name == self._first.layer_name:
            self._add_piece(row, self._first, here)
        else:
            self._refuse_missing(here)
            if row.layer_name in self._seen:
                raise FormatError(f"{here}: the name already exists; only adjacent pieces of one tensor may share one")
            self._seen.add(row.layer_name)
            self.names.append(row.layer_name)
            self._first, self._missing = row, element_count(row) - row.num_params
        step = cut_step(row.shape, row.quant_type, row.quant_axis, row.group_size)
        if self._missing and row.num_params % step:
            raise FormatError(
                f"{here}: piece of {row.num_params} elements; all pieces but the last must be a multiple of {step}"
            )

    def finish(self, where: str) -> None:
        """Check, after the last row, that no piece is missing."""
        self._refuse_missing(f"{where}: end of the table")

    def _add_piece(self, row: Row | RowInfo, first: Row | RowInfo, here: str) -> None:
        for key in ("shape", "dtype", "quant_type", "quant_axis", "group_size", "rotation"):
            found, wanted = getattr(row, key), getattr(first, key)
            if found != wanted:
                raise FormatError(f"{here}: {key} is {found}, but the tensor's first piece has {wanted}")
        if row.num_params > self._missing:
            raise FormatError(f"{here}: piece of {row.num_params} elements, but the tensor lacks only {self._missing}")
        self._missing -= row.num_params

    def _refuse_missing(self, here: str) -> None:
        if self._missing and self._first is not None:
            raise FormatError(
                f"{here}: {self._first.layer_name} still lacks {self._missing} of {element_count(self._first)} "
                "elements; its pieces must be adjacent rows"
            )
