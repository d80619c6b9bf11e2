"""What a format opens: tensors by name, one at a time, and what there is to know of them and of what lies beside."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from aq_jax.conversion.sidefiles import SideFiles
from aq_jax.errors import ConfigError
from aq_jax.store.folders import Folder

if TYPE_CHECKING:
    from aq_jax.core.qtensor import QTensor

# Opens a source, here or in another process.
Opener = Callable[[], "AbstractContextManager[Source]"]


class Source:
    """Named tensors that are read one at a time; a format's own says how (`read`), and what differs from the below.

    Args:
        folder: that the weights lie in; its config.json may say how they are quantized.
        shapes: shape and dtype of every stored tensor, in order.
        aliases: tied tensors: name -> stored name.
        files: that the weights are read from, by their names in the folder.

    Attributes:
        home: the folder that config and tokenizer files are in.
        notes: what there is to know of how it was read.
        quantized: the quant_type of tensors that are quantized already, by name.
        rows: what a table knows of each tensor beside its values, for those that are taken as they are: the dtype
            before quantization, quant_type, solver, cosine, rel_mse. Empty for plain arrays.
        made: what is to be kept of how those were made.
        reopen: opens it once more; given by `converters.formats.open_source`.
    """

    def __init__(
        self,
        folder: Folder,
        shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]] | None = None,
        aliases: Mapping[str, str] | None = None,
        files: Collection[str] = (),
    ) -> None:
        self.folder = self.home = folder
        self.shapes = dict(shapes or {})
        self.aliases = dict(aliases or {})
        self.files = files
        self.notes: list[str] = []
        self.quantized: Mapping[str, str] = {}
        self.rows: Mapping[str, Mapping[str, Any]] = {}
        self.made: Mapping[str, Any] = {}
        self.reopen: Opener | None = None

    def read(self, name: str) -> np.ndarray | QTensor:
        """Read one tensor; a view where that is possible, a QTensor if it is one that is taken as it is."""
        raise NotImplementedError

    def size(self, name: str) -> int:
        """Count the bytes of a tensor as it is read."""
        shape, dtype = self.shapes[name]
        return math.prod(shape) * dtype.itemsize

    def held(self, name: str) -> int:
        """Count the bytes of memory that reading a tensor takes, beside mapped files."""
        return self.size(name)

    def side_files(self, target: Folder) -> SideFiles:
        """Find what goes beside the weights when they are written into a folder; by default nothing does."""
        return SideFiles()

    def check_target(self, target: Folder) -> None:
        """Refuse a folder into which no table of it may be written.

        Raises:
            FormatError: for one in which it would be read as a part of the source.
        """

    @contextmanager
    def model_folder(self) -> Iterator[Path]:
        """Give the folder from which the model can be run: with config and tokenizer files, on this machine.

        Raises:
            ConfigError: if it is elsewhere.
        """
        if self.home.local is None:
            raise ConfigError(f"{self.home}: is not on this machine, where the model is to run; fetch the folder")
        yield self.home.local

    def only(self, names: Collection[str], aliases: Mapping[str, str]) -> Self:
        """Give the same source with fewer tensors."""
        found = copy.copy(self)
        found.shapes, found.aliases = {name: self.shapes[name] for name in names}, dict(aliases)
        return found

    def part(self, names: Collection[str]) -> Opener:
        """Say how another process opens at least these tensors; what is returned can be pickled.

        Raises:
            ConfigError: if nobody can.
        """
        if self.reopen is None:
            raise ConfigError(f"{self.folder}: cannot be opened again; open it by `converters.formats.open_source`")
        return self.reopen

    def states(self) -> list[list[object]]:
        """List its files and their states, by which it is known to be the same in another run."""
        states = [(file, self.folder.state(file)) for file in sorted(self.files)]
        return [[file, asdict(state) if state else None] for file, state in states]
