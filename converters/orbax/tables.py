"""Checkpoints to tables, and back."""

from __future__ import annotations

import os
from pathlib import Path

from aq_jax.config import Compression, QuantizationConfig
from aq_jax.conversion import corridor
from aq_jax.conversion.write import Written
from aq_jax.converters.orbax.disk import refuse_existing
from aq_jax.converters.orbax.sources import open_checkpoint
from aq_jax.converters.orbax.tensors import write_tensors
from aq_jax.converters.tables import open_tables
from aq_jax.progress import Progress


def to_table(
    checkpoint: str | os.PathLike[str],
    path: str | os.PathLike[str],
    config: QuantizationConfig | None = None,
    *,
    checkpointable: str | None = None,
    compression: Compression = "none",
    progress: Progress | None = None,
) -> Written:
    """Write a checkpoint to a table: one that `save` or `from_table` wrote, or any of Orbax's that holds arrays.

    Names are paths in the tree, joined by dots; a variable of Flax NNX, which holds a `value` and nothing else, has its
    own. QTensors are written as they are. Tensors of ours are compared with their digests; those of other checkpoints,
    which have none, are taken as Orbax reads them. What is no array in those, such as the number of a step,
    is left out, and `notes` says so.

    Args:
        checkpoint: its folder.
        path: .parquet or .arrow; appears whole, or not at all.
        config: quantizes the tensors on the way; none of them may be quantized already.
        checkpointable: which tree of another checkpoint, if it has more than one, such as "params".
        compression: "zstd" compresses the weights too.
        progress: called with each tensor's name, its bytes, and the bytes of all.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        FormatError: for a folder that is none, one of several trees of which none was named, two arrays of one name, a
            dtype that a table does not have, and for tensors that are quantized already and would be rounded twice.
        IntegrityError: if a tensor is not what was written, or cannot be read.
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
        table: of schema V1 or V2, or a folder of them.
        checkpoint_path: the folder; it must not exist, and appears whole, or not at all.

    Returns:
        The absolute path of the folder.

    Raises:
        FileNotFoundError: if there is no such table.
        FormatError: for a table that is none, and if there is something at the checkpoint's path.
        IntegrityError: if a row is not what was written.
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
        return write_tensors(checkpoint_path, {"dict": tree}, tensors, source.rows, source.made)
