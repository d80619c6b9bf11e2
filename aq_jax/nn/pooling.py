"""Hidden states to one embedding a sentence, as the modules of sentence-transformers do it, one after another.

What follows the pooling adds the same bits whatever runs beside a sentence: there, sums over the width run sentence by
sentence, because XLA sums in another order for another number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from aq_jax.core.dispatch import backend

Mode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
MODES: tuple[Mode, ...] = get_args(Mode)
EPSILON = 1e-5  # of torch.nn.LayerNorm
# By torch's names of the classes; each is made without arguments.
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "Identity": lambda x: x,
    "Tanh": jnp.tanh,
    "ReLU": lambda x: jnp.maximum(x, 0.0),
    "GELU": lambda x: jax.nn.gelu(x, approximate=False),
    "SiLU": jax.nn.silu,
    "Sigmoid": jax.nn.sigmoid,
    "ELU": jax.nn.elu,
    "LeakyReLU": lambda x: jax.nn.leaky_relu(x, 0.01),
}


@dataclass(frozen=True)
class Pooling:
    """One vector of each mode, side by side.

    Args:
        modes: of the tokens, "mean" is their mean, "mean_sqrt_len_tokens" their sum by the square root of their number,
            "weightedmean" their mean, each as heavy as its place (1, 2, ...), "max" the largest of each dimension;
            "cls" is the first token, "lasttoken" the last.
        include_prompt: whether the tokens of a prompt count.
    """

    modes: tuple[Mode, ...] = ("mean",)
    include_prompt: bool = True


@dataclass(frozen=True, eq=False)
class Dense:
    """activation(x W + b), and, with a residual, the input added, or what another matrix makes of it.

    Args:
        weight: W.
        bias: b.
        activation: a name of ACTIVATIONS.
        residual: whether the input is added.
        projection: of the input that is added, where it is of another width.
    """

    weight: Float[np.ndarray, "inputs outputs"]
    bias: Float[np.ndarray, "outputs"] | None = None
    activation: str = "Tanh"
    residual: bool = False
    projection: Float[np.ndarray, "inputs outputs"] | None = None


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """Mean 0 and variance 1 over the width, then scaled and shifted."""

    scale: Float[np.ndarray, "width"]
    bias: Float[np.ndarray, "width"]


@dataclass(frozen=True)
class Normalize:
    """Length 1."""


Stage = Pooling | Dense | LayerNorm | Normalize


def embed(
    hidden: Float[Array, "batch tokens width"],
    mask: Bool[Array, "batch tokens"],
    stages: Sequence[Stage],
    skipped: Int[Array, ""] | int | None = None,
) -> Float[Array, "batch features"]:
    """Turn hidden states into embeddings.

    Args:
        hidden: of the last layer; those of masked tokens mean nothing.
        mask: which tokens are the sentence's.
        stages: a Pooling, and what follows it.
        skipped: how many tokens each sentence begins with that a pooling without the prompt leaves out.

    >>> hidden, mask = jnp.array([[[3.0, 4.0], [9.0, 9.0]]]), jnp.array([[True, False]])
    >>> embed(hidden, mask, (Pooling(("mean", "max")), Normalize())).tolist()
    [[0.4242640733718872, 0.5656854510307312, 0.4242640733718872, 0.5656854510307312]]
    """
    first, *rest = stages
    if not isinstance(first, Pooling):
        raise TypeError(f"the first stage is {type(first).__name__}; wanted Pooling")
    if skipped is not None and not first.include_prompt:
        mask = mask & (jnp.arange(mask.shape[1], dtype=jnp.int32)[None] >= jnp.asarray(skipped, jnp.int32))
    pooled = jnp.concatenate([pool(hidden, mask, mode) for mode in first.modes], axis=-1)
    if all(isinstance(stage, Normalize) for stage in rest):
        return unit(pooled) if rest else pooled

    def head(row: Float[Array, "1 width"]) -> Float[Array, "1 features"]:
        for stage in rest:
            row = jax.lax.optimization_barrier(apply(stage, row))
        return row

    if backend() != "cpu":
        return head(pooled)
    return jax.lax.map(head, jax.lax.optimization_barrier(pooled)[:, None])[:, 0]


def pool(
    hidden: Float[Array, "batch tokens width"], mask: Bool[Array, "batch tokens"], mode: Mode = "mean"
) -> Float[Array, "batch width"]:
    """Make one vector of a sentence's tokens; zeros if it has none."""
    tokens = mask.shape[1]
    if mode in ("cls", "lasttoken"):
        at = jnp.argmax(mask, axis=1) if mode == "cls" else tokens - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        chosen = jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
        return chosen if mode == "cls" else jnp.where(mask.any(1)[:, None], chosen, 0.0)
    if mode == "max":
        largest = jnp.where(mask[..., None], hidden, -jnp.inf).max(1)
        return jnp.where(mask.any(1)[:, None], largest, 0.0)
    kept = jnp.where(mask[..., None], hidden, 0.0)
    if mode == "weightedmean":
        places = jnp.arange(1, tokens + 1, dtype=hidden.dtype)[None]
        weights = jnp.where(mask, places, 0.0)
        return (kept * weights[..., None]).sum(1) / jnp.maximum(weights.sum(1, keepdims=True), 1.0)
    count = jnp.maximum(mask.sum(1, keepdims=True, dtype=jnp.int32), 1).astype(hidden.dtype)
    return kept.sum(1) / (count if mode == "mean" else jnp.sqrt(count))


def unit(x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """Give vectors length 1; those of length 0 stay.

    >>> unit(jnp.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    # The root of what is never 0: its derivative there is no number.
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def apply(stage: Stage, x: Float[Array, "batch inputs"]) -> Float[Array, "batch outputs"]:
    """Apply what follows a pooling."""
    match stage:
        case Dense():
            y = _times(x, stage.weight)
            y = ACTIVATIONS[stage.activation](y if stage.bias is None else y + jnp.asarray(stage.bias)[None])
            if stage.residual:
                y = y + (x if stage.projection is None else _times(x, stage.projection))
            return y
        case LayerNorm():
            centred = x - x.mean(-1, keepdims=True)
            normal = centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + EPSILON)
            return normal * jnp.asarray(stage.scale)[None] + jnp.asarray(stage.bias)[None]
        case Normalize():
            return unit(x)
        case Pooling():
            raise TypeError("the second stage is Pooling, which wants hidden states")


def _times(x: Float[Array, "batch inputs"], weight: Float[np.ndarray, "inputs outputs"]) -> Array:
    return jnp.matmul(x, jnp.asarray(weight), precision="highest")
