"""Replace float layers by quantized ones, in any NNX model."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array

from aq_jax.config import QuantizationConfig
from aq_jax.core.dispatch import ACTIVATIONS, Activations
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import ConfigError
from aq_jax.nn.annotations import annotate, shard_like
from aq_jax.nn.layers import QEmbed, QLinear
from aq_jax.quantizers.tree import quantize_tree

M = TypeVar("M", bound=nnx.Module)
# A float layer with another value of these would not compute as quantized layers do.
DEFAULTS = {
    "dot_general": (None, lax.dot_general),
    "dot_general_cls": (None,),
    "promote_dtype": (promote_dtype,),
    "preferred_element_type": (None,),
}


def quantize_module(model: M, config: QuantizationConfig | str, *, activations: Activations = "float32") -> M:
    """Copy a model, with QLinear and QEmbed instead of nnx.Linear, nnx.LinearGeneral and nnx.Embed.

    A weight's name, which the config's patterns see, is its path joined by dots: "layers.0.query.kernel". Channels and
    groups are those of the weight [outputs, inputs], so that kernels are transposed. Layers that several parents share
    stay shared. Parameters keep the `out_sharding` that they are annotated with, transposed with the weights, and
    weights stay on their devices. Subclasses, other layers, layers stacked by `nnx.vmap`, and axes that are not the
    last ones are left as they are, and so is the original model.

    Args:
        model: Any NNX module; concrete, or being traced (inside `nnx.eval_shape` or a jitted function).
        config: The config, or just a quant_type. Weights that it keeps in float16 are stored so, and computed in the
            layer's own dtype.
        activations: The type that the new layers round their inputs to (see `qdot`).

    Raises:
        AqError: for weights that cannot be quantized, by name.
        ConfigError: for shapes without weights; for unknown activations; and by name for weights that do not fit the
            activations, for layers with their own functions to multiply or promote, and for an `out_sharding` that
            the transposed weight cannot have.

    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Embed(16, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    >>> [type(layer).__name__ for layer in quantize_module(model, "int8").layers]
    ['QEmbed', 'QLinear']
    """
    if activations not in ACTIVATIONS:
        raise ConfigError(f"activations = {activations!r}: wanted one of {', '.join(ACTIVATIONS)}")
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model))):
        raise ConfigError(
            "quantize_module: found shapes without weights; wanted weights, or a model that is being traced"
        )
    weights = {
        ".".join(map(str, (*path, key))): weight
        for path, layer in nnx.iter_modules(model)
        for key, weight in [_weight_matrix(layer)]
        if weight is not None
    }
    quantized = quantize_tree(weights, config)

    def swap(path: tuple[Any, ...], node: Any) -> Any:
        key, weight = _weight_matrix(node)
        if weight is None:
            return node
        name = ".".join(map(str, (*path, key)))
        new = quantized[name]
        if isinstance(new, QTensor):
            inputs = 0 if key == "embedding" else len(_axis_lengths(node)[0])
            try:
                return quantized_layer(node, shard_like(new, getattr(node, key).get_value(), inputs, name), activations)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}; or keep it by an override, quant_type = 'none'") from None
        if new.dtype != weight.dtype:  # in float16
            param = getattr(node, key)
            setattr(node, key, param.replace(new if key == "embedding" else new.T.reshape(param.shape)))
        return node

    return nnx.recursive_map(swap, nnx.clone(model))  # or the copy would share its state with the model


def quantized_layer(layer: Any, weight: QTensor, activations: Activations) -> QLinear | QEmbed:
    """Make the quantized layer that replaces a float one, with the same shapes, bias and dtype.

    Raises:
        ValueError: if the weight has another shape than the layer's, as [outputs, inputs].
        ConfigError: if the layer has its own functions to compute by, which would be lost, for an `out_sharding` that
            the weight cannot have, and as for QLinear.
    """
    kind = type(layer).__name__
    for option, usual in DEFAULTS.items():
        if getattr(layer, option, usual[0]) not in usual:
            raise ConfigError(f"{kind} has its own {option}; wanted the default, which quantized layers use")
    if layer.dtype is not None and not jnp.issubdtype(layer.dtype, jnp.floating):
        raise ConfigError(f"{kind} of dtype {jnp.dtype(layer.dtype)}; wanted a floating one")
    if isinstance(layer, nnx.Embed):
        embed = QEmbed(weight, activations=activations, dtype=layer.dtype)
        embed.table = _shardable(embed.table, weight, layer.embedding)
        annotate(embed.table, layer.embedding)
        return embed
    inputs, outputs = _axis_lengths(layer)
    bias = None if layer.bias is None else layer.bias.get_value()
    linear = QLinear(weight, bias, activations=activations, inputs=inputs, outputs=outputs, dtype=layer.dtype)
    linear.weight = _shardable(linear.weight, weight, layer.kernel)
    annotate(linear.weight, layer.kernel, len(inputs))
    if linear.bias is not None and layer.bias is not None:
        annotate(linear.bias, layer.bias)
    return linear


def _shardable(new: nnx.Variable[Any], weight: QTensor, old: nnx.Variable[Any]) -> nnx.Variable[Any]:
    """Keep a QTensor, which can be sharded, in the variable of a weight that has an `out_sharding`."""
    return nnx.Param(weight) if old.get_metadata("out_sharding", None) else new


def _weight_matrix(layer: Any) -> tuple[str, Array | None]:
    """Return the name of a layer's weight and the matrix [outputs, inputs]; None for layers that are not replaced."""
    if type(layer) is nnx.Embed and layer.embedding.get_value().ndim == 2:
        return "embedding", layer.embedding.get_value()
    if type(layer) is nnx.Linear or (type(layer) is nnx.LinearGeneral and _multiplies_last_axes(layer)):
        kernel = layer.kernel.get_value()
        inputs, outputs = _axis_lengths(layer)
        if kernel.shape == (*inputs, *outputs):  # `nnx.vmap` makes several layers at once, with more axes
            return "kernel", kernel.reshape(math.prod(inputs), math.prod(outputs)).T
    return "", None


def _axis_lengths(layer: nnx.Linear | nnx.LinearGeneral) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the lengths of a layer's input axes and of its output axes."""
    inputs, outputs = layer.in_features, layer.out_features
    return (
        inputs if isinstance(inputs, tuple) else (inputs,),
        outputs if isinstance(outputs, tuple) else (outputs,),
    )


def _multiplies_last_axes(layer: nnx.LinearGeneral) -> bool:
    axes = layer.axis if isinstance(layer.axis, tuple) else (layer.axis,)
    return not layer.batch_axis and axes == tuple(range(-len(axes), 0))
