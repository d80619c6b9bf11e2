"""Read checkpoints as sources, ours and those of other programs; convert checkpoints to tables, and back."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from aq_jax.config import Compression, QuantizationConfig
from aq_jax.conversion import corridor
from aq_jax.conversion.source import Source
from aq_jax.conversion.write import ConversionResult
from aq_jax.converters.orbax.metadata import METADATA, AbstractArray, Metadata
from aq_jax.converters.orbax.tensors import (
    ARRAYS,
    PLACEHOLDER,
    existing_folder,
    own_context,
    read_arrays,
    read_metadata,
    read_tensors,
    refuse_existing,
    write_tensors,
)
from aq_jax.converters.tables import open_tables
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import FormatError, shorten
from aq_jax.ops import dequantize
from aq_jax.progress import Progress
from aq_jax.quantizers.tree import path_name
from aq_jax.store import DTYPES
from aq_jax.store.casts import saturated
from aq_jax.store.folders import Folder

BATCH_BYTES = 256 << 20
"""How much of a checkpoint is read at once when it becomes a table; a larger tensor is read alone."""


def to_table(
    checkpoint: str | os.PathLike[str],
    path: str | os.PathLike[str],
    config: QuantizationConfig | None = None,
    *,
    checkpointable: str | None = None,
    compression: Compression = "none",
    progress: Progress | None = None,
) -> ConversionResult:
    """Write a checkpoint as a table: one that `save` or `from_table` wrote, or any of Orbax's that holds arrays.

    Names are paths in the tree, joined by dots; a variable of Flax NNX, which holds only a `value`, has its own path.
    QTensors are written as they are. Tensors of ours are compared with their digests; those of other checkpoints have
    none, and are taken as Orbax reads them. What is no array in those, such as the number of a step, is left out, and
    `notes` lists it.

    Args:
        checkpoint: The folder of the checkpoint.
        path: The path of a .parquet or .arrow file; it appears whole, or not at all.
        config: The quantization; none of the tensors may be quantized already.
        checkpointable: The name of the tree to read of another checkpoint, if it has several, such as "params".
        compression: "zstd" compresses the weights too.
        progress: A callback that gets each tensor's name, its bytes, and the bytes of all.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        FormatError: for a folder that is no checkpoint, several trees of which none was named, two arrays of one name,
            a dtype that a table does not have, and for tensors that are quantized already and would be rounded twice.
        IntegrityError: if a tensor cannot be read, or was damaged or changed.
        AqError: for a tensor that cannot be quantized.
        ValueError: for a batch of QTensors whose groups cross rows; see `aq_jax.save`.

    >>> import numpy as np, tempfile
    >>> from orbax.checkpoint import v1 as ocp
    >>> from aq_jax import QuantizationConfig, load
    >>> folder = tempfile.mkdtemp()
    >>> ocp.save(folder + "/run", {"dense": {"kernel": np.ones((4, 8), np.float32)}})
    >>> to_table(folder + "/run", folder + "/m.parquet", QuantizationConfig("int8")).quantized
    {'dense.kernel': 1.0}
    >>> list(load(folder + "/m.parquet"))
    ['dense.kernel']
    """
    with open_checkpoint(checkpoint, packed=config is None, checkpointable=checkpointable) as source:
        return corridor.to_table(source, path, config, compression=compression, progress=progress)


def from_table(table: str | os.PathLike[str], checkpoint_path: str | os.PathLike[str]) -> Path:
    """Write a table as a checkpoint, from which `load` gives a flat dictionary: packed QTensors, and arrays.

    `to_table` makes an equal table of it again: dtypes before quantization, solvers and how well they did are kept, and
    so are tied names. The whole table is in memory meanwhile.

    Args:
        table: The path of a table of schema V1 or V2, or of a folder of them.
        checkpoint_path: The folder to write; it must not exist, and appears whole, or not at all.

    Returns:
        The absolute path of the folder.

    Raises:
        FileNotFoundError: if there is no such table.
        FormatError: for an invalid table, and if the checkpoint's path exists.
        IntegrityError: if a row was damaged or changed.
        AqError: for a disk that cannot be written to.

    >>> import numpy as np, tempfile
    >>> import aq_jax as aq
    >>> from aq_jax.converters.orbax import load
    >>> folder = tempfile.mkdtemp()
    >>> aq.save(folder + "/m.parquet", {"w": aq.quantize(np.ones((2, 8), np.float32), "int8")})
    >>> load(from_table(folder + "/m.parquet", folder + "/checkpoint"))
    {'w': QTensor(int8[2, 8], QuantSpec(bits=8, per_channel=True, group_size=0, rotation=0))}
    """
    refuse_existing(Path(checkpoint_path).absolute())
    with open_tables(table, packed=True) as source:
        tensors = {name: source.read(name) for name in source.shapes}
        tree = [[name, name] for name in tensors] + [[alias, stored] for alias, stored in source.aliases.items()]
        return write_tensors(checkpoint_path, {"dict": tree}, tensors, source.row_metadata, source.provenance)


class OrbaxSource(Source):
    """The tensors of a checkpoint in order, read in batches.

    Args:
        folder: The folder of the checkpoint.
        shapes, aliases: See `Source`.
        sizes: The bytes of each tensor.
        fetch: A function that reads some tensors, by name.
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
        self._batch: dict[str, Any] = {}

    def nbytes(self, name: str) -> int:
        return self._sizes[name]

    def read_memory(self, name: str) -> int:
        return max(self.nbytes(name), min(BATCH_BYTES, sum(map(self.nbytes, self.shapes))))

    def read(self, name: str) -> Any:
        if name not in self._batch:
            names = list(self.shapes)
            batch, room = [], BATCH_BYTES
            for other in names[names.index(name) :]:
                room -= self._sizes[other]
                if batch and room < 0:
                    break
                batch.append(other)
            self._batch = {}  # freed before more is read
            self._batch = self._fetch(batch)
        return self._batch.pop(name)


