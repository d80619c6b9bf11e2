"""Read parts of a tensor: only the bytes of requested elements, wherever its rows were cut."""

from __future__ import annotations

from dataclasses import replace
from math import gcd, lcm, prod
from typing import TYPE_CHECKING

import numpy as np

from aq_jax.codes.bits import unpack_codes
from aq_jax.store.decode import decode
from aq_jax.store.layout import group_length
from aq_jax.store.rows import Row, cut_grids, data_span, element_count
from aq_jax.store.schema import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import DTypeLike

    from aq_jax.store.reader import TableReader
    from aq_jax.store.rows import RowInfo

Range = tuple[int, int]
"""(start, stop), in elements of the flattened tensor."""


class PartialTensor:
    """A tensor of which only some elements are read, all of them at construction.

    Args:
        table: The table that holds the tensor.
        name: The tensor's stored name.
        ranges: The ranges of elements that will be requested, in any order.
        groups: The ranges of groups whose scales and zero points will be requested, beside those of the elements.

    Raises:
        KeyError: if no tensor of that name is stored.
        FormatError, IntegrityError: as for `TableReader.read_part`.
    """

    def __init__(self, table: TableReader, name: str, ranges: Iterable[Range], *, groups: Iterable[Range] = ()) -> None:
        infos = table.pieces(name)
        self._path = table.path
        self.info: RowInfo = infos[0]
        self._total = element_count(self.info)
        # Codes that can be read by themselves, and whole blocks of a rotation.
        self._step = lcm(self.info.code.read_step(self.info.shape) if self.info.code else 1, self.info.rotation or 1)
        self._wanted = merged(map(self._widened, ranges))
        # The pieces of a tensor with one grid repeat it.
        self._group = group_length(self.info.shape, self.info.quant_axis, self.info.group_size) or max(self._total, 1)
        grids = merged(groups)
        self.rows: list[Row] = []
        """The rows that were read; only the requested elements of them are valid."""
        self._starts: list[int] = []
        start = 0
        for info in infos:
            stop = start + info.num_params
            inside = _inside(self._wanted, start, stop)
            own = None
            if info.quantized and info.num_params:
                asked = _inside(grids, start // self._group, -(-stop // self._group))
                own = merged([*asked, *((a // self._group, -(-b // self._group)) for a, b in inside)])
            if inside or own or not info.num_params:
                self.rows.append(table.read_part(info.position, inside, own))
                self._starts.append(start)
            start = stop

    def values(self, start: int, stop: int) -> np.ndarray:
        """Decode elements into a read-only view of the file, or new memory.

        Raises:
            FormatError: as for `decode`.
        """
        first, last = self._widened((start, stop))
        rows = self._cut(first, last)
        if not rows:
            return np.empty(0, np.float32 if self.info.quantized else DTYPES[self.info.dtype])
        return decode(rows, self._path).reshape(-1)[start - first : stop - first]

    def codes(self, start: int, stop: int) -> np.ndarray:
        """Unpack codes of a quantized tensor to int8."""
        first, last = self._widened((start, stop))
        found = [unpack_codes(row.data, row.bits or 8, row.num_params) for row in self._cut(first, last)]
        return _joined(found, np.int8)[start - first : stop - first]

    def stream(self, start: int, stop: int) -> np.ndarray:
        """Return the stored bytes of codes, uint8; start and stop must be at whole bytes."""
        return _joined([row.data for row in self._cut(start, stop)], np.uint8)

    def grids(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the scales and zero points of requested groups, for a tensor with several grids."""
        scales, zeros = [], []
        for row, offset in zip(self.rows, self._starts, strict=True):
            first = offset // self._group
            own = cut_grids(row, max(start - first, 0), max(stop - first, 0))
            scales.append(own[0])
            zeros.append(own[1])
        kinds = self.info.column_dtype("scales"), self.info.column_dtype("zero_points")
        return _joined(scales, kinds[0]), _joined(zeros, kinds[1])

    def _widened(self, part: Range) -> Range:
        start, stop = part
        return start // self._step * self._step, min(-(-stop // self._step) * self._step, self._total)

    def _cut(self, start: int, stop: int) -> list[Row]:
        """Cut rows down to just these elements."""
        if start < stop and not any(a <= start and stop <= b for a, b in self._wanted):
            raise ValueError(f"{self.info.layer_name}: elements {start} to {stop} were not asked for")
        found: list[Row] = []
        for row, offset in zip(self.rows, self._starts, strict=True):
            first, last = max(start - offset, 0), min(stop - offset, row.num_params)
            if first < last:
                found.append(_shortened(row, first, last, stop - start))
        return found


def _inside(ranges: Iterable[Range], start: int, stop: int) -> list[Range]:
    """Intersect ranges with start to stop, and count from start."""
    return [(max(a, start) - start, min(b, stop) - start) for a, b in ranges if a < stop and start < b]


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Merge ranges into ascending ones that do not touch.

    >>> merged([(4, 6), (0, 2), (5, 9), (2, 3), (7, 7)])
    [(0, 3), (4, 9)]
    """
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        elif start < stop:
            found.append((start, stop))
    return found


def _shortened(row: Row, start: int, stop: int, total: int) -> Row:
    """Cut a row down to some of its elements, as part of a tensor of `total` elements.

    Groups that begin or end inside are split into equal ones, as long as possible.
    """
    first, last = data_span(row, start, stop)
    if row.code is None:
        return replace(row, shape=(total,), data=row.data[first:last], num_params=stop - start)
    length = group_length(row.shape, row.quant_axis, row.group_size) or max(row.num_params, 1)
    size = gcd(start, length)
    if size == length:
        scales, zeros = cut_grids(row, start // length, -(-stop // length))
    else:
        groups = np.arange(start, stop, size) // length
        scales, zeros = row.scales[groups], row.zero_points[groups] if row.zero_points.size else row.zero_points
    return replace(
        row,
        shape=_shortened_shape(row.shape, total),
        data=row.data[first:last],
        num_params=stop - start,
        scales=scales,
        zero_points=zeros,
        quant_axis=0,
        group_size=size,
    )


def _shortened_shape(shape: Sequence[int], total: int) -> tuple[int, ...]:
    """Keep as many of the last axes as divide so many elements, up to those of a matrix."""
    for axes in (2, 1):
        inner = prod(shape[-axes:])
        if len(shape) > axes and total % inner == 0:
            return total // inner, *shape[-axes:]
    return (total,)


def _joined(parts: Sequence[np.ndarray], dtype: DTypeLike) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, dtype)
