"""Collect rows into a record batch: their bytes in one block, all other cells in lists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from aq_jax.store.schema import written_dtype

if TYPE_CHECKING:
    from aq_jax.store.rows import Row


class Batch:
    """Rows that are written together.

    Args:
        schema: The schema of the table.
        data: The block of the rows' `data`, a byte array of one axis: as large as all of them, or larger.
    """

    def __init__(self, schema: pa.Schema, data: np.ndarray) -> None:
        self._schema, self._data = schema, data
        self._cells: dict[str, list[Any]] = {name: [] for name in schema.names if name != "data"}
        self._ends = [0]
        self.nbytes = 0
        """The bytes of the rows in the large columns."""

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, row: Row, digest: bytes, copy: bool = True) -> None:
        """Add a row with its digest; its `data` is copied, unless it is in the block already."""
        start, stop = self._ends[-1], self._ends[-1] + row.data.nbytes
        if copy:
            self._data[start:stop] = row.data
        self._ends.append(stop)
        self.nbytes += row.data.nbytes + row.scales.nbytes + row.zero_points.nbytes
        for name, cells in self._cells.items():
            if name == "digest":
                cells.append(digest)
            elif name == "dtype":
                cells.append(written_dtype(row.dtype))
            elif name in ("scales", "zero_points"):
                cells.append(getattr(row, name).tobytes())
            else:
                cells.append(getattr(row, name))

    def to_arrow(self) -> pa.RecordBatch:
        """Make a record batch over the block, without a copy."""
        offsets = np.array(self._ends, np.int32)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(self._data[: self._ends[-1]])]
        data = pa.BinaryArray.from_buffers(pa.binary(), len(self), buffers)
        arrays = [
            data if column.name == "data" else pa.array(self._cells[column.name], column.type)
            for column in self._schema
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=self._schema)
