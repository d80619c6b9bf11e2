"""Building blocks of layers, beside linear layers, norms and attention: what follows a layer."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from aq_jax.nn.layers import QLinear
from aq_jax.ops import Epilogue


def follow(layer: nnx.Linear | QLinear, x: Float[Array, "*batch inputs"], after: Epilogue) -> Array:
    """Compute a layer and what follows it; a quantized layer does it in one call."""
    return layer(x, after=after) if isinstance(layer, QLinear) else after.apply(layer(x))


def add_and_normalize(
    layer: nnx.Linear | QLinear,
    x: Float[Array, "*batch inputs"],
    residual: Float[Array, "*batch outputs"],
    norm: nnx.LayerNorm,
) -> Float[Array, "*batch outputs"]:
    """Compute norm(residual + layer(x)); a quantized layer does it in one call."""
    if not isinstance(layer, QLinear) or norm.scale is None or norm.bias is None:
        return norm(residual + layer(x))
    gain, shift = norm.scale.get_value(), norm.bias.get_value()
    return layer(x, after=Epilogue(residual=residual, gain=gain, shift=shift, epsilon=norm.epsilon))
