"""Convert Hugging Face folders to tables, and back to folders that transformers and sentence-transformers load."""

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
from aq_jax.conversion.model_files import is_weight
from aq_jax.conversion.prequantized import check_quantizable
from aq_jax.conversion.sidefiles import check_side_files, copy_side_files, side_files, weights_path
from aq_jax.conversion.source import Source
from aq_jax.conversion.write import ConversionResult
from aq_jax.converters.checkpoint import INDEX, SINGLE
from aq_jax.converters.formats.locations import resolve_source, source_folder
from aq_jax.converters.schemes import open_folder
from aq_jax.converters.tables import open_tables
from aq_jax.errors import FormatError
from aq_jax.io.tensorfile import SAFETENSORS_DTYPES, WRITER, read_header
from aq_jax.progress import Progress
from aq_jax.store.files import atomic_write
from aq_jax.store.folders import Folder

__all__ = ["from_table", "resolve_source", "to_table", "write_folder", "write_safetensors"]

_TO_SAFE = {name: safe for safe, name in SAFETENSORS_DTYPES.items()}


def to_table(
    model_dir: str | os.PathLike[str],
    path: str | os.PathLike[str],
    config: QuantizationConfig | None = None,
    *,
    allow_pickle: bool = False,
    compression: Compression = "none",
    progress: Progress | None = None,
) -> ConversionResult:
    """Write a folder of weights as a table, and copy the model's other files beside it.

    Args:
        model_dir: The path or URL (such as s3://bucket/model) of a folder that holds model.safetensors, or shards with
            model.safetensors.index.json, or pytorch_model.bin.
        path: The path or URL of a .parquet or .arrow file; it appears whole, or not at all.
        config: The quantization (schema V2); None writes plain weights (V1).
        allow_pickle: Whether to read pytorch_model.bin if there is nothing safer; needs torch >= 2.10.
        compression: "zstd" compresses the weights too.
        progress: A callback that gets each tensor's name, its bytes, and the bytes of all.

    Raises:
        ConfigError: if the folder is inside a package that is not installed, or at an invalid URL; if it is not on this
            machine, and a solver runs the model.
        FileNotFoundError: if there is no such folder.
        FormatError: for files that are missing or damaged, or a pickle without allow_pickle; for weights that are
            quantized already, unless they are written as they are; for an output whose folder holds another model's
            config or tokenizer files.
        AqError: for a tensor that cannot be quantized.
        OSError: for an output that cannot be written, before any long work.

    >>> import safetensors.numpy, tempfile
    >>> folder = tempfile.mkdtemp()
    >>> safetensors.numpy.save_file({"w": np.ones((4, 8), np.float32)}, folder + "/model.safetensors")
    >>> to_table(folder, folder + "/m.parquet", QuantizationConfig("int8")).quantized
    {'w': 1.0}
    """
    folder = source_folder(model_dir, allow_pickle)
    with open_folder(folder, packed=config is None, allow_pickle=allow_pickle) as source:
        return corridor.to_table(source, path, config, compression=compression, progress=progress)


def from_table(
    path: str | os.PathLike[str], out_dir: str | os.PathLike[str], config_from: str | os.PathLike[str] | None = None
) -> Path:
    """Write a table as model.safetensors, dequantized, each tensor in its dtype before quantization.

    Args:
        path: The path of a table of schema V1 or V2.
        out_dir: The folder to write, with a / at its end if its name is as that of a file of weights;
            model.safetensors in it appears whole, or not at all. One that aq_jax wrote is replaced.
        config_from: A model's folder, from which all files but weights are copied; by default the table's folder, from
            which the files are copied that came with the table (`write_folder` notes what is left behind).

    Returns:
        The path of model.safetensors, which is in the folder that modules.json names, if that has the model's config.

    Raises:
        FileNotFoundError: if there is no such table.
        FormatError: for an invalid table or folder, a dtype that safetensors does not have, and a folder that holds
            another model's config or tokenizer files, or weights that aq_jax did not write.
        IntegrityError: if a row was damaged or changed.
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
) -> ConversionResult:
    """Do what `from_table` does, and list in `notes` what was left behind.

    Args:
        path, out_dir, config_from: See `from_table`.
        progress: A callback that gets each tensor's name, its bytes, and the bytes of all.

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
) -> ConversionResult:
    """Write any source as a folder of safetensors, with the files that go beside it.

    Args:
        source: A source whose tensors are plain arrays.
        out_dir, config_from, progress: See `write_folder`.

    Raises:
        FormatError, OSError: as `from_table`.
    """
    out = Path(out_dir)
    if out.exists() and not out.is_dir():
        raise FormatError(f"{out}: wanted a folder, in which model.safetensors and its config files are written")
    if is_weight(out.name) and not os.fspath(out_dir).endswith("/"):
        raise FormatError(
            f"{out}: is a name of a file of weights; wanted a folder, in which model.safetensors and its config files "
            "are written: for one of that name, end it with /"
        )
    target = Folder(out)
    found = source.side_files(target) if config_from is None else side_files(source_folder(config_from), target)
    check_side_files(found, target)
    target.check_writable(SINGLE)
    beside = found.origin or source.config_folder
    subfolder = weights_path(beside) if isinstance(beside, Folder) else ""
    _check_weights(Folder(out / subfolder))
    notes = [] if source.quantized else check_quantizable(source.shapes, source.folder, quantizes=False)
    done, started = ConversionResult(str(out / subfolder / SINGLE)), time.perf_counter()
    write_safetensors(source, Path(done.path), progress)
    copy_side_files(found, target)
    done.source_bytes = sum(map(source.nbytes, source.shapes))
    done.bytes = os.stat(done.path).st_size
    done.seconds["write"] = time.perf_counter() - started
    done.notes += [*source.notes, *found.notes, *notes]
    return done


def _check_weights(folder: Folder) -> None:
    """Refuse to write into a folder of weights that aq_jax did not write: they may be the only originals.

    Raises:
        FormatError: naming the file.
    """
    for name in (SINGLE, INDEX):
        if folder.holds(name) and not _is_own(folder, name):
            raise FormatError(
                f"{folder.join(name)}: already exists, and aq_jax did not write it: these may be the only original "
                "weights; write to another folder, or remove it"
            )


def _is_own(folder: Folder, name: str) -> bool:
    """Return whether aq_jax wrote a file of safetensors."""
    try:
        return folder.state(name) is not None and WRITER in read_header(folder, name)[1].items()
    except FormatError:  # damaged, or no safetensors: no file that aq_jax wrote
        return False


def write_safetensors(source: Source, path: Path, progress: Progress | None = None) -> None:
    """Stream a source into a safetensors file; tied tensors are written under each of their names.

    The library's own writer wants all tensors in memory at once.
    """
    stored = {name: name for name in source.shapes} | dict(source.aliases)
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | dict([WRITER])}
    end = 0
    for name, origin in stored.items():
        shape, dtype = source.shapes[origin]
        if name in header:
            raise FormatError(f"{name}: is the name of safetensors' own metadata; rename the tensor")
        if dtype.name not in _TO_SAFE:
            raise FormatError(f"{name}: safetensors has no dtype {dtype.name}; known are {', '.join(_TO_SAFE)}")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _TO_SAFE[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, origin in stored.items():
            array = np.ascontiguousarray(np.asarray(source.read(origin))).reshape(-1).view(np.uint8)
            file.write(array.data)
            if progress:
                progress(name, array.nbytes, end)
