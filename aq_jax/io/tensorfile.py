"""Read headers of safetensors files; the library and the rules here check them first."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import safetensors

from aq_jax.errors import FormatError
from aq_jax.store import DTYPES
from aq_jax.store.folders import Folder
from aq_jax.store.jsonfile import parse_json
from aq_jax.store.schema import MAX_AXES

# The dtype names of safetensors -> those of the table.
SAFETENSORS_DTYPES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
WRITER = ("writer", "aq_jax")
"""The entry of a file's metadata that says that aq_jax wrote it."""
# The most bytes of JSON: each becomes up to fifteen of memory, here and in the library, whose own limit is 100 MB.
_MAX_HEADER = 8 << 20


@dataclass(frozen=True, slots=True)
class Extent:
    """The extent of a tensor's bytes: a file of a folder, and an offset in it."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """The number of bytes.

        >>> Extent("model.safetensors", 8, (3, 5), "bfloat16").size
        30
        """
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_header(folder: Folder, file: str, most: int = _MAX_HEADER) -> tuple[dict[str, Extent], dict[str, str]]:
    """Read the extents of the tensors in a safetensors file, here or at a URL, and its metadata.

    The library checks bounds, overlaps and sizes; no tensor is read.

    Args:
        folder: The folder that holds the file.
        file: The file's name.
        most: The most bytes that its header may have.

    Raises:
        FormatError: if it is damaged, if its header is too long or repeats a name, and for dtypes and shapes that a
            table cannot hold.
    """
    path = folder.join(file)
    start = 8 + int.from_bytes(folder.read(file, 0, 8), "little")
    if start > 8 + most:
        raise FormatError(
            f"{path}: not a safetensors file, or one of very many tensors: its header would have {start - 8} bytes; "
            f"{most} are read: save it in shards"
        )
    text = folder.read(file, 0, start)
    try:
        with _checked(folder, file, text) as handle:
            notes = handle.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise FormatError(f"{path}: not a safetensors file: {str(error)[:300]}") from None
    header = parse_json(text[8:], path, dict, distinct=True)
    header.pop("__metadata__", None)
    extents: dict[str, Extent] = {}
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise FormatError(
                f"{path}: {name[:80]} has dtype {entry['dtype'][:40]}; wanted one of {', '.join(SAFETENSORS_DTYPES)}"
            )
        _check_shape(entry["shape"], f"{path}: {name[:80]}")
        first = start + entry["data_offsets"][0]
        extents[name] = Extent(file, first, tuple(entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]])
    return extents, notes


def _check_shape(shape: list[int], where: str) -> None:
    """Refuse shapes that NumPy cannot hold: an empty axis may hide others of any size from the library."""
    if len(shape) > MAX_AXES:
        raise FormatError(f"{where} has {len(shape)} axes; wanted at most {MAX_AXES}")
    if any(n >= 2**63 for n in shape) or math.prod(max(n, 1) for n in shape) >= 2**59:
        raise FormatError(f"{where} has shape {shape}, which is too large for any memory")


@contextmanager
def _checked(folder: Folder, file: str, head: bytes) -> Iterator[Any]:
    """Open the file by the library: of a file elsewhere, its header in a sparse file of the same size."""
    if folder.local is not None:
        with safetensors.safe_open(folder.local / file, framework="numpy") as handle:
            yield handle
        return
    state = folder.state(file)
    with tempfile.NamedTemporaryFile() as stand_in:
        stand_in.write(head)
        stand_in.truncate(state.size if state else len(head))  # sparse: it takes no room on the disk
        stand_in.flush()
        with safetensors.safe_open(stand_in.name, framework="numpy") as handle:
            yield handle
