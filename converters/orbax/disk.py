"""What Orbax reads and writes, whatever is set for other checkpoints, and what it says when it cannot."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from aq_jax.errors import AqError, FormatError, IntegrityError

ARRAYS, METADATA = "aq_jax_arrays", "aq_jax_metadata"
PLACEHOLDER = ocp.PLACEHOLDER
"""In the place of an array that is not to be read."""


@dataclass(frozen=True, slots=True)
class Like:
    """An array that is not there: what Orbax reads a NumPy array by."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """Where a checkpoint is, as an absolute path.

    Raises:
        FileNotFoundError: if there is nothing.
        FormatError: for a file.
    """
    folder = Path(path).absolute()
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: there is no such checkpoint")
    if not folder.is_dir():
        raise FormatError(f"{folder}: is a file; wanted the folder of an Orbax checkpoint")
    return folder


def refuse_existing(folder: Path) -> None:
    """FormatError, if there is anything at that path."""
    if os.path.lexists(folder):
        raise FormatError(f"{folder}: is there already; remove it, or write to another path")


def write(folder: Path, metadata: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """A checkpoint that appears whole, or not at all.

    Raises:
        AqError: for a disk that cannot be written to.
    """
    try:
        with _context():
            ocp.save_checkpointables(str(folder), {METADATA: metadata} | ({ARRAYS: arrays} if arrays else {}))
    except BaseException as error:
        shutil.rmtree(folder.with_name(f"{folder.name}.orbax-checkpoint-tmp"), ignore_errors=True)
        if not isinstance(error, ValueError | OSError | RuntimeError):  # of a full disk Orbax says ValueError
            raise
        raise AqError(f"{folder}: the checkpoint cannot be written: {short(error)}") from None


def read_json(folder: Path) -> Any:
    """The metadata as it stands there.

    Raises:
        FormatError: if there is none.
        IntegrityError: if it cannot be read.
    """
    if not (folder / METADATA).is_dir():
        raise FormatError(
            f"{folder}: holds no {METADATA}: another program wrote it, or that part of it was lost; fetch it again, or "
            "read a checkpoint of another program with `to_table`"
        )
    try:
        with _context():
            return ocp.load_checkpointables(str(folder), {METADATA: None})[METADATA]
    except Exception as error:  # Orbax raises what its parts do
        raise IntegrityError(f"{folder}: its {METADATA} cannot be read: {short(error)}; fetch it again") from None


def read_arrays(folder: Path, item: str | None, tree: Any) -> Any:
    """A tree of NumPy arrays, for one of `Like`s and placeholders.

    Raises:
        IntegrityError: if it cannot be read.
    """
    try:
        with _context():
            return ocp.load(str(folder), tree, checkpointable_name=item)
    except Exception as error:  # Orbax raises what its parts do
        raise IntegrityError(f"{folder}: cannot be read: {short(error)}; fetch or write it again") from None


def trees_of(folder: Path) -> dict[str | None, Any]:
    """The trees that a checkpoint of any program holds, by name: shapes and dtypes in the place of arrays.

    Checkpoints of Orbax's first interface may hold one that has no name.

    Raises:
        FormatError: for a folder that Orbax cannot read.
    """
    try:
        with _context():
            try:
                trees: Any = ocp.checkpointables_metadata(str(folder)).metadata
            except ocp.errors.InvalidLayoutError:
                trees = {None: ocp.metadata(str(folder), None).metadata}
    except Exception as error:  # Orbax raises what its parts do
        raise FormatError(
            f"{folder}: is no checkpoint that Orbax can read: {short(error)}; wanted the folder of one, such as that "
            "of a step"
        ) from None
    return {name: tree for name, tree in trees.items() if tree is not None and jax.tree.leaves(tree)}


def short(error: BaseException) -> str:
    """The beginning of an error: Orbax's are pages."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _context() -> ocp.Context:
    """One of our own: what is set for other checkpoints, such as a dtype to cast to, does not reach these."""
    context = ocp.Context()
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name=METADATA)
    registry.add(ocp.handlers.PyTreeHandler, checkpointable_name=ARRAYS)
    context.checkpointables.registry = registry
    return context
