"""What the metadata says of each tensor, checked: everything that a tensor of this format keeps to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from aq_jax.codes import CODES
from aq_jax.config import QuantSpec
from aq_jax.converters.orbax.disk import Like
from aq_jax.core.qtensor import scale_shape
from aq_jax.errors import FormatError
from aq_jax.store import DTYPES
from aq_jax.store.schema import MAX_AXES, ROTATIONS

PARTS = ("codes", "scale", "zero_point")
"""The arrays of a QTensor; the last is there where its code has zero points."""


@dataclass(frozen=True, slots=True)
class ArrayEntry:
    """What the metadata says of an array."""

    like: Like
    stored: Like
    """As Orbax has it: signed codes as bytes."""
    digest: str


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What the metadata says of a tensor: its arrays by part, and the numerics of a QTensor."""

    arrays: Mapping[str, ArrayEntry]
    spec: QuantSpec | None
    length: int
    row: Mapping[str, Any]
    rows: int | None = None

    @property
    def nbytes(self) -> int:
        return sum(array.like.nbytes for array in self.arrays.values())

    @property
    def shape(self) -> tuple[int, ...]:
        first = next(iter(self.arrays.values())).like.shape
        return self.spec.coding.shape(first, self.length, self.rows) if self.spec else first

    @property
    def dtype(self) -> np.dtype:
        """Of the values: of those that are quantized, or that a table keeps in float16, what they were before."""
        if self.spec or self.row.get("quant_type") == "fp16":
            return DTYPES[self.row.get("dtype", "float32")]
        return self.arrays["array"].like.dtype

    def widened(self, array: np.ndarray) -> np.ndarray:
        """The array in that dtype."""
        with np.errstate(over="ignore"):
            return array.astype(self.dtype, copy=False)


def tensor_entry(folder: Path, name: str, entry: Any) -> TensorEntry:
    """One entry of the metadata, checked: everything that a tensor of this format keeps to.

    Raises:
        FormatError: naming the tensor, and the field that cannot be.
    """
    if not isinstance(entry, dict):
        raise nonsense(folder, name, "entry", entry)
    quantized = "spec" in entry
    row = entry.get("row", {})
    if not isinstance(row, dict) or not isinstance(dtype := row.get("dtype", "float32"), str) or dtype not in DTYPES:
        raise nonsense(folder, name, "row", row)
    spec = _spec(folder, name, entry["spec"]) if quantized else None
    parts = ("array",) if spec is None else PARTS if spec.coding.zero_points else PARTS[:2]
    arrays = {part: _array_entry(folder, name, part, entry.get(part)) for part in parts}
    if spec is None:
        if row.get("quant_type") == "fp16" and arrays["array"].like.dtype != np.float16:
            raise nonsense(folder, name, "row", f"{row} for {arrays['array'].like.dtype}")
        return TensorEntry(arrays, None, 0, row)
    length, rows, codes = entry.get("length"), entry.get("rows"), arrays["codes"].like
    if not _is_size(length) or not codes.shape:
        raise nonsense(folder, name, "length", length)
    if rows is not None and not _is_size(rows):
        raise nonsense(folder, name, "rows", rows)
    shape = spec.coding.shape(codes.shape, length, rows)
    if (codes.shape, codes.dtype.name) not in (spec.coding.codes_like(shape), (shape, "int8")):
        found = f"{codes.dtype}{list(codes.shape)} for rows of {length} codes of {spec.bits} bits"
        raise nonsense(folder, name, "codes", found)
    # A batch, made by `vmap`, has the grids of each of its tensors.
    grids = {(*shape[:batch], *scale_shape(shape[batch:], spec)) for batch in range(len(shape))}
    for part in parts[1:]:
        found = arrays[part].like
        if found.dtype != np.float32 or found.shape not in grids or found.shape != arrays["scale"].like.shape:
            raise nonsense(folder, name, part, f"{found.dtype}{list(found.shape)} for {spec} of shape {list(shape)}")
    return TensorEntry(arrays, spec, length, row, rows)


def _array_entry(folder: Path, name: str, part: str, entry: Any) -> ArrayEntry:
    if isinstance(entry, dict):
        shape, dtype, digest = entry.get("shape"), entry.get("dtype"), entry.get("digest")
        sizes: list[Any] = shape if isinstance(shape, list) and len(shape) <= MAX_AXES else [None]
        if isinstance(dtype, str) and dtype in DTYPES and isinstance(digest, str) and all(map(_is_size, sizes)):
            like = Like(tuple(sizes), DTYPES[dtype])
            return ArrayEntry(like, Like(like.shape, np.dtype(np.uint8)) if part == "codes" else like, digest)
    raise nonsense(folder, name, part, entry)


def _spec(folder: Path, name: str, entry: Any) -> QuantSpec:
    """Release 1 wrote `symmetric` too, which decoding does not need."""
    fields = {field.name: type(field.default) for field in dataclasses.fields(QuantSpec)}
    known = {key: value for key, value in entry.items() if key != "symmetric"} if isinstance(entry, dict) else {}
    types = {key: type(value) for key, value in ({"code": ""} | known).items()}
    if types == fields and type(entry.get("symmetric", True)) is bool:
        spec = QuantSpec(**known)
        if spec.code not in ("", *CODES) or (spec.code and CODES[spec.code].bits != spec.bits):
            raise nonsense(folder, name, "spec", entry)
        sizes = 0 <= spec.group_size < 2**31 and spec.rotation in (0, *ROTATIONS)
        if spec.quant_type in CODES and sizes and not (spec.per_channel and spec.group_size):
            return spec
    raise nonsense(folder, name, "spec", entry)


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**63


def nonsense(folder: Path, name: str, what: str, found: object) -> FormatError:
    """The error for what `save` cannot have written, whatever its digest."""
    return FormatError(
        f"{folder}: {name or 'the tree'}: no checkpoint can have {what} {str(found)[:120]}; write it again, or with "
        "another release"
    )
