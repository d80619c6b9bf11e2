"""Hugging Face folders to tables, and back to folders that transformers and sentence-transformers load."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from aq_jax.config import Compression, QuantizationConfig
from aq_jax.converters.checkpoint import SAFE_DTYPES, SINGLE, open_checkpoint
from aq_jax.converters.prequantized import check_quantizable
from aq_jax.converters.sidefiles import (
    RECORD,
    check_side_files,
    copy_side_files,
    model_place,
    recorded,
    side_files,
    side_files_beside,
)
from aq_jax.errors import ConfigError, FormatError
from aq_jax.loader import WeightLoader
from aq_jax.pipeline import Progress, Solved, Source, TableSource, Written, write_model
from aq_jax.store import TableWriter
from aq_jax.store.files import replacing
from aq_jax.store.folders import Folder, is_url, split_url
from aq_jax.store.manifest import MANIFEST, entries_of

PACKAGE = "package:"
_TO_SAFE = {name: safe for safe, name in SAFE_DTYPES.items()}


def resolve_source(source: str | os.PathLike[str]) -> Path:
    """The folder that a config's `source` means: a path, or `package:NAME/FOLDER` inside an installed package.

    The package is located, not imported.

    Raises:
        ConfigError: if the package is not installed.
    """
    text = str(source)
    if not text.startswith(PACKAGE):
        return Path(text)
    package, _, inside = text.removeprefix(PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"source = {text!r}: no package {package!r} is installed; try: pip install --no-deps {package}"
        )
    return Path(spec.submodule_search_locations[0], inside)


def source_folder(source: str | os.PathLike[str]) -> Folder:
    """The folder that a config's `source` means, which may be a URL too (see `resolve_source`)."""
    return Folder(source if is_url(source) else resolve_source(source))


def to_table(
    model_dir: str | os.PathLike[str],
    path: str | os.PathLike[str],
    config: QuantizationConfig | None = None,
    *,
    solve: Callable[[Source, Path], Solved | None] | None = None,
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
        solve: given the weights and the folder, quantizes those that the running model is needed for; `convert`, which
            does so for solver = "gptq", is the way to call it.
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
    folder, (target, name) = source_folder(model_dir), split_url(path)
    beside = check_side_files(folder, target)
    TableWriter(path, version=2 if config else 1, compression=compression)  # refuses what could not be written
    if solve and folder.local is None:
        raise ConfigError(f"{folder}: is not on this machine, and solver = 'gptq' runs the model; fetch the folder")
    with open_checkpoint(folder, allow_pickle) as checkpoint, ExitStack() as stack:
        notes = check_quantizable(checkpoint.shapes, checkpoint.folder, config is not None) + checkpoint.notes
        solved = solve(checkpoint, folder.local) if solve and folder.local is not None else None
        to = target.local / name if target.local is not None else stack.enter_context(target.writing(name))
        done = write_model(
            checkpoint, to, config, solved=solved, compression=compression, progress=progress, more=recorded(beside)
        )
        done.path = str(path)
    copy_side_files(folder, target, beside.names)
    done.notes += notes + beside.notes
    return done


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
    out = Path(out_dir)
    if out.suffix == ".safetensors" or (out.exists() and not out.is_dir()):
        raise FormatError(f"{out}: wanted a folder, in which model.safetensors and its config files are written")
    target = Folder(out)
    with WeightLoader(path) as table:
        beside = source_folder(config_from) if config_from is not None else Folder(_folder_of(path))
        if config_from is not None:
            found = side_files(beside, target)
        elif Path(path).is_dir() and (shards := entries_of(Path(path))):  # a folder of one model, and of nothing else
            found = side_files(beside, target, {MANIFEST, *(shard.file for shard in shards)})
        else:
            found = side_files_beside(beside, table.config.get(RECORD), target)
        check_side_files(beside, target, found)
        target.check_writable(SINGLE)
        source, done = TableSource(table, allow_quantized=True), Written(str(out / model_place(beside) / SINGLE))
        started = time.perf_counter()
        write_safetensors(source, Path(done.path), progress)
    copy_side_files(beside, target, found.names)
    done.source_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in source.shapes.values())
    done.bytes = os.stat(done.path).st_size
    done.seconds["write"] = time.perf_counter() - started
    done.notes += found.notes
    return done


def _folder_of(table: str | os.PathLike[str]) -> Path:
    """Where a table's config and tokenizer files are: beside a file, and in a folder of files."""
    return Path(table) if Path(table).is_dir() else Path(table).parent


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
            array = np.ascontiguousarray(source.array(origin)).reshape(-1).view(np.uint8)
            file.write(array.data)
            if progress:
                progress(name, array.nbytes, end)
