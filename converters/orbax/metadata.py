"""Build and check the metadata of a checkpoint: the tree as JSON, and an entry for each tensor, under one digest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from aq_jax._version import __version__
from aq_jax.codes import CODES
from aq_jax.config import QuantSpec
from aq_jax.core.frameworks import checked_cast, identity_key, unwrap_variable
from aq_jax.core.prepared import Prepared
from aq_jax.core.qtensor import QTensor, scale_shape, zero_shape
from aq_jax.errors import AqError, FormatError, IntegrityError, shorten
from aq_jax.store import DTYPES
from aq_jax.store.digest import table_digest
from aq_jax.store.schema import MAX_AXES, ROTATIONS

METADATA = "aq_jax_metadata"
FORMAT, VERSION = "aq_jax.orbax", "1.0"
PARTS = ("codes", "scale", "zero_point")
"""The arrays of a QTensor; the last exists if its code has zero points."""
_TIED = object()  # marks a leaf that an earlier one holds


@dataclass(frozen=True, slots=True)
class AbstractArray:
    """The shape and dtype of an array: Orbax reads a NumPy array for it."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ArrayEntry:
    """The metadata of an array.

    Args:
        abstract: The array's shape and dtype.
        stored: The same in Orbax, which holds signed codes as bytes.
        digest: The digest of its bytes.
    """

    abstract: AbstractArray
    stored: AbstractArray
    digest: str


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The metadata of a tensor: its arrays by part, the numerics of a QTensor, and a table's fields of it."""

    arrays: Mapping[str, ArrayEntry]
    spec: QuantSpec | None
    length: int
    row: Mapping[str, Any]
    rows: int | None = None

    @property
    def nbytes(self) -> int:
        return sum(array.abstract.nbytes for array in self.arrays.values())

    @property
    def shape(self) -> tuple[int, ...]:
        first = next(iter(self.arrays.values())).abstract.shape
        return self.spec.coding.shape(first, self.length, self.rows) if self.spec else first

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype of the values; if they are quantized, or a table's float16, their dtype before that."""
        if self.spec or self.row.get("quant_type") == "fp16":
            return DTYPES[self.row.get("dtype", "float32")]
        return self.arrays["array"].abstract.dtype

    def upcast(self, array: np.ndarray, name: str) -> np.ndarray:
        """Cast an array to that dtype.

        Raises:
            AqError: naming the first value that it does not hold.
        """
        return checked_cast(array, self.dtype, name, "its dtype before it was float16; write the checkpoint again")


@dataclass(frozen=True, slots=True)
class Metadata:
    """The checked metadata of a checkpoint.

    Args:
        tree: The tree as JSON; its leaves are the names of tensors.
        leaves: The name of each leaf -> that of its tensor, which tied leaves share.
        tensors: The tensors by name, in order.
        config: The config of the table that they came from.
    """

    tree: Any
    leaves: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]
    config: Mapping[str, Any]


