"""Map tensors that lie in files as plain bytes; fetch them one at a time if the files are elsewhere."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np

from aq_jax.conversion.source import Opener, Source
from aq_jax.converters.mapped_files import MappedFiles
from aq_jax.io.tensorfile import Extent
from aq_jax.store import DTYPES
from aq_jax.store.folders import Folder
from aq_jax.store.mapping import map_file


class MappedTensors(Source):
    """A source of tensors whose extents are known.

    Args:
        folder: The folder that holds the files.
        extents: The extents by the tensors' names, in order.
        aliases: Tied tensors: name -> stored name.

    >>> from pathlib import Path
    >>> folder = Folder(tempfile.mkdtemp())
    >>> folder.write("a.bin", np.arange(4, dtype=np.float32).tobytes())
    >>> MappedTensors(folder, {"w": Extent("a.bin", 4, (2,), "float32")}).read("w")
    array([1., 2.], dtype=float32)
    """

    def __init__(
        self, folder: Folder, extents: Mapping[str, Extent] | None = None, aliases: Mapping[str, str] | None = None
    ) -> None:
        self.extents = dict(extents or {})
        shapes = {name: (extent.shape, DTYPES[extent.dtype]) for name, extent in self.extents.items()}
        super().__init__(folder, shapes, aliases)
        self._maps = MappedFiles(folder)

    def read_memory(self, name: str) -> int:
        return 0  # it is mapped

    def opener(self, names: Collection[str]) -> Opener:
        extents = {name: self.extents[name] for name in names}
        return partial(_open_extents, self.folder.absolute, extents, self.aliases)

    def file_states(self) -> list[list[object]]:
        self.files = {extent.file for extent in self.extents.values()}
        return super().file_states()

    def read(self, name: str) -> np.ndarray:
        """Read one tensor: a read-only view of its file, or of its fetched bytes.

        Fetched bytes lie in a temporary file (TMPDIR says where), not in memory, and go when the view does.

        Raises:
            FormatError: if the file has become shorter.
            OSError: if it cannot be read.
        """
        extent = self.extents[name]
        if extent.size and self.folder.local is None:
            with tempfile.TemporaryFile() as file:
                self.folder.copy_range(extent.file, extent.offset, extent.size, file)
                file.flush()
                raw = np.frombuffer(map_file(file), np.uint8)
        else:
            raw = self._maps.part(extent.file, extent.offset, extent.size, name)
        return raw.view(DTYPES[extent.dtype]).reshape(extent.shape)

    def release(self) -> None:
        self._maps.release()


@contextmanager
def _open_extents(location: str, extents: Mapping[str, Extent], aliases: Mapping[str, str]) -> Iterator[MappedTensors]:
    """Open the tensors whose extents another process found."""
    yield MappedTensors(Folder(location), extents, aliases)
