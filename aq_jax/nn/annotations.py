"""Where a quantized layer's arrays belong: the `out_sharding` of the float layer's parameters, turned as they are."""

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
"""What says what the names in `out_sharding` mean."""


def annotate(new: nnx.Variable[Any], old: nnx.Variable[Any], inputs: int = 0) -> None:
    """Give a parameter the sharding that the one which it stands for is annotated with.

    Args:
        new: a weight as [outputs, inputs], an embedding table or a bias.
        old: of the float layer.
        inputs: how many axes of a kernel, which come first, are inputs; 0 for a parameter that is not turned.

    Raises:
        ConfigError: for a sharding that the weight, whose inputs are one axis, and so are its outputs, cannot have.
    """
    if not (sharding := old.get_metadata("out_sharding", None)):
        return
    new.set_metadata("out_sharding", _turned(sharding, old.get_value().ndim, inputs) if inputs else sharding)
    for key in _BESIDE:
        if old.has_metadata(key):
            new.set_metadata(key, old.get_metadata(key))


def placed(weight: QTensor, like: jax.Array, inputs: int, name: str) -> QTensor:
    """The weight on the devices that the float one is on, if those are several.

    Raises:
        ConfigError, FormatError: if its codes cannot be cut as the float weight is.
    """
    sharding = None if isinstance(like, Tracer) else like.sharding
    if not isinstance(sharding, NamedSharding) or sharding.num_devices == 1:
        return weight
    on = _turned(sharding, like.ndim, inputs) if inputs else sharding
    codes, grids = qtensor_shardings(on, weight.shape, weight.spec, name)
    return dataclasses.replace(
        weight,
        codes=jax.device_put(weight.codes, codes),
        scale=jax.device_put(weight.scale, grids),
        zero_point=jax.device_put(weight.zero_point, grids),
    )


def _turned(sharding: Any, ndim: int, inputs: int) -> Any:
    """The sharding of [outputs, inputs], of the same kind as that of a kernel."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, _turned(sharding.spec, ndim, inputs), memory_kind=sharding.memory_kind)
    if not isinstance(sharding, tuple | list | PartitionSpec):
        raise ConfigError(f"out_sharding is a {type(sharding).__name__}; wanted names of axes, or a NamedSharding")
    axes = [*sharding, *(None for _ in range(ndim - len(sharding)))]
    if any(axis is not None for axis in (*axes[1:inputs], *axes[inputs + 1 :])):
        raise ConfigError(
            f"out_sharding = {tuple(sharding)}: cuts another than the first of several axes that become one of the "
            "weight's, [outputs, inputs]; wanted it along the first"
        )
    turned = (axes[inputs], axes[0])
    return PartitionSpec(*turned) if isinstance(sharding, PartitionSpec) else turned
