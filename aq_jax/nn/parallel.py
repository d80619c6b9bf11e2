"""Tensor parallelism: which device holds which part of a model's weights (Megatron-LM, arXiv:1909.08053).

Of a pair of linear layers the first is cut by its outputs, and each device feeds its own of them to the second, which
is cut by its inputs; the sums are then added up over the devices. XLA puts that in (GSPMD, arXiv:2105.04663): here is
only said where weights lie, and no other place would make another result, but for the order in which sums are added up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aq_jax.core.sharding import codes_shape
from aq_jax.errors import ConfigError
from aq_jax.nn.weights import Mapped, match_names
from aq_jax.store import RowInfo

AXIS = "model"
# The layers of bert.py and llama.py: [outputs, inputs], as stored.
BY_OUTPUTS = ("query", "key", "value", "gate", "up", "head")
BY_INPUTS = ("out", "down")


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


def shardings(tensors: Mapping[str, RowInfo], names: Sequence[Mapped], mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each tensor of a BERT or a Llama goes.

    Linear layers are cut along the mesh's axis "model": queries, keys, values, gates, the first of two feed-forward
    layers and the head by outputs, with their biases; the others by inputs. All else is replicated: embeddings, norms,
    and what does not divide into as many parts of whole bytes.

    Args:
        tensors: what the table knows of them, by stored name.
        names: how stored names map to parameters; a name that matches nothing is replicated.
        mesh: see `check_mesh`.

    >>> import jax
    >>> from aq_jax.nn import bert
    >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
    >>> name = "encoder.layer.0.output.dense.weight"
    >>> shardings({name: RowInfo(name, (8, 4), "float32", 32, 0, 128)}, bert.NAMES, mesh)[name].spec
    P(None, 'model')
    """
    goals, _ = match_names(tensors, names)
    layers = {stored: goal.rpartition(".")[0].rpartition(".")[2] for goal, (stored, _) in goals.items()}
    count = mesh.shape[AXIS]
    return {name: NamedSharding(mesh, split(layers.get(name), info, count)) for name, info in tensors.items()}


def split(layer: str | None, info: RowInfo, count: int) -> PartitionSpec:
    """How a tensor of a layer of this name lies on `count` devices.

    >>> [split("up", RowInfo("w", (rows, 4), "float32", 4 * rows, 0, 16 * rows), 4) for rows in (8, 6)]
    [P('model', None), P()]
    """
    axes = len(info.shape)
    if layer in BY_OUTPUTS and axes in (1, 2):
        axis = 0
    elif layer in BY_INPUTS and axes == 2:  # the bias is added once, to the sum
        axis = 1
    else:
        return PartitionSpec()
    stored = codes_shape(info.shape, info.bits) if info.bits else info.shape
    if info.shape[axis] % count or stored[axis] % count:
        return PartitionSpec()
    return PartitionSpec(*(AXIS if i == axis else None for i in range(axes)))
