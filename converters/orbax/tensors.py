"""Tensors by name: written with the digests of their arrays, and compared with them when they are read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import numpy as np
from blake3 import blake3

from aq_jax.converters.orbax.disk import ARRAYS, PLACEHOLDER, read_arrays, refuse_existing, write
from aq_jax.converters.orbax.entries import PARTS, ArrayEntry, tensor_entry
from aq_jax.converters.orbax.metadata import Known, new_metadata
from aq_jax.core.frameworks import to_numpy
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import AqError, FormatError, IntegrityError
from aq_jax.store import DTYPES

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
        path: the folder; there must be nothing.
        tree: its shape as JSON.
        tensors: arrays and QTensors, by name.
        rows: what a table knows beside each, if they come from one.
        config: of that table.

    Returns:
        The absolute path of the folder.

    Raises:
        AqError: for what is no array, or not all here, and for a disk that cannot be written to.
        FormatError: if there is something at that path; for a QTensor whose parts do not belong together.
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
            array = _host(f"{name}.{part}" if len(parts) > 1 else name, leaf)
            entry[part] = {"shape": list(array.shape), "dtype": array.dtype.name, "digest": _digest(array)}
            if array.size:
                arrays[_key(name, part)] = array.view(np.uint8) if part == "codes" else array
        tensor_entry(folder, name, entry)  # refuses what could not be loaded
        entries[name] = entry
    write(folder, new_metadata(tree, entries, config or {}), arrays)
    return folder


def read_tensors(folder: Path, known: Known, names: Iterable[str]) -> dict[str, Any]:
    """Arrays, and QTensors of NumPy leaves, each compared with its digest.

    Raises:
        IntegrityError: naming the array that cannot be read, or is not what was written.
    """
    names = set(names)
    like: dict[str, Any] = {}
    for name, tensor in known.tensors.items():
        for part, array in tensor.arrays.items():
            if array.like.nbytes:
                like[_key(name, part)] = array.stored if name in names else PLACEHOLDER
    asked = any(value is not PLACEHOLDER for value in like.values())
    found = read_arrays(folder, ARRAYS, like) if asked else {}
    out: dict[str, Any] = {}
    for name, tensor in known.tensors.items():
        if name not in names:
            continue
        parts = {}
        for part, array in tensor.arrays.items():
            here = f"{name}.{part}" if tensor.spec else name
            empty = np.empty(array.like.shape, array.stored.dtype)
            parts[part] = _verified(f"{folder}: {here}", found.pop(_key(name, part), empty), array)
        out[name] = parts.get("array")
        if tensor.spec:
            arrays = (parts.get(part) for part in PARTS)
            out[name] = QTensor(*arrays, spec=tensor.spec, length=tensor.length, rows=tensor.rows)
    return out


def _host(name: str, value: Any) -> np.ndarray:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        raise AqError(
            f"{name}: this process has only a part of it, and a digest is over the whole; gather it first, with "
            "jax.experimental.multihost_utils.process_allgather(x, tiled=True)"
        )
    array = to_numpy(value, name)
    if array.dtype.name not in DTYPES:
        raise AqError(f"{name}: {type(value).__name__} of dtype {array.dtype} is no tensor that can be stored")
    return array


def _verified(where: str, found: Any, wanted: ArrayEntry) -> np.ndarray:
    array = np.asarray(found)
    if (array.shape, array.dtype) != (wanted.stored.shape, wanted.stored.dtype):
        raise IntegrityError(
            f"{where}: is {array.dtype}{list(array.shape)}, written was {wanted.stored.dtype}"
            f"{list(wanted.stored.shape)}: the checkpoint was damaged or changed; fetch or write it again"
        )
    if (digest := _digest(array)) != wanted.digest:
        raise IntegrityError(
            f"{where}: its bytes have digest {digest}, written was {wanted.digest[:64]}: the checkpoint was damaged or "
            "changed; fetch or write it again"
        )
    return array.view(wanted.like.dtype)


def _key(name: str, part: str) -> str:
    """The key of an array among Orbax's: nothing that Orbax or a file system would take apart."""
    try:
        key = quote(name, safe="")
    except UnicodeEncodeError:
        raise FormatError(f"{name!r}: is no Unicode that can be written; rename the tensor") from None
    return key or ":" if part == "array" else f"{key}:{part}"


def _digest(array: np.ndarray) -> str:
    threads = blake3.AUTO if array.nbytes >= _MANY_THREADS_FROM else 1
    return blake3(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, max_threads=threads).hexdigest()
