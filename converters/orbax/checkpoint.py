"""Write and read our checkpoints, trees of arrays and QTensors, on the devices that shardings name."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from aq_jax.converters.orbax.metadata import PARTS, Metadata, TensorEntry, tree_from_json, tree_to_json
from aq_jax.converters.orbax.tensors import existing_folder, read_metadata, read_tensors, write_tensors
from aq_jax.core.frameworks import to_jax_dtype
from aq_jax.core.qtensor import QTensor
from aq_jax.core.sharding import build_sharded, qtensor_shardings, shard_counts
from aq_jax.errors import FormatError
from aq_jax.quantizers.tree import map_named


def save(path: str | os.PathLike[str], tree: Any) -> Path:
    """Write a tree of arrays and QTensors as an Orbax checkpoint that `load` verifies.

    The tree consists of mappings whose keys are strings or integers, of lists and of tuples. The names of its leaves
    are their paths, joined by dots. An object that occurs several times is stored once. All processes of a program may
    call this with the same arrays; the first one writes.

    Args:
        path: The folder to write; it must not exist, and appears whole, or not at all.
        tree: A tree of JAX, NumPy or torch arrays, of any dtype that a table has, and of QTensors, also stacked ones. A
            variable of Flax NNX counts as its value, so that `nnx.state(model)` is such a tree; of a weight that
            `aq_jax.prepare` made, the QTensor is stored.

    Returns:
        The absolute path of the folder.

    Raises:
        AqError: for a leaf that is no array, an array of which this process has only a part, a QTensor whose parts do
            not fit each other, and a disk that cannot be written to.
        FormatError: if the path exists; for a kind of node or a key that a checkpoint cannot hold, and for two leaves
            of one name.

    >>> import jax.numpy as jnp, tempfile
    >>> import aq_jax as aq
    >>> path = tempfile.mkdtemp() + "/checkpoint"
    >>> tree = {"dense": {"kernel": aq.quantize(jnp.ones((2, 8)), "int4"), "bias": jnp.zeros(2)}, "empty": jnp.ones(0)}
    >>> sorted(file.name for file in save(path, tree).iterdir() if file.is_dir())
    ['aq_jax_arrays', 'aq_jax_metadata']
    """
    return write_tensors(path, *tree_to_json(tree))


def load(path: str | os.PathLike[str], shardings: Any = None) -> Any:
    """Read the tree that `save` or `from_table` wrote, and compare every array with its digest.

    Mappings come back as dictionaries, arrays as JAX arrays. int64 becomes a checked int32, and float64 float32, while
    JAX's x64 mode is off.

    The digest of an array covers all of it. So each process reads every array whole into host memory, checks it, and
    puts on its devices what their sharding says: nothing reaches a device unchecked, even where a process has only some
    of the devices. The shardings at the time of saving make no difference.

    Args:
        path: The folder of the checkpoint.
        shardings: The shardings of the arrays; by default they go to JAX's default device. One `jax.sharding.Sharding`
            for all, or a tree or flat mapping of them whose leaves are named as those of the checkpoint; leaves that it
            lacks, or has None for, go to the default. A QTensor takes the NamedSharding of its weight, and its parts
            are cut along the same axes, as by `aq_jax.WeightLoader.load_sharded`; a QTensor of shardings has one for
            each part.

    Raises:
        FileNotFoundError: if there is no such folder.
        FormatError: if it is no checkpoint of this format, or of a later version; for shardings of unknown leaves, or
            that do not fit.
        IntegrityError: if metadata or arrays cannot be read, or were damaged or changed.
        AqError: for a value that does not fit its dtype, an int64 that does not fit JAX's int32, say.

    >>> import jax.numpy as jnp, tempfile
    >>> import aq_jax as aq
    >>> path = tempfile.mkdtemp() + "/checkpoint"
    >>> _ = save(path, {"w": aq.quantize(jnp.ones((2, 8)), "int8"), "layers": [jnp.arange(3)]})
    >>> load(path)
    {'w': QTensor(int8[2, 8], QuantSpec(bits=8, per_channel=True, group_size=0, rotation=0)),
     'layers': [Array([0, 1, 2], dtype=int32)]}
    >>> mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> w = load(path, {"w": jax.NamedSharding(mesh, jax.P("x", None))})["w"]
    >>> w.shape, tuple(w.codes.sharding.spec), w.scale.shape, tuple(w.scale.sharding.spec)
    ((2, 8), ('x', None), (2, 1), ('x', None))
    """
    folder = existing_folder(path)
    metadata = read_metadata(folder)
    on = _leaf_shardings(shardings, metadata)
    host = read_tensors(folder, metadata, metadata.tensors)
    wanted = {(stored, on.get(name)) for name, stored in metadata.leaves.items()}
    for name, value in host.items():
        if not isinstance(value, QTensor):
            host[name] = to_jax_dtype(metadata.tensors[name].upcast(value, name), name)
    unsharded = [name for name in host if (name, None) in wanted]
    # One transfer for all leaves: each costs more than its bytes do.
    arrays = jax.device_put([host[name] for name in unsharded])
    loaded: dict[tuple[str, Any], Any] = {(name, None): a for name, a in zip(unsharded, arrays, strict=True)}
    for name, parts in wanted:
        if parts is not None:
            loaded[name, parts] = _shard(host[name], parts)
    return tree_from_json(metadata.tree, lambda leaf: loaded[metadata.leaves[leaf], on.get(leaf)])


def _leaf_shardings(shardings: Any, metadata: Metadata) -> dict[str, tuple[Sharding, ...]]:
    """Find the sharding of each leaf's arrays, by the leaf's name; a leaf without any is left out.

    Raises:
        FormatError: for names of no leaf, and shardings that do not fit.
    """
    given: dict[str, Any]
    if isinstance(shardings, Sharding):
        given = dict.fromkeys(metadata.leaves, shardings)
    else:
        tree = dict(shardings) if isinstance(shardings, Mapping) else shardings
        given = {}
        map_named(given.__setitem__, tree, lambda node: isinstance(node, Sharding | QTensor))
    for name in given:
        if name not in metadata.leaves:
            near = difflib.get_close_matches(name, metadata.leaves, 1, cutoff=0.0)
            raise FormatError(f"shardings: the checkpoint has no {name!r}; the nearest is {near[0] if near else ''!r}")
    return {name: _part_shardings(name, metadata.tensors[metadata.leaves[name]], on) for name, on in given.items()}


def _part_shardings(name: str, tensor: TensorEntry, sharding: Any) -> tuple[Sharding, ...]:
    shapes = [array.abstract.shape for array in tensor.arrays.values()]
    parts: tuple[Any, ...] = (sharding,)
    if tensor.spec and isinstance(sharding, QTensor):
        parts = tuple(getattr(sharding, part) for part in tensor.arrays)
    elif tensor.spec and isinstance(sharding, Sharding):
        parts = qtensor_shardings(sharding, tensor.shape, tensor.spec, name)[: len(shapes)]
    if not all(isinstance(part, Sharding) for part in parts):
        raise FormatError(f"shardings: {name} is {sharding!r}; wanted jax.sharding.Sharding, or a QTensor of them")
    for shape, part in zip(shapes, parts, strict=True):
        shard_counts(part, shape, name)  # refuses what does not fit
    return parts


def _shard(value: Any, shardings: tuple[Sharding, ...]) -> Any:
    """Spread an array, or the arrays of a QTensor, over the devices; each process fills its own."""
    if isinstance(value, QTensor):
        parts = {part: _shard(getattr(value, part), (on,)) for part, on in zip(PARTS, shardings, strict=False)}
        return dataclasses.replace(value, **parts)
    rows = np.atleast_1d(value).view()
    rows.flags.writeable = False  # no device takes over memory that another may have as well
    return build_sharded(value.shape, value.dtype, shardings[0], lambda start, stop: rows[start:stop])
