"""Write and read the tensors of our checkpoints: every array is compared with its digest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import numpy as np
from blake3 import blake3
from orbax.checkpoint import v1 as ocp

from aq_jax.converters.orbax.metadata import (
    METADATA,
    PARTS,
    ArrayEntry,
    Metadata,
    new_metadata,
    parse_metadata,
    parse_tensor,
)
from aq_jax.core.frameworks import to_numpy
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import AqError, FormatError, IntegrityError, shorten
from aq_jax.store import DTYPES

ARRAYS = "aq_jax_arrays"
PLACEHOLDER = ocp.PLACEHOLDER
"""Stands for an array that is not to be read."""
_MANY_THREADS_FROM = 64 << 20


def write_tensors(
    path: str | os.PathLike[str],
    tree: Any,
    tensors: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, Any]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write tensors, and the tree that they are the leaves of.

    Args:
        path: The folder to write; it must not exist.
        tree: The tree as JSON.
        tensors: The arrays and QTensors by name.
        rows: A table's fields of each tensor, if they come from a table.
        config: The config of that table.

    Returns:
        The absolute path of the folder.

    Raises:
        AqError: for what is no array, or not all here, and for a disk that cannot be written to.
        FormatError: if the path exists; for a QTensor whose parts do not fit each other.
    """
    folder = Path(path).absolute()
    refuse_existing(folder)
    arrays: dict[str, np.ndarray] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, value in tensors.items():
        parts: dict[str, Any] = {"array": value}
        entry: dict[str, Any] = {"row": dict(rows[name])} if rows else {}
        if isinstance(value, QTensor):
            parts = {part: getattr(value, part) for part in (PARTS if value.zero_point is not None else PARTS[:2])}
            entry |= {"spec": value.spec.to_dict(), "length": value.length}
            entry |= {} if value.rows is None else {"rows": value.rows}
        for part, leaf in parts.items():
            array = _to_host(f"{name}.{part}" if len(parts) > 1 else name, leaf)
            entry[part] = {"shape": list(array.shape), "dtype": array.dtype.name, "digest": _digest(array)}
            if array.size:
                arrays[_key(name, part)] = array.view(np.uint8) if part == "codes" else array
        parse_tensor(folder, name, entry)  # refuses what could not be loaded
        entries[name] = entry
    metadata = new_metadata(tree, entries, config or {})
    try:
        with own_context():
            ocp.save_checkpointables(str(folder), {METADATA: metadata} | ({ARRAYS: arrays} if arrays else {}))
    except BaseException as error:
        shutil.rmtree(folder.with_name(f"{folder.name}.orbax-checkpoint-tmp"), ignore_errors=True)
        if not isinstance(error, ValueError | OSError | RuntimeError):  # Orbax raises ValueError when the disk is full
            raise
        raise AqError(f"{folder}: the checkpoint cannot be written: {shorten(error)}") from None
    return folder


def read_tensors(folder: Path, metadata: Metadata, names: Iterable[str]) -> dict[str, Any]:
    """Read arrays, and QTensors of NumPy leaves, and compare each with its digest.

    Raises:
        IntegrityError: naming the array that cannot be read, or was damaged or changed.
    """
    names = set(names)
    abstract: dict[str, Any] = {}
    for name, tensor in metadata.tensors.items():
        for part, array in tensor.arrays.items():
            if array.abstract.nbytes:
                abstract[_key(name, part)] = array.stored if name in names else PLACEHOLDER
    asked = any(value is not PLACEHOLDER for value in abstract.values())
    found = read_arrays(folder, ARRAYS, abstract) if asked else {}
    out: dict[str, Any] = {}
    for name, tensor in metadata.tensors.items():
        if name not in names:
            continue
        parts = {}
        for part, array in tensor.arrays.items():
            where = f"{folder}: {name}.{part}" if tensor.spec else f"{folder}: {name}"
            empty = np.empty(array.stored.shape, array.stored.dtype)
            parts[part] = _verified(where, found.pop(_key(name, part), empty), array)
        out[name] = parts.get("array")
        if tensor.spec:
            leaves = (parts.get(part) for part in PARTS)
            out[name] = QTensor(*leaves, spec=tensor.spec, length=tensor.length, rows=tensor.rows)
    return out


