"""Read tables as sources: a file, or a folder of shards."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from aq_jax.conversion.sidefiles import RECORD, SideFiles, is_same_folder, side_files, side_files_beside
from aq_jax.conversion.source import Source
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import FormatError
from aq_jax.io.qtensors import stored_tensor
from aq_jax.store import DTYPES, RowInfo, TableReader, decode, open_table
from aq_jax.store.casts import saturated
from aq_jax.store.folders import Folder
from aq_jax.store.manifest import MANIFEST, read_manifest
from aq_jax.store.rows import row_bytes

# The entries of a table's config that say how its codes were made.
_OF_CODES = ("quantization", "quantized_by", "calibration", "allocation", "training", "encoder", RECORD)
# The fields that the pieces of one tensor share; each piece has its own cosine and error.
_TENSOR_FIELDS = ("dtype", "quant_type", "solver")
_ROW_FIELDS = (*_TENSOR_FIELDS, "cosine", "rel_mse")


class TableSource(Source):
    """A table as a source.

    Args:
        table: An open table.
        packed: Whether quantized rows become QTensors, and float16 rows stay float16; otherwise all is dequantized to
            its dtype before quantization.
    """

    def __init__(self, table: TableReader, packed: bool = False) -> None:
        self._table, self._packed = table, packed
        path = table.path
        infos = {name: table.pieces(name) for name in table.names}
        shapes = {name: (first.shape, DTYPES[first.dtype]) for name, (first, *_) in infos.items()}
        super().__init__(Folder(path if path.is_dir() else path.parent), shapes, table.aliases, table.files)
        self.quantized = {n: str(first.quant_type) for n, (first, *_) in infos.items() if first.quantized}
        sizes = {name: sum(sum(row_bytes(piece).values()) for piece in pieces) for name, pieces in infos.items()}
        self._sizes = sizes if packed else {}
        self._config = table.config
        # What is of codes goes with them; what else a table says stays.
        self.provenance = {key: value for key, value in self._config.items() if packed or key not in _OF_CODES}
        if packed:
            self.row_metadata = {name: _row_metadata(pieces) for name, pieces in infos.items()}

    def read(self, name: str) -> np.ndarray | QTensor:
        rows = self._table.read_tensor(name)
        if self._packed and rows[0].quantized:
            return stored_tensor(rows)
        if self._packed and rows[0].quant_type == "fp16":
            data = np.concatenate([row.data for row in rows])
            return data.view(np.float16).reshape(rows[0].shape)
        array = decode(rows, self._table.path)
        return array if self._packed else saturated(array, self.shapes[name][1])

    def nbytes(self, name: str) -> int:
        return self._sizes[name] if self._packed else super().nbytes(name)

    def read_memory(self, name: str) -> int:
        return 2 * self.nbytes(name)  # a row's bytes, and the tensor's

    def check_target(self, target: Folder) -> None:
        """Refuse to write a table among the source's own: it would replace one of them, or be read as one."""
        if self._table.path.is_dir() and is_same_folder(self.folder, target):
            raise FormatError(
                f"{target}: is in {self.folder}, which is the source; wanted another folder, or one below it"
            )

    def side_files(self, target: Folder) -> SideFiles:
        path = self._table.path
        if path.is_dir() and (shards := read_manifest(path)):  # the folder holds one model and nothing else
            return side_files(self.folder, target, {MANIFEST, *(shard.file for shard in shards)})
        return side_files_beside(self.folder, self._config.get(RECORD), target)


@contextmanager
def open_tables(path: str | os.PathLike[str], packed: bool = False) -> Iterator[TableSource]:
    """Open a table, or a folder of them, as a source.

    Raises:
        FileNotFoundError, FormatError, IntegrityError: as `store.open_table`.
    """
    with open_table(Path(path)) as table:
        yield TableSource(table, packed)


def _row_metadata(pieces: Sequence[RowInfo]) -> dict[str, Any]:
    fields = _TENSOR_FIELDS if len(pieces) > 1 else _ROW_FIELDS
    return {key: value for key in fields if (value := getattr(pieces[0], key)) is not None}
