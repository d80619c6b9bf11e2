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


def column_level(name: str, compression: Compression) -> int | None:
    """Return the level of zstd with which a column is compressed; None for one that is stored as it is."""
    # zero_points of symmetric rows are one constant, and scales have few mantissa bits: both shrink well.
    if name not in LARGE_COLUMNS or (name == "data" and compression == "none"):
        return None
    return 1 if name == "data" else 3


def stored_bytes(name: str, values: bytes, compression: Compression) -> int:
    """Count the bytes that a column's values take in a file."""
    level = column_level(name, compression)
    if level is None:
        return len(values)
    return len(pa.Codec("zstd", compression_level=level).compress(values, asbytes=True))


class ParquetSink:
    """A Parquet file that is written."""

    def __init__(self, path: Path, schema: pa.Schema, compression: Compression) -> None:
        codecs: Any = {_LEAVES.get(name, name): "none" for name in schema.names}
        levels: dict[str, int] = {}
        for name in schema.names:
            if (level := column_level(name, compression)) is not None:
                codecs[name], levels[name] = "zstd", level
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
