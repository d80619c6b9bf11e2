"""Describe what follows a product: bias, activation, sum, normalization. Kernels may compute it with the product."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

# By the names of Hugging Face's configs.
ACTS: Mapping[str, Callable[[Array], Array]] = {
    "": lambda y: y,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Epilogue:
    """norm(residual + factor * act(product + bias)), of which each part may be absent.

    Args:
        bias: The bias [outputs].
        factor: What an activation is multiplied by [rows, outputs], as in a gate.
        residual: What is added [rows, outputs].
        gain: The gain of a LayerNorm [outputs]; None for no normalization.
        shift: Its bias [outputs].
        act: The name of an activation, one of ACTS (static).
        epsilon: What the LayerNorm adds to a variance (static).
    """

    bias: Float[Array, "outputs"] | None = None
    factor: Float[Array, "rows outputs"] | None = None
    residual: Float[Array, "rows outputs"] | None = None
    gain: Float[Array, "outputs"] | None = None
    shift: Float[Array, "outputs"] | None = None
    act: str = dataclasses.field(default="", metadata={"static": True})
    epsilon: float = dataclasses.field(default=0.0, metadata={"static": True})

    def apply(self, product: Float[Array, "*batch outputs"]) -> Float[Array, "*batch outputs"]:
        """Compute what follows a product.

        >>> import jax.numpy as jnp
        >>> Epilogue(bias=jnp.ones(2), act="relu").apply(jnp.array([[1.0, -3.0]])).tolist()
        [[2.0, 0.0]]
        """
        y = ACTS[self.act](product if self.bias is None else product + self.bias[None])
        y = y if self.factor is None else self.factor * y
        y = y if self.residual is None else self.residual + y
        return y if self.gain is None or self.shift is None else layer_norm(y, self.gain, self.shift, self.epsilon)


def layer_norm(
    x: Float[Array, "*batch width"], gain: Float[Array, "width"], shift: Float[Array, "width"], epsilon: float
) -> Float[Array, "*batch width"]:
    """Normalize to mean 0 and variance 1 over the width, then scale and shift (arXiv:1607.06450)."""
    centred = x - x.mean(-1, keepdims=True)
    factor = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + epsilon)
    lead = (1,) * (x.ndim - 1)
    return centred * (factor * gain.reshape(*lead, -1)) + shift.reshape(*lead, -1)
