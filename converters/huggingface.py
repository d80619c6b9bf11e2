"""Hugging Face folders to tables, and back to folders that transformers and sentence-transformers load."""

from __future__ import annotations

import json
import math
import os
import struct
import time
from pathlib import Path

import numpy as np

from aq_jax.config import Compression, QuantizationConfig
from aq_jax.conversion import corridor
from aq_jax.conversion.sidefiles import check_side_files, copy_side_files, model_place, side_files
from aq_jax.conversion.source import Source
from aq_jax.conversion.write import Written
from aq_jax.converters.checkpoint import SINGLE, open_checkpoint
from aq_jax.converters.formats.locations import resolve_source, source_folder
from aq_jax.converters.tables import open_tables
from aq_jax.errors import FormatError
from aq_jax.io.tensorfile import SAFE_DTYPES
from aq_jax.progress import Progress
from aq_jax.store.files import replacing
from aq_jax.store.folders import Folder

__all__ = ["from_table", "resolve_source", "to_table", "write_folder", "write_safetensors"]

_TO_SAFE = {name: safe for safe, name in SAFE_DTYPES.items()}


def to_table(
    model_dir: str | os.PathLike[str],
    path: str | os.PathLike[str],
    config: QuantizationConfig | None = None,
    *,
    allow_pickle: bool = False,
    compression: Compression = "none",
    progress: Progress | None = None,
) -> Written:
    """Write a folder of weights to a table, and copy what else a model is loaded from beside it: all but weights.

    Args:
        model_dir: holds model.safetensors, or shards with model.safetensors.index.json, or pytorch_model.bin; may be
            the URL of a folder, such as s3://bucket/model.
        path: .parquet or .arrow, or a URL of one; appears whole, or not at all.
        config: None writes plain weights (schema V1), anything else quantizes them on the way (V2).
        allow_pickle: read pytorch_model.bin if there is nothing safer; needs torch >= 2.10.
        compression: "zstd" compresses the weights too.
        progress: called with each tensor's name, its bytes, and the bytes of all.

    Raises:
        ConfigError: if the folder is inside a package that is not installed, or at a URL that is none; if it is not on
            this machine, and weights are to be solved on the running model.
        FileNotFoundError: if there is no such folder.
        FormatError: for files that are missing, damaged, or a pickle that was not asked for; for weights that are
            quantized already, unless they are written as they are; for an output whose folder holds another model's
            config or tokenizer files.
        AqError: for a tensor that cannot be quantized.
        OSError: for an output that cannot be written, before anything takes long.

    >>> import safetensors.numpy, tempfile
    >>> folder = tempfile.mkdtemp()
    >>> safetensors.numpy.save_file({"w": np.ones((4, 8), np.float32)}, folder + "/model.safetensors")
    >>> to_table(folder, folder + "/m.parquet", QuantizationConfig("int8")).quantized
    {'w': 1.0}
    """
    with open_checkpoint(source_folder(model_dir), allow_pickle) as source:
        return corridor.to_table(source, path, config, compression=compression, progress=progress)


def from_table(
    path: str | os.PathLike[str], out_dir: str | os.PathLike[str], config_from: str | os.PathLike[str] | None = None
) -> Path:
    """Write a table as model.safetensors, dequantized, each tensor in the dtype that it had before.

    Args:
        path: a table of schema V1 or V2.
        out_dir: the folder; model.safetensors in it appears whole, or not at all.
        config_from: a model's folder, from which all is copied but weights; by default the folder of the table, from
            which those files are copied that came there with the table (`write_folder` says what is left behind).

    Returns:
        The path of model.safetensors, which is in the folder that modules.json names, if that has the model's config.

    Raises:
        FileNotFoundError: if there is no such table.
        FormatError: for a table or a folder that is none, a dtype that safetensors does not have, and a folder that
            holds another model's config or tokenizer files.
        IntegrityError: if a row is not what was written.
        OSError: for a folder that cannot be written to.

    >>> import safetensors.numpy, tempfile
    >>> from aq_jax import quantize, save
    >>> folder = tempfile.mkdtemp()
    >>> save(folder + "/m.parquet", {"w": quantize(np.ones((2, 8), np.float32), "int8")})
    >>> safetensors.numpy.load_file(from_table(folder + "/m.parquet", folder + "/hf"))["w"].sum()
    np.float32(16.0)
    """
    return Path(write_folder(path, out_dir, config_from).path)


def write_folder(
    path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    config_from: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Written:
    """Do what `from_table` does, and say in `notes` what was left behind.

    Args:
        path, out_dir, config_from: as in `from_table`.
        progress: called with each tensor's name, its bytes, and the bytes of all.

    Raises:
        As `from_table`.

    >>> import tempfile
    >>> from aq_jax import save
    >>> folder = tempfile.mkdtemp()
    >>> save(folder + "/m.parquet", {"w": np.ones(2, np.float32)})
    >>> write_folder(folder + "/m.parquet", folder + "/hf").source_bytes
    8
    """
    with open_tables(path) as source:
        return write_source(source, out_dir, config_from, progress)


def write_source(
    source: Source,
    out_dir: str | os.PathLike[str],
    config_from: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write any source as a folder of safetensors, with what goes beside it.

    Args:
        source: that gives no QTensors.
        out_dir, config_from, progress: as in `write_folder`.

    Raises:
        FormatError, OSError: as `from_table`.
    """
    out = Path(out_dir)
    if out.suffix == ".safetensors" or (out.exists() and not out.is_dir()):
        raise FormatError(f"{out}: wanted a folder, in which model.safetensors and its config files are written")
    target = Folder(out)
    found = source.side_files(target) if config_from is None else side_files(source_folder(config_from), target)
    check_side_files(found, target)
    target.check_writable(SINGLE)
    beside = found.origin or source.home
    place = model_place(beside) if isinstance(beside, Folder) else ""
    done, started = Written(str(out / place / SINGLE)), time.perf_counter()
    write_safetensors(source, Path(done.path), progress)
    copy_side_files(found, target)
    done.source_bytes = sum(map(source.size, source.shapes))
    done.bytes = os.stat(done.path).st_size
    done.seconds["write"] = time.perf_counter() - started
    done.notes += found.notes
    return done


def write_safetensors(source: Source, path: Path, progress: Progress | None = None) -> None:
    """Stream a source into a safetensors file; tied tensors are written under each of their names.

    The library's own writer wants all tensors in memory at once.
    """
    stored = {name: name for name in source.shapes} | dict(source.aliases)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, origin in stored.items():
        shape, dtype = source.shapes[origin]
        if name in header:
            raise FormatError(f"{name}: is what safetensors calls its own notes; no tensor may have that name")
        if dtype.name not in _TO_SAFE:
            raise FormatError(f"{name}: safetensors has no dtype {dtype.name}; known are {', '.join(_TO_SAFE)}")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _TO_SAFE[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, origin in stored.items():
            array = np.ascontiguousarray(np.asarray(source.read(origin))).reshape(-1).view(np.uint8)
            file.write(array.data)
            if progress:
                progress(name, array.nbytes, end)
