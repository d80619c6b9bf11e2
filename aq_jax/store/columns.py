"""Convert Arrow columns to Python and NumPy values, in any of Arrow's encodings."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from aq_jax.errors import FormatError
from aq_jax.store.schema import V1, V2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

Columns = dict[str, list[pa.Array]]
"""Arrays by the name of their column, one for each batch."""


def _is_text(kind: pa.DataType) -> bool:
    return pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pt.is_binary, pt.is_large_binary, pt.is_binary_view, pt.is_fixed_size_binary))


def _is_shape(kind: pa.DataType) -> bool:
    is_list = pt.is_list(kind) or pt.is_large_list(kind)
    return is_list and pt.is_integer(kind.value_type)  # pyright: ignore[reportAttributeAccessIssue]


_ACCEPTS: dict[pa.DataType, tuple[Callable[[pa.DataType], bool], str]] = {
    pa.string(): (_is_text, "a string"),
    pa.binary(): (_is_bytes, "binary"),
    pa.int32(): (pt.is_integer, "an integer"),
    pa.int64(): (pt.is_integer, "an integer"),
    pa.float64(): (pt.is_floating, "floating"),
}


def check_columns(schema: pa.Schema, where: str) -> bool:
    """Refuse a table whose columns are not the format's; tell whether it is a V2 table.

    Raises:
        FormatError: naming the column, and the columns or the type that were found.
    """
    names = schema.names
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise FormatError(f"{where}: column {doubled[0]!r} occurs more than once")
    wanted = V2 if "quant_type" in names else V1
    added = {"digest", "rotation", "solver", "cosine", "rel_mse"}
    missing = [name for name in wanted.names if name not in names and name not in added]
    if missing:
        raise FormatError(f"{where}: has no column {', '.join(missing)}; it has {', '.join(names)[:300] or 'none'}")
    for column in wanted:
        if column.name in names:
            kind = schema.field(column.name).type
            kind = kind.value_type if pt.is_dictionary(kind) else kind
            accepts, text = (_is_shape, "a list of integers") if pt.is_list(column.type) else _ACCEPTS[column.type]
            if not accepts(kind):
                raise FormatError(f"{where}: column {column.name!r} is {kind}; wanted {text}")
    return wanted is V2


def decode_columns(batch: pa.RecordBatch, limits: Mapping[str, int]) -> dict[str, pa.Array]:
    """Check and decode a batch's columns: no offset may point outside its buffer.

    Args:
        limits: The most bytes of each column's decoded values, which rows can share in dictionaries and views.
    """
    columns: dict[str, pa.Array] = {}
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        array.validate(full=True)
        if (size := _shared_bytes(array)) > (limit := limits.get(name, 0)):
            raise ValueError(f"column {name}: its rows share values, of {size} bytes in all; wanted at most {limit}")
        if pt.is_dictionary(array.type):
            array = array.dictionary_decode()
        if pt.is_binary_view(array.type) or pt.is_fixed_size_binary(array.type):
            array = array.cast(pa.large_binary())
        columns[name] = array
    return columns


def gather(batches: Sequence[pa.RecordBatch], limits: Mapping[str, int]) -> Columns:
    """Collect the columns of batches, checked by `decode_columns`."""
    columns: Columns = {}
    for batch in batches:
        for name, array in decode_columns(batch, limits).items():
            columns.setdefault(name, []).append(array)
    return columns


def _shared_bytes(array: pa.Array) -> int:
    """Count the decoded bytes of values that rows can share; 0 for other arrays."""
    if not len(array):
        return 0
    if pt.is_dictionary(array.type):
        counts = np.bincount(array.indices.drop_null().to_numpy(), minlength=len(array.dictionary))
        return int((_lengths(array.dictionary) * counts[: len(array.dictionary)]).sum())
    if pt.is_string_view(array.type) or pt.is_binary_view(array.type):
        return int(_lengths(array).sum())
    return array.nbytes if pt.is_fixed_size_binary(array.type) else 0


def _lengths(array: pa.Array) -> np.ndarray:
    """Count the bytes of each text or binary value; of a null, whatever the buffer says."""
    kind, buffers = array.type, array.buffers()
    if not len(array) or buffers[1] is None:
        return np.zeros(len(array), np.int64)
    span = slice(array.offset, array.offset + len(array))
    if pt.is_string_view(kind) or pt.is_binary_view(kind):
        return np.frombuffer(buffers[1], np.int32)[::4][span].astype(np.int64)
    wide = pt.is_large_string(kind) or pt.is_large_binary(kind)
    offsets = np.frombuffer(buffers[1], np.int64 if wide else np.int32)
    return np.diff(offsets[array.offset : array.offset + len(array) + 1]).astype(np.int64)


def to_python(arrays: Iterable[pa.Array]) -> list[Any]:
    """Convert a small column to Python objects."""
    return [value for array in arrays for value in array.to_pylist()]


def byte_views(array: pa.Array) -> list[np.ndarray | None]:
    """View each binary value in Arrow's memory, read-only; None for a null."""
    wide = pt.is_large_binary(array.type)
    _, offset_buffer, value_buffer = array.buffers()
    if not len(array) or offset_buffer is None:
        return [_EMPTY] * len(array)
    offsets = np.frombuffer(offset_buffer, np.int64 if wide else np.int32, len(array) + 1 + array.offset)
    ends = offsets[array.offset :].tolist()
    values = _EMPTY if value_buffer is None or not value_buffer.size else np.frombuffer(value_buffer, np.uint8)
    values.flags.writeable = False
    views: list[np.ndarray | None] = [values[start:stop] for start, stop in itertools.pairwise(ends)]
    if array.null_count:
        views = [view if valid else None for view, valid in zip(views, array.is_valid().to_pylist(), strict=True)]
    return views


def all_views(arrays: Iterable[pa.Array]) -> list[np.ndarray | None]:
    """View all values of a large column; see `byte_views`."""
    return [view for array in arrays for view in byte_views(array)]


_EMPTY = np.empty(0, np.uint8)
_EMPTY.flags.writeable = False
