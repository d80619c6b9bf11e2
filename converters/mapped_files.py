"""View parts of the files in a folder, each of which is mapped once."""

from __future__ import annotations

import numpy as np

from aq_jax.errors import FormatError
from aq_jax.store.folders import Folder
from aq_jax.store.mapping import map_file, release_pages


class MappedFiles:
    """The files of a folder on this machine, mapped when they are first asked for.

    Args:
        folder: The folder.

    >>> import tempfile
    >>> folder = Folder(tempfile.mkdtemp())
    >>> folder.write("a.bin", bytes(range(8)))
    >>> MappedFiles(folder).part("a.bin", 2, 3, "w")
    array([2, 3, 4], dtype=uint8)
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._maps: dict[str, memoryview] = {}

    def part(self, file: str, start: int, size: int, what: str) -> np.ndarray:
        """View some bytes of a file, which are called `what` in errors.

        Raises:
            FormatError: if the file has become shorter.
            OSError: if it cannot be read.
        """
        if not size:
            return np.empty(0, np.uint8)
        if file not in self._maps:
            assert self._folder.local is not None  # noqa: S101
            with (self._folder.local / file).open("rb") as opened:
                self._maps[file] = map_file(opened)
        memory = self._maps[file]
        if start + size > len(memory):
            raise FormatError(f"{self._folder.join(file)}: has become shorter; {what} is past its end")
        return np.frombuffer(memory[start : start + size], np.uint8)

    def release(self) -> None:
        """Give back the memory of what was accessed; see `mapping.release_pages`."""
        for memory in self._maps.values():
            release_pages(memory)
