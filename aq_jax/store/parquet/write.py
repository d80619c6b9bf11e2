"""Write Parquet with checksums in every page, and without statistics and dictionaries, which only cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from aq_jax.store.schema import GROUP_BYTES, LARGE_COLUMNS, METADATA_KEY

if TYPE_CHECKING:
    from pathlib import Path

    from aq_jax.config import Compression

_LEAVES = {"shape": "shape.list.element"}  # Parquet knows a list by its innermost column


class ParquetSink:
    """A Parquet file that is written."""

    def __init__(self, path: Path, schema: pa.Schema, compression: Compression) -> None:
        # zero_points of symmetric rows are one constant, and scales have few mantissa bits: both shrink well.
        codecs: Any = {_LEAVES.get(name, name): "none" for name in schema.names}
        levels: dict[str, int] = {}
        for name in LARGE_COLUMNS:
            if name in codecs and (name != "data" or compression == "zstd"):
                codecs[name], levels[name] = "zstd", 1 if name == "data" else 3
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pq.ParquetWriter(
            self._file,
            schema,
            compression=codecs,
            compression_level=levels or None,
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
            store_schema=False,
            data_page_size=GROUP_BYTES,
        )

    def write(self, batch: pa.RecordBatch) -> None:
        self._writer.write_table(pa.Table.from_batches([batch]), row_group_size=batch.num_rows)

    def finish(self, metadata: bytes) -> None:
        self._writer.add_key_value_metadata({METADATA_KEY: metadata})
        self.close()

    def close(self) -> None:
        self._writer.close()
        self._file.close()
