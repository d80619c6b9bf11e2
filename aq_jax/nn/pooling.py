"""Turn hidden states into one embedding a sentence, stage after stage, as sentence-transformers does.

The stages after the pooling give a sentence the same bits whatever runs beside it: they run sentence by sentence,
because XLA sums over the width in another order for another number of rows.
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
from aq_jax.ops import layer_norm

Mode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
MODES: tuple[Mode, ...] = get_args(Mode)
EPSILON = 1e-5  # of torch.nn.LayerNorm
# By the names of torch's classes, which are built without arguments.
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
    """The stage that pools tokens: one vector for each mode, concatenated.

    Args:
        modes: The modes: of the tokens, "mean" is their mean, "mean_sqrt_len_tokens" their sum divided by the square
            root of their number, "weightedmean" their mean weighted by position (1, 2, ...), "max" the largest of each
            dimension; "cls" is the first token, "lasttoken" the last.
        include_prompt: Whether the tokens of a prompt count.
    """

    modes: tuple[Mode, ...] = ("mean",)
    include_prompt: bool = True


@dataclass(frozen=True, eq=False)
class Dense:
    """The stage activation(x W + b); with a residual, plus the input or its projection.

    Args:
        weight: W.
        bias: b.
        activation: The name of the activation, one of ACTIVATIONS.
        residual: Whether the input is added.
        projection: The matrix that projects the added input, if its width differs.
    """

    weight: Float[np.ndarray, "inputs outputs"]
    bias: Float[np.ndarray, "outputs"] | None = None
    activation: str = "Tanh"
    residual: bool = False
    projection: Float[np.ndarray, "inputs outputs"] | None = None


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """The stage that normalizes to mean 0 and variance 1 over the width, then scales and shifts."""

    scale: Float[np.ndarray, "width"]
    bias: Float[np.ndarray, "width"]


@dataclass(frozen=True)
class Normalize:
    """The stage that normalizes to length 1."""


Stage = Pooling | Dense | LayerNorm | Normalize


def embed(
    hidden: Float[Array, "batch tokens width"],
    mask: Bool[Array, "batch tokens"],
    stages: Sequence[Stage],
    skipped: Int[Array, ""] | int | None = None,
) -> Float[Array, "batch features"]:
    """Turn hidden states into embeddings.

    Args:
        hidden: The hidden states of the last layer; those of masked tokens mean nothing.
        mask: The mask of the sentences' own tokens.
        stages: A Pooling, and the stages after it.
        skipped: The number of a sentence's first tokens that a pooling without the prompt leaves out.

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
        return normalize(pooled) if rest else pooled

    def head(row: Float[Array, "1 width"]) -> Float[Array, "1 features"]:
        for stage in rest:
            row = jax.lax.optimization_barrier(apply_stage(stage, row))
        return row

    if backend() != "cpu":
        return head(pooled)
    return jax.lax.map(head, jax.lax.optimization_barrier(pooled)[:, None])[:, 0]


def pool(
    hidden: Float[Array, "batch tokens width"], mask: Bool[Array, "batch tokens"], mode: Mode = "mean"
) -> Float[Array, "batch width"]:
    """Pool a sentence's tokens to one vector; zeros if it has none."""
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
        positions = jnp.arange(1, tokens + 1, dtype=hidden.dtype)[None]
        weights = jnp.where(mask, positions, 0.0)
        return (kept * weights[..., None]).sum(1) / jnp.maximum(weights.sum(1, keepdims=True), 1.0)
    count = jnp.maximum(mask.sum(1, keepdims=True, dtype=jnp.int32), 1).astype(hidden.dtype)
    return kept.sum(1) / (count if mode == "mean" else jnp.sqrt(count))


def normalize(x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """Normalize vectors to length 1; those of length 0 stay.

    >>> normalize(jnp.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    # Never the root of 0: its derivative is infinite there.
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def apply_stage(stage: Stage, x: Float[Array, "batch inputs"]) -> Float[Array, "batch outputs"]:
    """Apply a stage after the pooling."""
    match stage:
        case Dense():
            y = _matmul(x, stage.weight)
            y = ACTIVATIONS[stage.activation](y if stage.bias is None else y + jnp.asarray(stage.bias)[None])
            if stage.residual:
                y = y + (x if stage.projection is None else _matmul(x, stage.projection))
            return y
        case LayerNorm():
            return layer_norm(x, jnp.asarray(stage.scale), jnp.asarray(stage.bias), EPSILON)
        case Normalize():
            return normalize(x)
        case Pooling():
            raise TypeError("the second stage is Pooling, which wants hidden states")


def _matmul(x: Float[Array, "batch inputs"], weight: Float[np.ndarray, "inputs outputs"]) -> Array:
    return jnp.matmul(x, jnp.asarray(weight), precision="highest")
