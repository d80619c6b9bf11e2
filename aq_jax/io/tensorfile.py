"""Safetensors files: where their tensors lie, once the library and the rules here have found nothing wrong."""

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

# How safetensors spells what the table can hold.
SAFE_DTYPES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
# Bytes of JSON that are taken: each becomes up to fifteen of memory, here and in the library, which takes 100 MB of it.
_MAX_HEADER = 8 << 20


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a tensor's bytes are: in which file of a folder, and from which byte on."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Bytes.

        >>> Extent("model.safetensors", 8, (3, 5), "bfloat16").size
        30
        """
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_header(folder: Folder, file: str, most: int = _MAX_HEADER) -> tuple[dict[str, Extent], dict[str, str]]:
    """Find the places of the tensors in a safetensors file, here or at a URL, and what is noted in it.

    The library checks bounds, overlaps and sizes; no tensor is read.

    Args:
        folder: that holds the file.
        file: its name.
        most: bytes that its header may have.

    Raises:
        FormatError: if it is damaged, its header is too long or repeats a name, or a table has no such dtype or shape.
    """
    path = folder.at(file)
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
        if entry["dtype"] not in SAFE_DTYPES:
            raise FormatError(
                f"{path}: {name[:80]} has dtype {entry['dtype'][:40]}; known are {', '.join(SAFE_DTYPES)}"
            )
        _check_shape(entry["shape"], f"{path}: {name[:80]}")
        first = start + entry["data_offsets"][0]
        extents[name] = Extent(file, first, tuple(entry["shape"]), SAFE_DTYPES[entry["dtype"]])
    return extents, notes


def _check_shape(shape: list[int], where: str) -> None:
    """Refuses shapes that NumPy has no array of: an empty axis may hide others of any size from the library."""
    if len(shape) > MAX_AXES:
        raise FormatError(f"{where} has {len(shape)} axes, at most {MAX_AXES} are allowed")
    if any(n >= 2**63 for n in shape) or math.prod(max(n, 1) for n in shape) >= 2**59:
        raise FormatError(f"{where} has shape {shape}, which is too large for any memory")


@contextmanager
def _checked(folder: Folder, file: str, head: bytes) -> Iterator[Any]:
    """The file as the library opens it: elsewhere, its head with nothing behind it but the right number of bytes."""
    if folder.local is not None:
        with safetensors.safe_open(folder.local / file, framework="numpy") as handle:
            yield handle
        return
    state = folder.state(file)
    with tempfile.NamedTemporaryFile() as stand_in:
        stand_in.write(head)
        stand_in.truncate(state.size if state else len(head))  # which takes no room on the disk
        stand_in.flush()
        with safetensors.safe_open(stand_in.name, framework="numpy") as handle:
            yield handle