def new_metadata(tree: Any, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Build the metadata of a new checkpoint, and sign it with its digest."""
    metadata: dict[str, Any] = {
        "format": FORMAT, "version": VERSION, "writer": f"aq_jax {__version__}", "config": dict(config),
        "tree": tree, "tensors": tensors,
    }  # fmt: skip
    return metadata | {"digest": table_digest(metadata).hex()}


def parse_metadata(folder: Path, raw: Any) -> Metadata:
    """Check the metadata that a checkpoint's folder holds.

    Raises:
        FormatError: if it is of another format or version, or says what no checkpoint can hold.
        IntegrityError: if it was damaged or changed.
    """
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or not isinstance(version := raw.get("version"), str):
        found = raw.get("format") if isinstance(raw, dict) else raw
        raise FormatError(f"{folder}: its {METADATA} is of format {str(found)[:60]!r}; wanted {FORMAT!r} and a version")
    if version.split(".")[0] != VERSION.split(".")[0]:
        raise FormatError(
            f"{folder}: format version {version[:20]!r} is unknown; this release reads {VERSION}: use a newer aq_jax"
        )
    try:
        digest = table_digest(raw).hex()
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{folder}: its {METADATA} is damaged: {shorten(error)}; fetch it again") from None
    if digest != raw.get("digest"):
        raise IntegrityError(
            f"{folder}: its {METADATA} has digest {digest}; wanted {str(raw.get('digest'))[:64]}: it was damaged "
            "or changed; fetch or write the checkpoint again"
        )
    for key in ("tensors", "config"):
        if not isinstance(raw.get(key), dict):
            raise impossible(folder, METADATA, key, raw.get(key))
    tensors = {name: parse_tensor(folder, name, entry) for name, entry in raw["tensors"].items()}
    pairs = list(_parse_leaves(raw.get("tree"), folder))
    if len(dict(pairs)) != len(pairs) or {stored for _, stored in pairs} != set(tensors):
        raise impossible(folder, METADATA, "tree", pairs)
    return Metadata(raw.get("tree"), dict(pairs), tensors, raw["config"])


def parse_tensor(folder: Path, name: str, entry: Any) -> TensorEntry:
    """Check the entry of one tensor against everything that this format holds to.

    Raises:
        FormatError: naming the tensor, and the impossible field.
    """
    if not isinstance(entry, dict):
        raise impossible(folder, name, "entry", entry)
    row = entry.get("row", {})
    if not isinstance(row, dict) or not isinstance(dtype := row.get("dtype", "float32"), str) or dtype not in DTYPES:
        raise impossible(folder, name, "row", row)
    spec = _parse_spec(folder, name, entry["spec"]) if "spec" in entry else None
    parts = ("array",) if spec is None else PARTS if spec.coding.zero_points else PARTS[:2]
    arrays = {part: _parse_array(folder, name, part, entry.get(part)) for part in parts}
    if spec is None:
        if row.get("quant_type") == "fp16" and arrays["array"].abstract.dtype != np.float16:
            raise impossible(folder, name, "row", f"{row} for {arrays['array'].abstract.dtype}")
        return TensorEntry(arrays, None, 0, row)
    length, rows, codes = entry.get("length"), entry.get("rows"), arrays["codes"].abstract
    if not _is_size(length) or not codes.shape:
        raise impossible(folder, name, "length", length)
    if rows is not None and not _is_size(rows):
        raise impossible(folder, name, "rows", rows)
    shape = spec.coding.shape(codes.shape, length, rows)
    if (codes.shape, codes.dtype.name) not in (spec.coding.codes_like(shape), (shape, "int8")):
        found = f"{codes.dtype}{list(codes.shape)} for rows of {length} codes of {spec.bits} bits"
        raise impossible(folder, name, "codes", found)
    # A batch, made by `vmap`, has the grids of each of its tensors.
    batches, code, scale = range(len(shape)), spec.coding, arrays["scale"].abstract.shape
    fitting = [
        batch
        for batch in batches
        if scale == (*shape[:batch], *scale_shape(shape[batch:], spec))
        and not code.refuses_layout(shape[batch:], spec.quant_axis, spec.group_size)
    ]
    wanted = {"scale": ({scale} if fitting else set(), code.grid_dtype)}
    if code.zero_points:
        zeros = {(*shape[:batch], *zero_shape(shape[batch:], spec)) for batch in fitting}
        wanted["zero_point"] = zeros, code.zero_dtype
    for part, (shapes, dtype) in wanted.items():
        found = arrays[part].abstract
        if found.dtype != DTYPES[dtype] or found.shape not in shapes:
            raise impossible(folder, name, part, f"{found.dtype}{list(found.shape)} for {spec} of shape {list(shape)}")
    return TensorEntry(arrays, spec, length, row, rows)


def _parse_array(folder: Path, name: str, part: str, entry: Any) -> ArrayEntry:
    if isinstance(entry, dict):
        shape, dtype, digest = entry.get("shape"), entry.get("dtype"), entry.get("digest")
        sizes: list[Any] = shape if isinstance(shape, list) and len(shape) <= MAX_AXES else [None]
        if isinstance(dtype, str) and dtype in DTYPES and isinstance(digest, str) and all(map(_is_size, sizes)):
            array = AbstractArray(tuple(sizes), DTYPES[dtype])
            return ArrayEntry(array, AbstractArray(array.shape, np.dtype("u1")) if part == "codes" else array, digest)
    raise impossible(folder, name, part, entry)


def _parse_spec(folder: Path, name: str, entry: Any) -> QuantSpec:
    """Check a spec; release 1 wrote `symmetric` too, which decoding does not need."""
    fields = {field.name: type(field.default) for field in dataclasses.fields(QuantSpec)}
    found = {key: value for key, value in entry.items() if key != "symmetric"} if isinstance(entry, dict) else {}
    types = {key: type(value) for key, value in ({"code": ""} | found).items()}
    if types == fields and type(entry.get("symmetric", True)) is bool:
        spec = QuantSpec(**found)
        if spec.code not in ("", *CODES) or (spec.code and CODES[spec.code].bits != spec.bits):
            raise impossible(folder, name, "spec", entry)
        sizes = 0 <= spec.group_size < 2**31 and spec.rotation in (0, *ROTATIONS)
        if spec.quant_type in CODES and sizes and not (spec.per_channel and spec.group_size):
            return spec
    raise impossible(folder, name, "spec", entry)


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**63


def impossible(folder: Path, name: str, what: str, found: object) -> FormatError:
    """Build the error for what `save` cannot have written, whatever its digest."""
    return FormatError(
        f"{folder}: {name or 'the tree'}: no checkpoint can have {what} {str(found)[:120]}; write it again, or with "
        "another release"
    )


def tree_to_json(tree: Any) -> tuple[Any, dict[str, Any]]:
    """Turn a tree into JSON and its leaves by name; of a leaf that occurs several times, the first.

    Raises:
        FormatError: for a key that a checkpoint cannot hold, and for two leaves of one name.
        AqError: for a leaf that is no array.
    """
    leaves: dict[str, Any] = {}
    found = _to_json(tree, (), leaves, {})
    return found, {name: leaf for name, leaf in leaves.items() if leaf is not _TIED}


def _to_json(node: Any, path: tuple[str, ...], leaves: dict[str, Any], seen: dict[object, str]) -> Any:
    name, node = ".".join(path), unwrap_variable(node)
    if node is None:
        return None
    items: Iterable[tuple[Any, Any]]
    if isinstance(node, Mapping):
        kind, items = "dict", list(node.items())
        for key, _ in items:
            if type(key) not in (str, int):
                raise FormatError(f"{name or 'the tree'}: has a key {key!r}; wanted strings and integers as keys")
    elif type(node) in (list, tuple):
        kind, items = type(node).__name__, list(enumerate(node))
    elif isinstance(node, QTensor | Prepared) or hasattr(node, "dtype"):
        if name in leaves:
            raise FormatError(f"{name}: two leaves of the tree have this name; rename one, or a key on its path")
        if (stored := seen.setdefault(identity_key(node), name)) != name:
            leaves[name] = _TIED
            return stored
        leaves[name] = node.to_qtensor() if isinstance(node, Prepared) else node
        return name
    else:
        raise AqError(
            f"{name or 'the tree'}: is a {type(node).__name__}; wanted arrays and QTensors in dictionaries, lists and "
            "tuples (of a number np.float32 makes an array, of a module nnx.state such a tree)"
        )
    return {kind: [[key, _to_json(child, (*path, str(key)), leaves, seen)] for key, child in items]}


def tree_from_json(node: Any, leaf: Callable[[str], Any], path: tuple[str, ...] = ()) -> Any:
    """Build the tree, each leaf by its name."""
    if node is None:
        return None
    if isinstance(node, str):
        return leaf(".".join(path))
    ((kind, items),) = node.items()
    children = [(key, tree_from_json(child, leaf, (*path, str(key)))) for key, child in items]
    return dict(children) if kind == "dict" else {"list": list, "tuple": tuple}[kind](child for _, child in children)


def _parse_leaves(node: Any, folder: Path, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Check a tree in JSON, and list (name, name of its tensor) of every leaf."""
    if node is None:
        return
    if isinstance(node, str):
        yield ".".join(path), node
        return
    if not isinstance(node, dict) or len(node) != 1 or (kind := next(iter(node))) not in ("dict", "list", "tuple"):
        raise impossible(folder, ".".join(path), "tree", node)
    items = node[kind]
    if not isinstance(items, list) or not all(isinstance(item, list) and len(item) == 2 for item in items):
        raise impossible(folder, ".".join(path), kind, items)
    keys = [key for key, _ in items]
    if not all(type(key) in (str, int) for key in keys) or len(set(keys)) != len(keys):
        raise impossible(folder, ".".join(path), "keys", keys)
    for key, child in items:
        yield from _parse_leaves(child, folder, (*path, str(key)))
