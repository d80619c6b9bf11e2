"""Read mapped Arrow IPC files; a record batch is a group of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from aq_jax.errors import FormatError
from aq_jax.store.columns import Columns, byte_views, check_columns, gather
from aq_jax.store.ipc.wire import check_messages
from aq_jax.store.limits import check_expansion, check_rows, check_widths, large_limits, own_metadata, small_limit
from aq_jax.store.schema import LARGE_COLUMNS, V2

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class IpcContainer:
    """A mapped Arrow IPC file."""

    maps_grids = True

    def __init__(self, data: memoryview, where: str) -> None:
        self._where = where
        self.doubts: list[str] = []
        self._bytes, self._size = data, len(data)
        self._source = pa.BufferReader(pa.py_buffer(data))
        try:
            self._describe()
        except BaseException:
            self.close()
            raise

    def _describe(self) -> None:
        messages = self._messages = check_messages(self._bytes, self._where)
        check_rows(self._where, sum(message.rows for message in messages), self._size)
        schema = pa.ipc.open_file(self._source).schema
        self.is_v2 = check_columns(schema, self._where)
        check_widths(self._where, schema, sum(message.rows for message in messages), self._size)
        self._small = self._reader(
            [name for name in V2.names if name in schema.names and name not in LARGE_COLUMNS], schema
        )
        self.names = schema.names
        self._heavy = self._reader([name for name in LARGE_COLUMNS if name in schema.names], schema)
        self._views = pa.ipc.open_file(self._source)
        count = self._small.num_record_batches
        self.metadata: bytes | None = None
        self._batches: list[pa.RecordBatch | None] = []
        for index in range(count):
            try:
                read = self._small.get_batch_with_custom_metadata(index)
            except (pa.ArrowException, OSError, ValueError) as error:
                start, stop = self.extent(index, "")
                self.doubts.append(f"record batch {index}, bytes {start} to {stop}, is damaged: {str(error)[:200]}")
                self._batches.append(None)
                continue
            self._batches.append(read.batch)
            if index == count - 1 and read.batch.num_rows == 0:
                self.metadata = own_metadata(dict(read.custom_metadata or {}), self.doubts)
                if self.metadata is None and count > 1 and not self.doubts:
                    self.doubts.append("its last record batch is empty, and its metadata is lost to some damage")
        self.group_rows = tuple(
            message.rows if batch is None else batch.num_rows
            for batch, message in zip(self._batches, messages, strict=True)
        )
        check_rows(self._where, sum(self.group_rows), self._size)

    def _reader(self, names: Sequence[str], schema: pa.Schema) -> pa.ipc.RecordBatchFileReader:
        indices = sorted(schema.names.index(name) for name in names)
        return pa.ipc.open_file(self._source, options=pa.ipc.IpcReadOptions(included_fields=indices, use_threads=False))

    def read_small(self) -> Columns:
        rows = sum(self.group_rows)
        batches = [batch for batch in self._batches if batch is not None]
        return gather(batches, dict.fromkeys(V2.names, small_limit(rows)))

    def read_small_column(self, group: int, column: str) -> list[pa.Array]:
        batch = self._batches[group]
        if batch is None:
            raise ValueError(f"record batch {group} is damaged")
        return gather([batch.select([column])], {column: small_limit(batch.num_rows)}).get(column, [])

    def extent(self, group: int, column: str) -> tuple[int, int]:
        return self._messages[group].start, self._messages[group].end

    def read_large(self, group: int, needs: Mapping[str, int], checksums: bool) -> Columns:
        # A reader of some columns copies them, one of all columns gives views of the file.
        batch = (self._heavy if "data" in needs else self._views).get_batch(group).select(list(needs))
        if batch.num_rows != self.group_rows[group]:
            raise FormatError(f"{self._where}: record batch {group} changed while it was read; read it again")
        return gather([batch], large_limits(needs, batch.num_rows))

    def mapped(self, group: int) -> list[np.ndarray] | None:
        file = np.frombuffer(self._bytes, np.uint8)
        start, stop = file.ctypes.data, file.ctypes.data + file.size
        column = self._views.get_batch(group).column("data")
        column.validate(full=True)
        if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
            return None
        views = [view for view in byte_views(column) if view is not None]
        # What was decompressed is elsewhere.
        inside = all(start <= view.ctypes.data <= stop - view.size for view in views if view.size)
        return views if inside and len(views) == self.group_rows[group] else None

    def disk_bytes(self, group: int, column: str) -> int | None:
        return None

    def check_capacity(self, needs: Mapping[str, int]) -> None:
        for name, need in needs.items():
            check_expansion(self._where, name, need, self._size)

    def close(self) -> None:
        self._source.close()
