"""The schemas of V1 and V2 tables: columns, names of dtypes and quantized types, version numbers."""

from __future__ import annotations

from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

import ml_dtypes
import numpy as np
import pyarrow as pa

from aq_jax.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping

Version = Literal[1, 2]

VERSIONS: Final[Mapping[int, str]] = MappingProxyType({1: "1.0", 2: "2.0"})
"""Major version of a table -> the version string that its metadata carries."""

METADATA_KEY: Final = b"aq_jax"
GROUP_BYTES: Final = 8 << 20
"""A row group or record batch holds whole rows up to this size; a larger row is alone in its own."""
WHOLE_BYTES: Final = 1 << 30
"""A tensor of more bytes than this, in its own dtype, is stored in several rows."""
PIECE_BYTES: Final = 1 << 28
"""The most bytes of such a row: enough to be written fast, and little beside any machine's memory."""
MAX_VALUE_BYTES: Final = (1 << 31) - 1
"""The most bytes of one `binary` value, whose offsets are signed 32-bit numbers."""
MAX_AXES: Final = 64

ROTATIONS: Final = (2, 4, 8, 16, 32, 64, 128)
"""Blocks in which the last axis of `...h` rows may be rotated."""

PLAIN_TYPES: Final = ("fp16", "none")
"""The values that are written to the `quant_type` column beside the names of `CODES`."""
READ_TYPES: Final = (*PLAIN_TYPES, "fp32")
"""The values that are read there: `fp32` occurs in files of earlier systems."""

_V1 = [
    pa.field("layer_name", pa.string()),
    pa.field("shape", pa.list_(pa.field("element", pa.int32()))),
    pa.field("dtype", pa.string()),
    pa.field("data", pa.binary()),
    pa.field("num_params", pa.int64()),
]
_QUANTIZED = [
    pa.field("quant_type", pa.string()),
    pa.field("scales", pa.binary()),
    pa.field("zero_points", pa.binary()),
    pa.field("quant_axis", pa.int32()),
    pa.field("group_size", pa.int32()),
]
_DIGEST = [pa.field("digest", pa.binary())]
_ADDED = [
    pa.field("rotation", pa.int32()),
    pa.field("solver", pa.string()),
    pa.field("cosine", pa.float64()),
    pa.field("rel_mse", pa.float64()),
]
V1: Final = pa.schema([*_V1, *_DIGEST])
V2: Final = pa.schema([*_V1, *_QUANTIZED, *_DIGEST, *_ADDED])
LARGE_COLUMNS: Final[tuple[str, ...]] = ("data", "scales", "zero_points")
"""The columns that are read a row group at a time; all others are read when a table is opened."""

_PLAIN = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")
_PLAIN += ("bool", "complex64", "complex128")
_EXTENDED = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3b11fnuz")
_EXTENDED += ("float8_e8m0fnu",)
DTYPES: Final[Mapping[str, np.dtype]] = MappingProxyType(
    {name: np.dtype(name) for name in _PLAIN}
    | {name: np.dtype(getattr(ml_dtypes, name)) for name in _EXTENDED if hasattr(ml_dtypes, name)}
)
"""Canonical dtype names -> NumPy dtypes."""


def parse_dtype(text: str) -> str:
    """Parse the name of a dtype, with or without `torch.`, to its canonical form.

    >>> parse_dtype("torch.bfloat16"), parse_dtype("int64")
    ('bfloat16', 'int64')

    Raises:
        FormatError: if the name is unknown.
    """
    name = text.removeprefix("torch.")
    if name not in DTYPES:
        raise FormatError(f"unknown dtype {text[:60]!r}; known are {', '.join(DTYPES)}, with or without 'torch.'")
    return name


@cache
def dtype_name(dtype: np.dtype) -> str:
    """Return the name of a dtype, which NumPy composes each time that it is asked."""
    return dtype.name


def written_dtype(name: str) -> str:
    """Write a canonical dtype name as in the table.

    >>> written_dtype("float32")
    'torch.float32'
    """
    return f"torch.{name}"
