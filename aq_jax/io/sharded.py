"""Load tensors over many devices: each process reads the rows that its own devices hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from aq_jax.core.frameworks import cast_floating, floating_dtype, to_jax_dtype
from aq_jax.core.qtensor import QTensor, group_shape, scale_shape, zero_shape
from aq_jax.core.sharding import build_sharded, local_rows, qtensor_shardings, shard_counts
from aq_jax.errors import FormatError, some_of
from aq_jax.io.qtensors import join_grids, spec_of
from aq_jax.store import DTYPES, PartialTensor, RowInfo, TableReader


def load_sharded(table: TableReader, name: str, sharding: Sharding, packed: bool, dtype: Any) -> jax.Array | QTensor:
    """Read this process's part of one tensor; see `WeightLoader.load_sharded`."""
    target = floating_dtype(dtype)  # refused before anything is read
    info = table.pieces(name)[0]
    if packed and info.quantized:
        return _load_codes(table, info, sharding)
    shard_counts(sharding, info.shape, name)
    inner = math.prod(info.shape[1:])
    ranges = [(start * inner, stop * inner) for start, stop in local_rows(sharding, info.shape)]
    found = PartialTensor(table, info.layer_name, ranges)

    def cast(array: np.ndarray, part: str) -> np.ndarray:
        return to_jax_dtype(cast_floating(array, target, part, info.quantized), part)

    def rows(start: int, stop: int) -> np.ndarray:
        part = name if not start else f"{name}, from row {start} on"
        return cast(found.values(start * inner, stop * inner).reshape(stop - start, *info.shape[1:]), part)

    empty = np.empty(0, np.float32 if info.quantized else DTYPES[info.dtype])
    return build_sharded(info.shape, cast(empty, name).dtype, sharding, rows)


def _load_codes(table: TableReader, info: RowInfo, sharding: Sharding) -> QTensor:
    name, shape, spec = info.layer_name, info.shape or (1,), spec_of(info)
    code, laid = spec.coding, qtensor_shardings(sharding, info.shape, spec, info.layer_name)
    (codes, dtype), grids, counted = code.codes_like(shape), scale_shape(shape, spec), group_shape(shape, spec)

    def elements(start: int, stop: int) -> tuple[int, int]:
        return code.row_start(start, shape), code.row_start(stop, shape)

    inner, total, own_zeros = math.prod(shape[1:]), math.prod(counted), zero_shape(shape, spec)
    undone = info.code is not None and info.code.in_memory is not info.code  # made of all grids of the table's rows

    def groups(start: int, stop: int, like: Sequence[int]) -> tuple[int, int]:
        """Find the groups of rows of scales or zero points."""
        return start * total // max(like[0], 1), stop * total // max(like[0], 1)

    asked = [(0, total)] if undone else [groups(*own, grids) for own in local_rows(laid.scale, grids)]
    found = PartialTensor(table, name, [elements(*own) for own in local_rows(laid.codes, codes)], groups=asked)
    every = join_grids(found.rows) if undone or info.quant_axis < 0 else None

    def rows(start: int, stop: int) -> np.ndarray:
        first, last = elements(start, stop)
        if dtype == "int8":
            return found.codes(first, last).reshape(stop - start, *codes[1:])
        count = (last - first) // inner if inner else stop - start
        return code.from_stream(found.stream(first, last), (count, *shape[1:]))

    def part(which: int, start: int, stop: int, like: tuple[int, ...]) -> np.ndarray:
        if every is None:
            values = found.grids(*groups(start, stop, like))[which]
        else:
            size = math.prod(like[1:])
            values = every[which][start * size : stop * size]
        return values.reshape(stop - start, *like[1:])

    zero_points = None
    if code.zero_points:
        dtype_of_zeros = DTYPES[code.zero_dtype]
        zero_points = build_sharded(
            own_zeros, dtype_of_zeros, laid.zero_point, lambda start, stop: part(1, start, stop, own_zeros)
        )
    return QTensor(
        build_sharded(codes, np.dtype(dtype), laid.codes, rows),
        build_sharded(grids, DTYPES[code.grid_dtype], laid.scale, lambda start, stop: part(0, start, stop, grids)),
        zero_points, spec, shape[-1], code.rows(shape),
    )  # fmt: skip


def check_names(table: TableReader, shardings: Mapping[str, Sharding]) -> None:
    """Refuse shardings that lack a tensor, or name an unknown one: nothing is placed by guess.

    Raises:
        FormatError: naming the tensors.
    """
    lacking = [name for name in table.names if name not in shardings]
    unknown = sorted(set(shardings) - {*table.names, *table.aliases})
    untied = [
        f"{alias} (that of {stored} is another)"
        for alias, stored in table.aliases.items()
        if alias in shardings and stored in shardings and shardings[alias] != shardings[stored]
    ]
    wrong = [
        f"{what}: {some_of(names, 20)}"
        for what, names in (
            ("lack a sharding", lacking), ("are no layers", unknown), ("are tied, and want one sharding", untied)
        )
        if names
    ]  # fmt: skip
    if wrong:
        raise FormatError(f"{table.path}: shardings must name every layer, and no other; " + "; ".join(wrong))