def read_metadata(folder: Path) -> Metadata:
    """Read and check the metadata.

    Raises:
        FormatError: if there is none of this format and version, or it says what no checkpoint can hold.
        IntegrityError: if it cannot be read, or was damaged or changed.
    """
    if not (folder / METADATA).is_dir():
        raise FormatError(
            f"{folder}: holds no {METADATA}: another program wrote it, or that part of it was lost; fetch it again, or "
            "read a checkpoint of another program with `to_table`"
        )
    try:
        with own_context():
            raw = ocp.load_checkpointables(str(folder), {METADATA: None})[METADATA]
    except Exception as error:  # Orbax raises what its parts do
        raise IntegrityError(f"{folder}: its {METADATA} cannot be read: {shorten(error)}; fetch it again") from None
    return parse_metadata(folder, raw)


def read_arrays(folder: Path, item: str | None, tree: Any) -> Any:
    """Read a tree of NumPy arrays, given one of `AbstractArray`s and placeholders.

    Raises:
        IntegrityError: if it cannot be read.
    """
    try:
        with own_context():
            return ocp.load(str(folder), tree, checkpointable_name=item)
    except Exception as error:  # Orbax raises what its parts do
        raise IntegrityError(f"{folder}: cannot be read: {shorten(error)}; fetch or write it again") from None


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a checkpoint that exists.

    Raises:
        FileNotFoundError: if there is nothing.
        FormatError: for a file.
    """
    folder = Path(path).absolute()
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: does not exist")
    if not folder.is_dir():
        raise FormatError(f"{folder}: is a file; wanted the folder of an Orbax checkpoint")
    return folder


def refuse_existing(folder: Path) -> None:
    """Raise FormatError if the path exists."""
    if os.path.lexists(folder):
        raise FormatError(f"{folder}: already exists; remove it, or write to another path")


@contextmanager
def own_context() -> Iterator[None]:
    """Shield our checkpoints from settings that are made for others, such as a dtype to cast to."""
    context = ocp.Context()
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name=METADATA)
    registry.add(ocp.handlers.PyTreeHandler, checkpointable_name=ARRAYS)
    context.checkpointables.registry = registry
    with context:
        yield


def _to_host(name: str, value: Any) -> np.ndarray:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        raise AqError(
            f"{name}: this process has only a part of it, and a digest is over the whole; gather it first, with "
            "jax.experimental.multihost_utils.process_allgather(x, tiled=True)"
        )
    array = to_numpy(value, name)
    if array.dtype.name not in DTYPES:
        raise AqError(
            f"{name}: {type(value).__name__} of dtype {array.dtype} cannot be stored; wanted one of {', '.join(DTYPES)}"
        )
    return array


def _verified(where: str, found: Any, wanted: ArrayEntry) -> np.ndarray:
    array = np.asarray(found)
    if (array.shape, array.dtype) != (wanted.stored.shape, wanted.stored.dtype):
        raise IntegrityError(
            f"{where}: is {array.dtype}{list(array.shape)}; wanted {wanted.stored.dtype}"
            f"{list(wanted.stored.shape)}: the checkpoint was damaged or changed; fetch or write it again"
        )
    if (digest := _digest(array)) != wanted.digest:
        raise IntegrityError(
            f"{where}: its bytes have digest {digest}; wanted {wanted.digest[:64]}: the checkpoint was damaged or "
            "changed; fetch or write it again"
        )
    return array.view(wanted.abstract.dtype)


def _key(name: str, part: str) -> str:
    """Encode the key of an array, so that neither Orbax nor a file system takes it apart."""
    try:
        key = quote(name, safe="")
    except UnicodeEncodeError:
        raise FormatError(f"{name!r}: is no valid Unicode; rename the tensor") from None
    return key or ":" if part == "array" else f"{key}:{part}"


def _digest(array: np.ndarray) -> str:
    threads = blake3.AUTO if array.nbytes >= _MANY_THREADS_FROM else 1
    return blake3(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, max_threads=threads).hexdigest()
