"""Carry the `out_sharding` of a float layer's parameters over to the quantized layer, transposed as its weights are."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from aq_jax.core.qtensor import QTensor
from aq_jax.core.sharding import qtensor_shardings
from aq_jax.errors import ConfigError

_BESIDE = ("mesh", "sharding_rules")
"""The metadata that define the names in `out_sharding`."""


def annotate(new: nnx.Variable[Any], old: nnx.Variable[Any], inputs: int = 0) -> None:
    """Annotate a parameter with the sharding of the one that it replaces.

    Args:
        new: A weight as [outputs, inputs], an embedding table or a bias.
        old: The float layer's parameter.
        inputs: The number of a kernel's leading axes that are inputs; 0 for a parameter that is not transposed.

    Raises:
        ConfigError: for a sharding that the weight, with one axis of inputs and one of outputs, cannot have.
    """
    if not (sharding := old.get_metadata("out_sharding", None)):
        return
    new.set_metadata("out_sharding", _transposed(sharding, old.get_value().ndim, inputs) if inputs else sharding)
    for key in _BESIDE:
        if old.has_metadata(key):
            new.set_metadata(key, old.get_metadata(key))


def shard_like(weight: QTensor, like: jax.Array, inputs: int, name: str) -> QTensor:
    """Put the weight on the float one's devices, if those are several.

    Raises:
        ConfigError, FormatError: if its codes cannot be cut as the float weight is.
    """
    sharding = None if isinstance(like, Tracer) else like.sharding
    if not isinstance(sharding, NamedSharding) or sharding.num_devices == 1:
        return weight
    on = _transposed(sharding, like.ndim, inputs) if inputs else sharding
    shardings = qtensor_shardings(on, weight.shape, weight.spec, name)._asdict()
    return dataclasses.replace(
        weight, **{leaf: jax.device_put(getattr(weight, leaf), shardings[leaf]) for leaf in shardings}
    )


def _transposed(sharding: Any, ndim: int, inputs: int) -> Any:
    """Transpose a kernel's sharding to that of [outputs, inputs], of the same kind."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, _transposed(sharding.spec, ndim, inputs), memory_kind=sharding.memory_kind)
    if not isinstance(sharding, tuple | list | PartitionSpec):
        raise ConfigError(f"out_sharding is a {type(sharding).__name__}; wanted names of axes, or a NamedSharding")
    axes = [*sharding, *(None for _ in range(ndim - len(sharding)))]
    if any(axis is not None for axis in (*axes[1:inputs], *axes[inputs + 1 :])):
        raise ConfigError(
            f"out_sharding = {tuple(sharding)}: cuts another than the first of several axes that become one axis of "
            "the weight, [outputs, inputs]; cut the first"
        )
    spec = (axes[inputs], axes[0])
    return PartitionSpec(*spec) if isinstance(sharding, PartitionSpec) else spec
