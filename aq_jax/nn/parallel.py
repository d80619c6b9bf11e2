"""Spread a model's weights over devices: tensor parallelism (Megatron-LM, arXiv:1909.08053).

Of a pair of linear layers the first is cut by its outputs, and each device feeds its own outputs to the second, which
is cut by its inputs; the sums are then added up over the devices. XLA inserts that (GSPMD, arXiv:2105.04663): this
module only places the weights, and no placement changes a result, except for the order in which sums are added up.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aq_jax.errors import ConfigError
from aq_jax.nn.architecture import Architecture
from aq_jax.nn.weights import match_names
from aq_jax.store import RowInfo

AXIS = "model"


def check_mesh(mesh: Mesh) -> None:
    """Refuse a mesh that weights cannot be spread over.

    Raises:
        ConfigError: if it has no axis "model", or one that is not of the type Auto.
    """
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if types.get(AXIS) != AxisType.Auto:
        found = ", ".join(f"{name!r} ({kind.name})" for name, kind in types.items())
        raise ConfigError(
            f"mesh: found the axes {found}; wanted one named {AXIS!r} of the type Auto, over which weights are spread: "
            f"jax.make_mesh((jax.device_count(),), ({AXIS!r},), axis_types=(jax.sharding.AxisType.Auto,))"
        )


def shardings(tensors: Mapping[str, RowInfo], architecture: Architecture, mesh: Mesh) -> dict[str, NamedSharding]:
    """Choose the sharding of each tensor of a model.

    Linear layers are cut along the mesh's axis "model", as the model's family says: queries, keys, values, gates, the
    first of two feed-forward layers and the head by outputs, with their biases; the others by inputs. All else is
    replicated: embeddings, norms, and tensors that do not divide into as many parts of whole bytes, or of whole tiles.
    A warning names those that are replicated because of their codes.

    Args:
        tensors: The table's fields of each tensor, by stored name; a name that the model does not have is replicated.
        architecture: The model's architecture.
        mesh: The mesh (see `check_mesh`).

    >>> import jax
    >>> from aq_jax.nn.models import FAMILIES
    >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
    >>> name = "encoder.layer.0.output.dense.weight"
    >>> row = RowInfo(name, (8, 4), "float32", 32, 0, 128)
    >>> shardings({name: row}, Architecture(FAMILIES["bert"], None, {}), mesh)[name].spec
    P(None, 'model')
    """
    goals, _ = match_names(tensors, architecture.names)
    layers = {stored: goal.rpartition(".")[0].rpartition(".")[2] for goal, (stored, _) in goals.items()}
    axes = {stored: architecture.family.cuts.get(layer) for stored, layer in layers.items()}
    count = mesh.shape[AXIS]
    specs = {name: partition_spec(axes.get(name), info, count) for name, info in tensors.items()}
    whole = [
        name for name, info in tensors.items() if _would_divide(axes.get(name), info, count) and not any(specs[name])
    ]
    if whole:
        warnings.warn(
            f"every device has all of {', '.join(whole)}, whose codes have no {count} equal parts", stacklevel=3
        )
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def _would_divide(axis: int | None, info: RowInfo, count: int) -> bool:
    return axis is not None and axis < len(info.shape) == 2 and info.shape[axis] % count == 0


def partition_spec(axis: int | None, info: RowInfo, count: int) -> PartitionSpec:
    """Return the partition of a tensor that is cut along this axis of [outputs, inputs] over `count` devices.

    >>> [partition_spec(0, RowInfo("w", (rows, 4), "float32", 4 * rows, 0, 16 * rows), 4) for rows in (8, 6)]
    [P('model', None), P()]
    """
    axes = len(info.shape)
    if axis is None or not axis < axes <= 2:  # the bias of a layer that is cut by inputs is added once, to the sum
        return PartitionSpec()
    parts = [count if i == axis else 1 for i in range(axes)]
    if info.shape[axis] % count or (info.code and info.code.refuses_shards(info.shape, parts)):
        return PartitionSpec()
    return PartitionSpec(*(AXIS if i == axis else None for i in range(axes)))
