"""Checkpoints that other programs wrote: their arrays as Orbax reads them, without digests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aq_jax.converters.orbax.disk import PLACEHOLDER, Like, read_arrays, trees_of
from aq_jax.errors import FormatError
from aq_jax.quantizers.apply import path_name
from aq_jax.store import DTYPES


def foreign_tensors(
    folder: Path, checkpointable: str | None
) -> tuple[dict[str, Like], Callable[[list[str]], dict[str, np.ndarray]], list[str]]:
    """The arrays of a checkpoint that another program wrote, what reads some of them, and what is said of the rest."""
    item, metadata = _tree_of(folder, checkpointable)
    paths, tree = jax.tree_util.tree_flatten_with_path(metadata)
    names = _names([path for path, _ in paths])
    likes: dict[str, Like] = {}
    notes = []
    for name, (_, leaf) in zip(names, paths, strict=True):
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or dtype is None:
            notes.append(f"{name}: is no array, and was left out")
            continue
        if name in likes:
            raise FormatError(f"{folder}: {name}: two arrays have this name; a table cannot hold both")
        if np.dtype(dtype).name not in DTYPES:
            raise FormatError(f"{folder}: {name}: is {np.dtype(dtype)}; a table can hold {', '.join(DTYPES)}")
        likes[name] = Like(tuple(shape), np.dtype(dtype))

    def read(wanted: list[str]) -> dict[str, np.ndarray]:
        asked = jax.tree.unflatten(tree, [likes[n] if n in wanted else PLACEHOLDER for n in names])
        found = jax.tree.leaves(read_arrays(folder, item, asked))
        return {n: np.asarray(a) for n, a in zip(names, found, strict=True) if n in wanted}

    return likes, read, notes


def _names(paths: Sequence[tuple[Any, ...]]) -> list[str]:
    """The paths as names, parts joined by dots; of a variable of Flax NNX, which holds but a `value`, its own path."""
    inside = Counter(path[:n] for path in paths for n in range(len(path)))
    return [
        path_name(path[:-1] if len(path) > 1 and path_name(path[-1:]) == "value" and inside[path[:-1]] == 1 else path)
        for path in paths
    ]


def _tree_of(folder: Path, checkpointable: str | None) -> tuple[str | None, Any]:
    """The name of the one tree that a checkpoint holds, or of the one that was asked for, and its metadata."""
    trees = trees_of(folder)
    if checkpointable is None and len(trees) == 1:
        return next(iter(trees.items()))
    if checkpointable not in trees:
        found = ", ".join(map(repr, trees)) or "none"
        raise FormatError(
            f"{folder}: found trees of arrays: {found}; wanted "
            + (f"{checkpointable!r}" if checkpointable else "one, or its name as `checkpointable`")
        )
    return checkpointable, trees[checkpointable]
