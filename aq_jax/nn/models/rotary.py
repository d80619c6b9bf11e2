"""Encoders with rotary positions, ModernBERT and NomicBERT, each a few settings (`RotaryConfig`).

Residual sums are float32; linear layers and attention round their inputs to `activations`.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from aq_jax.core.dispatch import Activations, product_dtype
from aq_jax.nn.blocks import add_and_normalize, follow
from aq_jax.nn.models.decoder_config import Attention
from aq_jax.nn.models.family import Model
from aq_jax.nn.rope import apply_rope
from aq_jax.ops import ACTS, Epilogue, attention


@dataclass(frozen=True)
class RotaryConfig:
    """The settings of an encoder with rotary positions.

    Args:
        vocab_size: The number of tokens.
        hidden_size: The width of hidden states.
        intermediate_size: The width inside a feed-forward part.
        heads: The number of heads.
        max_position_embeddings: The number of positions that a text may have.
        attentions: What each layer has of its own.
        epsilon: What norms add to variances.
        act: The activation of gates, one of `ops.ACTS`.
        type_vocab_size: The number of token types, of which the first is added; 0 for none.
        biased: The names of the linear layers that have a bias.
        norm_bias: Whether norms have a bias.
        before: Whether norms stand before attention and feed-forward parts, and after all; or else after each.
        fused: Whether gate and up are one linear layer.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    max_position_embeddings: int
    attentions: tuple[Attention, ...]
    epsilon: float
    act: str
    type_vocab_size: int = 0
    biased: frozenset[str] = frozenset()
    norm_bias: bool = True
    before: bool = False
    fused: bool = False


class RotaryEncoder(Model):
    """The encoder: ids and mask to hidden states.

    Args:
        config: The model's settings.
        activations: The type that linear layers (once quantized) and attention round their inputs to.
        rngs: The random streams of the initial weights.

    >>> import jax
    >>> from aq_jax.nn.rope import Rope
    >>> from aq_jax.ops import Scores
    >>> config = RotaryConfig(100, 16, 32, 2, 64, (Attention(Rope((1.0, 0.1, 0.01, 0.001)), Scores()),), 1e-5, "silu")
    >>> def hidden():
    ...     return RotaryEncoder(config, rngs=nnx.Rngs(0))(jnp.ones((2, 8), int), jnp.ones((2, 8), bool))
    >>> jax.eval_shape(hidden).shape
    (2, 8, 16)
    """

    table = "word.embedding"

    def __init__(self, config: RotaryConfig, *, activations: Activations = "float32", rngs: nnx.Rngs) -> None:
        self.config = config
        self.word = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        if config.type_vocab_size:
            self.token_type = nnx.Embed(config.type_vocab_size, config.hidden_size, rngs=rngs)
        self.norm = _norm(config, rngs)
        self.layers = nnx.List(
            [Layer(config, each, activations, rngs, first=not i) for i, each in enumerate(config.attentions)]
        )
        if config.before:
            self.final_norm = _norm(config, rngs)

    def begin(
        self, ids: Int[Array, "batch tokens"], types: Int[Array, "batch tokens"] | None = None
    ) -> Float[Array, "batch tokens width"]:
        """Compute the first layer's inputs."""
        types = jnp.zeros((1, 1), jnp.int32) if types is None else types
        x = self.word(ids)
        return self.norm(x + self.token_type(types) if self.config.type_vocab_size else x)

    def end(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Turn the last layer's outputs into hidden states."""
        return self.final_norm(x) if self.config.before else x


class Layer(nnx.Module):
    """Attention and a gated feed-forward part, each added to its input."""

    def __init__(
        self, config: RotaryConfig, attention: Attention, activations: Activations, rngs: nnx.Rngs, *, first: bool
    ) -> None:
        self.attention, self.heads, self.act = attention, config.heads, config.act
        self.before, self.fused = config.before, config.fused
        self.activations: Activations = activations
        width, inner = config.hidden_size, config.intermediate_size

        def linear(name: str, inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=name in config.biased, rngs=rngs)

        self.qkv, self.out = linear("qkv", width, 3 * width), linear("out", width, width)
        if config.fused:
            self.gate_up = linear("gate_up", width, 2 * inner)
        else:
            self.gate, self.up = linear("gate", width, inner), linear("up", width, inner)
        self.down = linear("down", inner, width)
        # The first layer's inputs are normalized already.
        self.attention_norm = None if first and config.before else _norm(config, rngs)
        self.feed_norm = _norm(config, rngs)

    def __call__(
        self, x: Float[Array, "batch tokens width"], mask: Bool[Array, "batch tokens"]
    ) -> Float[Array, "batch tokens width"]:
        """Run one layer."""
        if not self.before and self.attention_norm is not None:
            x = add_and_normalize(self.out, self._mixed(x, mask), x, self.attention_norm)
            return add_and_normalize(self.down, self._gated(x), x, self.feed_norm)
        normed = x if self.attention_norm is None else self.attention_norm(x)
        x = follow(self.out, self._mixed(normed, mask), Epilogue(residual=x))
        return follow(self.down, self._gated(self.feed_norm(x)), Epilogue(residual=x))

    def _mixed(self, x: Float[Array, "batch tokens width"], mask: Bool[Array, "batch tokens"]) -> Array:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3 * self.heads, -1)
        if self.attention.rope is not None:
            rope = self.attention.rope.cos_sin(jnp.arange(tokens, dtype=jnp.int32))
            turned = apply_rope(qkv[:, :, : 2 * self.heads], rope)
            qkv = jnp.concatenate([turned, qkv[:, :, 2 * self.heads :]], axis=2)
        q, k, v = (part.reshape(batch, tokens, width) for part in jnp.split(qkv, 3, axis=2))
        return attention(q, k, v, mask, self.heads, product_dtype(self.activations), self.attention.scores)

    def _gated(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens inner"]:
        if self.fused:
            gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
            return ACTS[self.act](gate) * up
        return follow(self.gate, x, Epilogue(factor=self.up(x), act=self.act))


def _norm(config: RotaryConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.epsilon, use_bias=config.norm_bias, use_fast_variance=False, rngs=rngs
    )