@contextmanager
def open_checkpoint(
    path: str | os.PathLike[str], *, packed: bool = False, checkpointable: str | None = None
) -> Iterator[OrbaxSource]:
    """Open a checkpoint that `save` or `from_table` wrote, or any of Orbax's that holds arrays.

    Args:
        path: The folder of the checkpoint.
        packed: Whether quantized tensors of ours become QTensors, and float16 stays float16; otherwise all is
            dequantized to its dtype before quantization.
        checkpointable: The name of the tree to read of another checkpoint, if it has several, such as "params".

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        FormatError: for a folder that is no checkpoint, several trees of which none was named, two arrays of one name,
            and a dtype that a table does not have.
        IntegrityError: for damaged metadata.
    """
    folder = existing_folder(path)
    if checkpointable is None and ((folder / METADATA).is_dir() or (folder / ARRAYS).is_dir()):
        yield _open_ours(folder, read_metadata(folder), packed)
    else:
        yield _open_foreign(folder, checkpointable)


def _open_ours(folder: Path, metadata: Metadata, packed: bool) -> OrbaxSource:
    tensors = metadata.tensors

    def fetch(names: list[str]) -> dict[str, Any]:
        found = read_tensors(folder, metadata, names)
        return found if packed else {name: plain(name, value) for name, value in found.items()}

    def plain(name: str, value: np.ndarray | QTensor) -> np.ndarray:
        if isinstance(value, QTensor):
            return saturated(np.asarray(dequantize(value)), tensors[name].dtype)
        return tensors[name].upcast(value, name)

    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    aliases = {name: stored for name, stored in metadata.leaves.items() if name != stored}
    source = OrbaxSource(folder, shapes, {name: tensor.nbytes for name, tensor in tensors.items()}, fetch, aliases)
    source.quantized = {name: tensor.spec.quant_type for name, tensor in tensors.items() if tensor.spec}
    if packed:
        kinds = {name: {"quant_type": kind} for name, kind in source.quantized.items()}
        source.row_metadata = {name: kinds.get(name, {}) | dict(tensor.row) for name, tensor in tensors.items()}
        source.provenance = metadata.config
    return source


def _open_foreign(folder: Path, checkpointable: str | None) -> OrbaxSource:
    """Open a checkpoint of another program; what is no array in it is noted."""
    item, metadata = _find_tree(folder, checkpointable)
    paths, tree = jax.tree_util.tree_flatten_with_path(metadata)
    names = _leaf_names([path for path, _ in paths])
    arrays: dict[str, AbstractArray] = {}
    notes = []
    for name, (_, leaf) in zip(names, paths, strict=True):
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or dtype is None:
            notes.append(f"{name}: is no array, and was left out")
            continue
        if name in arrays:
            raise FormatError(f"{folder}: {name}: two arrays have this name; a table cannot hold both")
        if np.dtype(dtype).name not in DTYPES:
            raise FormatError(f"{folder}: {name}: is {np.dtype(dtype)}; a table can hold {', '.join(DTYPES)}")
        arrays[name] = AbstractArray(tuple(shape), np.dtype(dtype))

    def fetch(wanted: list[str]) -> dict[str, np.ndarray]:
        asked = jax.tree.unflatten(tree, [arrays[n] if n in wanted else PLACEHOLDER for n in names])
        found = jax.tree.leaves(read_arrays(folder, item, asked))
        return {n: np.asarray(a) for n, a in zip(names, found, strict=True) if n in wanted}

    shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    source = OrbaxSource(folder, shapes, {name: array.nbytes for name, array in arrays.items()}, fetch)
    source.notes += notes
    return source


def _leaf_names(paths: Sequence[tuple[Any, ...]]) -> list[str]:
    """Join the parts of paths by dots; a variable of Flax NNX, which holds only a `value`, has its own path."""
    inside = Counter(path[:n] for path in paths for n in range(len(path)))
    return [
        path_name(path[:-1] if len(path) > 1 and path_name(path[-1:]) == "value" and inside[path[:-1]] == 1 else path)
        for path in paths
    ]


def _find_tree(folder: Path, checkpointable: str | None) -> tuple[str | None, Any]:
    """Return the name and the metadata of a checkpoint's only tree, or of the one that was asked for.

    Checkpoints of Orbax's first interface may hold a tree without a name.

    Raises:
        FormatError: for a folder that Orbax cannot read, and for another number of trees.
    """
    try:
        with own_context():
            try:
                trees: Any = ocp.checkpointables_metadata(str(folder)).metadata
            except ocp.errors.InvalidLayoutError:
                trees = {None: ocp.metadata(str(folder), None).metadata}
    except Exception as error:  # Orbax raises what its parts do
        raise FormatError(
            f"{folder}: is no checkpoint that Orbax can read: {shorten(error)}; wanted the folder of one, such as that "
            "of a step"
        ) from None
    trees = {name: tree for name, tree in trees.items() if tree is not None and jax.tree.leaves(tree)}
    if checkpointable is None and len(trees) == 1:
        return next(iter(trees.items()))
    if checkpointable not in trees:
        found = ", ".join(map(repr, trees)) or "none"
        raise FormatError(
            f"{folder}: found trees of arrays: {found}; wanted "
            + (f"{checkpointable!r}" if checkpointable else "one, or its name as `checkpointable`")
        )
    return checkpointable, trees[checkpointable]
