"""Place the shards of a tensor: the arrays of a QTensor follow the weight that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from aq_jax.config import QuantSpec
from aq_jax.core.qtensor import scale_shape, zero_shape
from aq_jax.errors import FormatError
from aq_jax.store import aligned_empty

Shape = tuple[int, ...]
Index = tuple[slice, ...]


class Shardings(NamedTuple):
    """The shardings of a QTensor's arrays; that of zero points is there even if the code has none."""

    codes: Sharding
    scale: Sharding
    zero_point: Sharding


def shard_counts(sharding: Sharding, shape: Shape, name: str) -> Shape:
    """Count the parts that each axis is cut into.

    Raises:
        FormatError: if the sharding does not fit the shape, naming the tensor.
    """
    try:
        shard = sharding.shard_shape(shape)
    except (ValueError, IndexError) as error:  # the latter where there are fewer axes than the sharding has
        raise FormatError(f"{name}: shape {list(shape)} cannot be sharded by {_describe(sharding)}: {error}") from None
    return tuple(whole // part if part else 1 for whole, part in zip(shape, shard, strict=True))


def qtensor_shardings(sharding: Sharding, shape: Shape, spec: QuantSpec, name: str) -> Shardings:
    """Derive the shardings of codes, scales and zero points from that of the weight.

    An axis of scales is replicated where a shard would end inside a group, or where all columns share one group; so are
    scales, and zero points, that have no axes in common with the weight.

    Args:
        sharding: The weight's sharding.
        shape: The weight's shape.
        spec: The weight's numerics.
        name: The tensor's name, for errors.

    Raises:
        FormatError: if the sharding does not fit the shape, cuts the codes where they cannot be cut, or has no axes.

    >>> mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> rows = NamedSharding(mesh, PartitionSpec("x"))
    >>> [leaf.spec for leaf in qtensor_shardings(rows, (4, 8), QuantSpec(4, group_size=3), "w")]
    [P('x', None), P(), P()]
    """
    cuts = shard_counts(sharding, shape, name)
    if not isinstance(sharding, NamedSharding):
        if sharding.is_fully_replicated:
            return Shardings(sharding, sharding, sharding)
        raise FormatError(
            f"{name}: found {_describe(sharding)}, wanted a NamedSharding, whose axes the codes and scales of a "
            "QTensor can follow"
        )
    code, scales, zeros = spec.coding, scale_shape(shape or (1,), spec), zero_shape(shape or (1,), spec)
    if shape and (why := code.refuses_shards(shape, cuts)):
        raise FormatError(f"{name}: {_describe(sharding)} {why}")
    axes = (*sharding.spec, *(None for _ in range(len(shape) - len(sharding.spec))))
    follows = len(scales) == len(shape) and scales[:-1] == shape[:-1]

    def on(*kept: Any) -> Sharding:
        return NamedSharding(sharding.mesh, PartitionSpec(*kept), memory_kind=sharding.memory_kind)

    codes = on(*(None if axis is None else axes[axis] for axis in code.axes(len(shape))))
    if not follows or not shape:
        return Shardings(codes, on(), on())
    whole = scales[-1] // code.grid_block[1] % cuts[-1] == 0
    scale = on(*axes[:-1], axes[-1] if whole else None)
    if zeros == scales:
        return Shardings(codes, scale, scale)
    beside = len(zeros) == len(shape)
    return Shardings(codes, scale, on(*axes[:-1], axes[-1] if zeros[-1] % cuts[-1] == 0 else None) if beside else on())


def local_rows(sharding: Sharding, shape: Shape) -> list[tuple[int, int]]:
    """List the ranges of axis 0 that this process's devices hold.

    >>> local_rows(jax.sharding.SingleDeviceSharding(jax.devices()[0]), (4, 8))
    [(0, 4)]
    """
    return sorted({_rows(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()})


def build_sharded(
    shape: Shape, dtype: np.dtype, sharding: Sharding, rows: Callable[[int, int], np.ndarray]
) -> jax.Array:
    """Build an array whose shards lie in memory that nothing else shares.

    Args:
        shape: The array's shape.
        dtype: The array's dtype.
        sharding: The array's sharding.
        rows: A function that returns rows start to stop of axis 0; it is called once for each range. A scalar has the
            range (0, 1).

    >>> one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    >>> eye = np.eye(2, dtype=np.int32)
    >>> build_sharded((2, 2), eye.dtype, one, lambda start, stop: eye[start:stop]).tolist()
    [[1, 0], [0, 1]]
    """
    blocks: dict[tuple[int, int], np.ndarray] = {}
    taken: set[tuple[int, int]] = set()

    def shard(index: Index | None) -> np.ndarray:
        index = index or ()
        own = _rows(index, shape)
        if own not in blocks:
            blocks[own] = rows(*own)
        found = blocks[own][(slice(None), *index[1:])] if index else blocks[own].reshape(())
        # On CPUs, JAX takes over aligned memory: a device must not share it with the file or with another device.
        if found.size == blocks[own].size and found.flags.writeable and own not in taken:
            taken.add(own)
            return found
        out = aligned_empty(found.shape, found.dtype)
        out[...] = found
        return out

    return jax.make_array_from_callback(shape, sharding, shard, dtype=dtype)


def _rows(index: Index | None, shape: Shape) -> tuple[int, int]:
    return index[0].indices(shape[0])[:2] if index else (0, 1)


def _describe(sharding: Sharding) -> str:
    if isinstance(sharding, NamedSharding):
        return f"{sharding.spec} on a mesh of {dict(sharding.mesh.shape)}"
    return type(sharding).__name__
