"""Write Arrow IPC uncompressed, so that it can be mapped; the metadata belongs to a last, empty batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from aq_jax.store.schema import METADATA_KEY

if TYPE_CHECKING:
    from pathlib import Path

    from aq_jax.config import Compression


class IpcSink:
    """An Arrow IPC file that is written; it is never compressed."""

    def __init__(self, path: Path, schema: pa.Schema, compression: Compression) -> None:
        self._schema = schema
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, schema)

    def write(self, batch: pa.RecordBatch) -> None:
        self._writer.write_batch(batch)

    def finish(self, metadata: bytes) -> None:
        empty = pa.RecordBatch.from_pylist([], schema=self._schema)
        self._writer.write_batch(empty, custom_metadata={METADATA_KEY: metadata})
        self.close()

    def close(self) -> None:
        self._writer.close()
        self._file.close()
