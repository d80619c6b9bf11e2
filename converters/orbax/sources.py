"""Checkpoints as sources: ours, and those of other programs; read some tensors at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from aq_jax.conversion.source import Source
from aq_jax.converters.orbax.disk import ARRAYS, METADATA, existing_folder
from aq_jax.converters.orbax.entries import TensorEntry
from aq_jax.converters.orbax.foreign import foreign_tensors
from aq_jax.converters.orbax.metadata import Known, read_metadata
from aq_jax.converters.orbax.tensors import read_tensors
from aq_jax.converters.tables import narrowed
from aq_jax.core.qtensor import QTensor
from aq_jax.ops import dequantize
from aq_jax.store.folders import Folder

BATCH_BYTES = 256 << 20
"""How much of a checkpoint is read at once when it becomes a table; a larger tensor is alone."""


class OrbaxSource(Source):
    """Tensors of a checkpoint in order, read some at a time.

    Args:
        folder: of the checkpoint.
        shapes, aliases: as `Source` has them.
        sizes: bytes of each tensor.
        fetch: reads some of them, by name.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, Any],
        sizes: Mapping[str, int],
        fetch: Callable[[list[str]], dict[str, Any]],
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        files = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
        super().__init__(Folder(folder), shapes, aliases, files)
        self._sizes, self._fetch = sizes, fetch
        self._held: dict[str, Any] = {}

    def size(self, name: str) -> int:
        return self._sizes[name]

    def held(self, name: str) -> int:
        return max(self.size(name), min(BATCH_BYTES, sum(map(self.size, self.shapes))))

    def read(self, name: str) -> Any:
        if name not in self._held:
            names = list(self.shapes)
            batch, room = [], BATCH_BYTES
            for other in names[names.index(name) :]:
                room -= self._sizes[other]
                if batch and room < 0:
                    break
                batch.append(other)
            self._held = {}  # before more is read
            self._held = self._fetch(batch)
        return self._held.pop(name)


@contextmanager
def open_checkpoint(
    path: str | os.PathLike[str], *, packed: bool = False, checkpointable: str | None = None
) -> Iterator[OrbaxSource]:
    """Open a checkpoint that `save` or `from_table` wrote, or any of Orbax's that holds arrays.

    Args:
        path: its folder.
        packed: of one of ours, QTensors and what is kept in float16 as they are; otherwise all is dequantized to the
            dtype that it had before.
        checkpointable: which tree of another checkpoint, if it has more than one, such as "params".

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        FormatError: for a folder that is none, one of several trees of which none was named, two arrays of one name,
            and a dtype that a table does not have.
        IntegrityError: for damaged metadata.
    """
    folder = existing_folder(path)
    if checkpointable is None and ((folder / METADATA).is_dir() or (folder / ARRAYS).is_dir()):
        yield _own(folder, read_metadata(folder), packed)
        return
    likes, fetch, notes = foreign_tensors(folder, checkpointable)
    shapes = {name: (like.shape, like.dtype) for name, like in likes.items()}
    source = OrbaxSource(folder, shapes, {name: like.nbytes for name, like in likes.items()}, fetch)
    source.notes += notes
    yield source


def _own(folder: Path, known: Known, packed: bool) -> OrbaxSource:
    def fetch(names: list[str]) -> dict[str, Any]:
        found = read_tensors(folder, known, names)
        return found if packed else {name: _plain(known.tensors[name], value) for name, value in found.items()}

    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in known.tensors.items()}
    source = OrbaxSource(folder, shapes, known.sizes, fetch, known.aliases)
    source.quantized = {name: tensor.spec.quant_type for name, tensor in known.tensors.items() if tensor.spec}
    if packed:
        kinds = {name: {"quant_type": kind} for name, kind in source.quantized.items()}
        source.rows = {name: kinds.get(name, {}) | dict(tensor.row) for name, tensor in known.tensors.items()}
        source.made = known.config
    return source


def _plain(tensor: TensorEntry, value: np.ndarray | QTensor) -> np.ndarray:
    if isinstance(value, QTensor):
        return narrowed(np.asarray(dequantize(value)), tensor.dtype)
    return tensor.widened(value)
