"""What the metadata says of each tensor, checked: everything that a tensor of this format keeps to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from aq_jax.codes import CODES
from aq_jax.codes.bits_jax import fills_bytes
from aq_jax.config import QuantSpec
from aq_jax.converters.orbax.disk import Like
from aq_jax.core.qtensor import scale_shape
from aq_jax.errors import FormatError
from aq_jax.store import DTYPES
from aq_jax.store.schema import MAX_AXES, ROTATIONS

PARTS = ("codes", "scale", "zero_point")


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

    @property
    def nbytes(self) -> int:
        return sum(array.like.nbytes for array in self.arrays.values())

    @property
    def shape(self) -> tuple[int, ...]:
        first = next(iter(self.arrays.values())).like.shape
        return (*first[:-1], self.length) if self.spec else first

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
    arrays = {part: _array_entry(folder, name, part, entry.get(part)) for part in (PARTS if quantized else ("array",))}
    if not quantized:
        if row.get("quant_type") == "fp16" and arrays["array"].like.dtype != np.float16:
            raise nonsense(folder, name, "row", f"{row} for {arrays['array'].like.dtype}")
        return TensorEntry(arrays, None, 0, row)
    spec, length = _spec(folder, name, entry["spec"]), entry.get("length")
    codes, scale, zero_point = (arrays[part].like for part in PARTS)
    if not _is_size(length) or not codes.shape:
        raise nonsense(folder, name, "length", length)
    packed = codes.dtype == np.uint8
    if codes.dtype != np.int8 and not (packed and spec.bits < 8 and fills_bytes(length, spec.bits)):
        raise nonsense(folder, name, "codes", f"{codes.dtype} codes of {spec.bits} bits, {length} a row")
    if codes.shape[-1] != (length * spec.bits // 8 if packed else length):
        raise nonsense(folder, name, "codes", f"{list(codes.shape)} for rows of {length} codes of {spec.bits} bits")
    shape = (*codes.shape[:-1], length)
    # A batch, made by `vmap`, has the grids of each of its tensors.
    grids = {(*shape[:batch], *scale_shape(shape[batch:], spec)) for batch in range(len(shape))}
    for part, found in (("scale", scale), ("zero_point", zero_point)):
        if found.dtype != np.float32 or found.shape not in grids or found.shape != scale.shape:
            raise nonsense(folder, name, part, f"{found.dtype}{list(found.shape)} for {spec} of shape {list(shape)}")
    return TensorEntry(arrays, spec, length, row)


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
    if {key: type(value) for key, value in known.items()} == fields and type(entry.get("symmetric", True)) is bool:
        spec = QuantSpec(**known)
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
