"""Give access to stored weights: tensors by name, one at a time, their metadata, and the files beside them."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from aq_jax.conversion.sidefiles import SideFiles, copy_side_files
from aq_jax.errors import ConfigError
from aq_jax.store.folders import Folder

if TYPE_CHECKING:
    from aq_jax.core.qtensor import QTensor

# Opens a source, here or in another process.
Opener = Callable[[], "AbstractContextManager[Source]"]


class Source:
    """Named tensors that are read one at a time; each format overrides `read`, and what else it needs.

    Args:
        folder: The folder that holds the weights; its config.json may say how they are quantized.
        shapes: The shape and dtype of every stored tensor, in order.
        aliases: Tied tensors: name -> stored name.
        files: The names of the files that hold the weights.

    Attributes:
        config_folder: The folder that holds config and tokenizer files.
        notes: Notes about how the source was read.
        quantized: The quant_type of tensors that are quantized already, by name.
        row_metadata: A table's fields of each tensor that is kept as it is: the dtype before quantization, quant_type,
            solver, cosine, rel_mse. Empty for plain arrays.
        provenance: The table's entries of metadata that go with them, such as how codes were made.
        reopen: A function that opens the source again; set by `converters.formats.open_source`.
    """

    def __init__(
        self,
        folder: Folder,
        shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]] | None = None,
        aliases: Mapping[str, str] | None = None,
        files: Collection[str] = (),
    ) -> None:
        self.folder = self.config_folder = folder
        self.shapes = dict(shapes or {})
        self.aliases = dict(aliases or {})
        self.files = files
        self.notes: list[str] = []
        self.quantized: Mapping[str, str] = {}
        self.row_metadata: Mapping[str, Mapping[str, Any]] = {}
        self.provenance: Mapping[str, Any] = {}
        self.reopen: Opener | None = None

    def read(self, name: str) -> np.ndarray | QTensor:
        """Read one tensor: a view where possible, a QTensor if it is quantized and kept as it is."""
        raise NotImplementedError

    def release(self) -> None:
        """Give back the memory that reading took, where the source can; what is read again takes it again."""

    def nbytes(self, name: str) -> int:
        """Count the bytes of a tensor as it is read."""
        shape, dtype = self.shapes[name]
        return math.prod(shape) * dtype.itemsize

    def read_memory(self, name: str) -> int:
        """Count the bytes of memory that reading a tensor takes, beside mapped files."""
        return self.nbytes(name)

    def side_files(self, target: Folder) -> SideFiles:
        """Find the files that go beside the weights when they are written into a folder; by default none."""
        return SideFiles()

    def check_target(self, target: Folder) -> None:
        """Refuse a folder into which no table of this source may be written.

        Raises:
            FormatError: if the table would be read there as a part of the source.
        """

    @contextmanager
    def model_folder(self) -> Iterator[Path]:
        """Give the folder from which the model can run: with config and tokenizer files, on this machine.

        Raises:
            ConfigError: if it is elsewhere.
        """
        if self.config_folder.local is None:
            raise ConfigError(
                f"{self.config_folder}: is not on this machine, where the model is to run; fetch the folder"
            )
        yield self.config_folder.local

    def subset(self, names: Collection[str], aliases: Mapping[str, str]) -> Self:
        """Return the same source with fewer tensors."""
        found = copy.copy(self)
        found.shapes, found.aliases = {name: self.shapes[name] for name in names}, dict(aliases)
        return found

    def opener(self, names: Collection[str]) -> Opener:
        """Return a picklable function by which another process opens at least these tensors.

        Raises:
            ConfigError: if the source cannot be opened again.
        """
        if self.reopen is None:
            raise ConfigError(f"{self.folder}: cannot be opened again; open it with `converters.formats.open_source`")
        return self.reopen

    def file_states(self) -> list[list[object]]:
        """List the files and their states, by which another run knows that the source is the same."""
        states = [(file, self.folder.state(file)) for file in sorted(self.files)]
        return [[file, asdict(state) if state else None] for file, state in states]


class GeneratingSource(Source):
    """A source whose side files are generated; its model runs from a folder made for it."""

    @contextmanager
    def model_folder(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            copy_side_files(self.side_files(found := Folder(folder)), found)
            yield Path(folder)
