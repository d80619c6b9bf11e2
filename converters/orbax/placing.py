"""Where the arrays of a checkpoint go: onto which devices, and cut along which axes."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from aq_jax.converters.orbax.entries import PARTS, TensorEntry
from aq_jax.converters.orbax.metadata import Known
from aq_jax.core.qtensor import QTensor
from aq_jax.core.sharding import build, qtensor_shardings
from aq_jax.core.sharding import parts as cut_by
from aq_jax.errors import FormatError
from aq_jax.quantizers.apply import map_named


def leaf_shardings(shardings: Any, known: Known) -> dict[str, tuple[Sharding, ...]]:
    """Leaf names -> the sharding of each of its arrays.

    Raises:
        FormatError: for names that there are not, and shardings that do not fit.
    """
    given: dict[str, Any]
    if isinstance(shardings, Sharding):
        given = dict.fromkeys(known.leaves, shardings)
    else:
        tree = dict(shardings) if isinstance(shardings, Mapping) else shardings
        given = {}
        map_named(given.__setitem__, tree, lambda node: isinstance(node, Sharding | QTensor))
    for name in given:
        if name not in known.leaves:
            near = difflib.get_close_matches(name, known.leaves, 1, cutoff=0.0)
            raise FormatError(f"shardings: the checkpoint has no {name!r}; the nearest is {near[0] if near else ''!r}")
    return {name: _part_shardings(name, known.tensors[known.leaves[name]], on) for name, on in given.items()}


def _part_shardings(name: str, tensor: TensorEntry, sharding: Any) -> tuple[Sharding, ...]:
    shapes = [array.like.shape for array in tensor.arrays.values()]
    parts: tuple[Any, ...] = (sharding,)
    if tensor.spec and isinstance(sharding, QTensor):
        parts = tuple(getattr(sharding, part) for part in tensor.arrays)
    elif tensor.spec and isinstance(sharding, Sharding):
        codes, grids = qtensor_shardings(sharding, tensor.shape, tensor.spec, name)
        parts = (codes, *(grids for _ in shapes[1:]))
    if not all(isinstance(part, Sharding) for part in parts):
        raise FormatError(f"shardings: {name} is {sharding!r}; wanted jax.sharding.Sharding, or a QTensor of them")
    for shape, part in zip(shapes, parts, strict=True):
        cut_by(part, shape, name)  # refuses what does not fit
    return parts


def place(value: Any, shardings: tuple[Sharding, ...]) -> Any:
    """An array, or the arrays of a QTensor, over the devices of their shardings."""
    if not isinstance(value, QTensor):
        return _put(value, *shardings)
    leaves = {part: _put(getattr(value, part), on) for part, on in zip(PARTS, shardings, strict=False)}
    return dataclasses.replace(value, **leaves)


def _put(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """An array over the devices of a sharding, of which this process fills its own."""
    rows = np.atleast_1d(array).view()
    rows.flags.writeable = False  # no device takes over memory that another may have as well
    return build(array.shape, array.dtype, sharding, lambda start, stop: rows[start:stop])
