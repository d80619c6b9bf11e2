"""Checkpoints to tables, and back."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aq_jax.config import Compression, QuantizationConfig
from aq_jax.converters.orbax.disk import ARRAYS, METADATA, existing_folder, refuse_existing
from aq_jax.converters.orbax.foreign import foreign_source
from aq_jax.converters.orbax.metadata import Known, read_metadata
from aq_jax.converters.orbax.source import Source
from aq_jax.converters.orbax.tensors import read_tensors, write_tensors
from aq_jax.converters.prequantized import check_quantizable
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import FormatError
from aq_jax.loader import WeightLoader, as_v2, packed_rows, plain_rows
from aq_jax.pipeline import Progress, Written, write_model
from aq_jax.store import Row, TableWriter, open_table
from aq_jax.store.folders import Folder

_ROW = ("dtype", "quant_type", "solver", "cosine", "rel_mse")


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

    >>> import tempfile
    >>> from orbax.checkpoint import v1 as ocp
    >>> from aq_jax import QuantizationConfig, load
    >>> folder = tempfile.mkdtemp()
    >>> ocp.save(folder + "/run", {"dense": {"kernel": np.ones((4, 8), np.float32)}})
    >>> to_table(folder + "/run", folder + "/m.parquet", QuantizationConfig("int8")).quantized
    {'dense.kernel': 1.0}
    >>> list(load(folder + "/m.parquet"))
    ['dense.kernel']
    """
    folder = existing_folder(checkpoint)
    TableWriter(path, version=2 if config else 1, compression=compression)  # refuses what could not be written
    if checkpointable is None and ((folder / METADATA).is_dir() or (folder / ARRAYS).is_dir()):
        known = read_metadata(folder)
        if config is None:
            return _copied(folder, known, path, compression, progress)
        source, notes = _own_source(folder, known), []
    else:
        source, notes = foreign_source(folder, checkpointable)
    notes += check_quantizable(source.shapes, Folder(folder), config is not None)
    done = write_model(source, path, config, compression=compression, progress=progress)
    done.notes += notes
    return done


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

    >>> import tempfile
    >>> import aq_jax as aq
    >>> from aq_jax.converters.orbax import load
    >>> folder = tempfile.mkdtemp()
    >>> aq.save(folder + "/m.parquet", {"w": aq.quantize(np.ones((2, 8), np.float32), "int8")})
    >>> load(from_table(folder + "/m.parquet", folder + "/checkpoint"))
    {'w': QTensor(int8[2, 8], QuantSpec(bits=8, per_channel=True, group_size=0, rotation=0))}
    """
    refuse_existing(Path(checkpoint_path).absolute())
    with open_table(table) as reader, WeightLoader(table) as loader:
        tensors, rows = {}, {}
        for name in reader.names:
            info, *more = reader.pieces(name)
            if info.quantized:
                tensors[name] = loader.get_quantized(name, copy=False)
            elif info.quant_type == "fp16":
                data = np.concatenate([reader.read(piece.position).data for piece in (info, *more)])
                tensors[name] = data.view(np.float16).reshape(info.shape)
            else:
                tensors[name] = loader.get_layer(name, "numpy", copy=False)
            # Of several pieces, each has its own cosine and error.
            known = _ROW[:-2] if more else _ROW
            rows[name] = {key: value for key in known if (value := getattr(info, key)) is not None}
        tree = [[name, name] for name in tensors] + [[alias, stored] for alias, stored in reader.aliases.items()]
        config = reader.metadata.config if reader.metadata else {}
        return write_tensors(checkpoint_path, {"dict": tree}, tensors, rows, config)


def _own_source(folder: Path, known: Known) -> Source:
    """The tensors of a checkpoint of ours, to be quantized.

    Raises:
        FormatError: if one of them is quantized already.
    """
    for name, tensor in known.tensors.items():
        if tensor.spec:
            raise FormatError(
                f"{folder}: {name}: is quantized already, and would be rounded twice; quantize what it was made "
                "from, or write it as it is, without a config"
            )

    def read(names: list[str]) -> dict[str, np.ndarray]:
        return {name: known.tensors[name].widened(a) for name, a in read_tensors(folder, known, names).items()}

    shapes = {name: (tensor.arrays["array"].like.shape, tensor.dtype) for name, tensor in known.tensors.items()}
    return Source(known.sizes, read, shapes, known.aliases)


def _copied(
    folder: Path, known: Known, path: str | os.PathLike[str], compression: Compression, progress: Progress | None
) -> Written:
    """The tensors of a checkpoint of ours as rows, as they are."""
    done, started = Written(str(path)), time.perf_counter()
    sizes = known.sizes
    source = Source(sizes, lambda names: read_tensors(folder, known, names))
    quantized = sum(tensor.spec is not None for tensor in known.tensors.values())
    version = 2 if quantized or any("quant_type" in tensor.row for tensor in known.tensors.values()) else 1
    with TableWriter(path, version=version, config=known.config, compression=compression) as table:
        for name, tensor in known.tensors.items():
            for row in _rows(name, source.array(name), tensor.row):
                table.write(as_v2(row) if version == 2 else row)
            done.source_bytes += tensor.nbytes
            if progress:
                progress(name, tensor.nbytes, sum(sizes.values()))
        for alias, stored in known.aliases.items():
            table.alias(alias, stored)
    if quantized:
        done.notes.append(f"{quantized} tensors were quantized already, and are written as they are")
    done.bytes = os.stat(path).st_size
    done.seconds["write"] = time.perf_counter() - started
    return done


def _rows(name: str, value: Any, known: Mapping[str, Any]) -> Iterator[Row]:
    """The rows of a tensor, with what the table knew that it came from."""
    if not isinstance(value, QTensor):
        half = known.get("quant_type") == "fp16"
        yield from plain_rows(name, value, *((known["dtype"], "fp16") if half else ()))
        return
    for row in packed_rows(name, value, known.get("dtype", "float32")):
        yield dataclasses.replace(row, **{key: known[key] for key in ("solver", "cosine", "rel_mse") if key in known})
