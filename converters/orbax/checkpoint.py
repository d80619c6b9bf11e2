"""Trees of arrays and QTensors to checkpoints, and back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax

from aq_jax.converters.orbax.disk import existing_folder
from aq_jax.converters.orbax.metadata import read_metadata
from aq_jax.converters.orbax.placing import leaf_shardings, place
from aq_jax.converters.orbax.tensors import read_tensors, write_tensors
from aq_jax.converters.orbax.trees import build_tree, skeleton
from aq_jax.core.frameworks import canonical
from aq_jax.core.qtensor import QTensor


def save(path: str | os.PathLike[str], tree: Any) -> Path:
    """Write a tree of arrays and QTensors as an Orbax checkpoint that `load` verifies.

    The tree is made of mappings with keys that are strings or integers, of lists and of tuples. Its leaves are named by
    their paths, joined by dots. A value that stands at several places (the same object) is stored once.
    All processes of a program may call this with the same arrays, of which the first writes.

    Args:
        path: the folder; it must not exist, and appears whole, or not at all.
        tree: of JAX, NumPy or torch arrays, of any dtype that a table has, and QTensors, also stacked ones. A variable
            of Flax NNX is what it holds, so that `nnx.state(model)` is such a tree; of what `aq_jax.prepare` made, the
            QTensor is stored.

    Returns:
        The absolute path of the folder.

    Raises:
        AqError: for a leaf that is no array, an array of which this process has only a part, a QTensor whose parts do
            not belong together, and a disk that cannot be written to.
        FormatError: if there is something at that path; for a kind of node or a key that a checkpoint cannot hold, and
            for two leaves of one name.

    >>> import jax.numpy as jnp, tempfile
    >>> import aq_jax as aq
    >>> path = tempfile.mkdtemp() + "/checkpoint"
    >>> tree = {"dense": {"kernel": aq.quantize(jnp.ones((2, 8)), "int4"), "bias": jnp.zeros(2)}, "empty": jnp.ones(0)}
    >>> sorted(file.name for file in save(path, tree).iterdir() if file.is_dir())
    ['aq_jax_arrays', 'aq_jax_metadata']
    """
    return write_tensors(path, *skeleton(tree))


def load(path: str | os.PathLike[str], shardings: Any = None) -> Any:
    """The tree that `save` or `from_table` wrote, every array compared with its digest.

    Mappings come back as dictionaries, arrays as JAX arrays. int64 becomes a checked int32, and float64 float32, while
    JAX's x64 mode is off.

    The digest of an array is over all of it, so each process reads all of every array into host memory, checks it, and
    puts on its devices what their sharding says: nothing reaches a device unchecked, also where a process has but some
    of the devices. How the arrays were sharded when they were saved makes no difference.

    Args:
        path: the folder.
        shardings: where arrays go; by default to JAX's default device. One `jax.sharding.Sharding` for all, or a tree
            or flat mapping of them whose leaves are named as those of the checkpoint: what it lacks, or has None for,
            goes where it goes by default. A QTensor takes the NamedSharding of its weight, and its parts are cut along
            the same axes, as by `aq_jax.WeightLoader.load_sharded`; a QTensor of shardings says it for each part.

    Raises:
        FileNotFoundError: if there is no such folder.
        FormatError: if it is no checkpoint of this format, or of a later version; for shardings of what is not there,
            or that do not fit.
        IntegrityError: if metadata or arrays are not what was written, or cannot be read.
        AqError: for an int64 that does not fit JAX's int32.

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
    known = read_metadata(folder)
    where = leaf_shardings(shardings, known)
    host = read_tensors(folder, known, known.tensors)
    wanted = {(stored, where.get(name)) for name, stored in known.leaves.items()}
    for name, value in host.items():
        host[name] = value if isinstance(value, QTensor) else canonical(known.tensors[name].widened(value), name)
    plain = [name for name in host if (name, None) in wanted]
    # One transfer for all leaves: each costs more than its bytes do.
    placed: dict[tuple[str, Any], Any] = {
        (name, None): value for name, value in zip(plain, jax.device_put([host[n] for n in plain]), strict=True)
    }
    for name, parts in wanted:
        if parts is not None:
            placed[name, parts] = place(host[name], parts)
    return build_tree(known.tree, lambda leaf: placed[known.leaves[leaf], where.get(leaf)])
