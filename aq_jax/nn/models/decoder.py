"""Decoders: Llama (arXiv:2302.13971) and the models that came of it, each a few settings (`DecoderConfig`).

Rotary positions (arXiv:2104.09864), grouped queries (arXiv:2305.13245), gated feed-forward parts (arXiv:2002.05202),
RMSNorm. Residual sums are float32; linear layers and attention round their inputs to `activations`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from aq_jax.core.dispatch import Activations, product_dtype
from aq_jax.nn.blocks import follow
from aq_jax.nn.layers import QLinear
from aq_jax.nn.models.decoder_config import Attention, DecoderConfig, LayerConfig
from aq_jax.nn.models.family import Cache, LanguageModel
from aq_jax.nn.rope import Rope, apply_rope
from aq_jax.ops import ACTS, Cached, CacheType, Epilogue, Scores, cached_attention

Ropes = dict[Rope | None, tuple[Array, Array] | None]


class Decoder(LanguageModel):
    """The decoder: ids to logits, with a cache of keys and values.

    Args:
        config: The model's settings.
        activations: The type that linear layers (once quantized) and attention round their inputs to.
        rngs: The random streams of the initial weights.

    >>> from aq_jax.nn.models import FAMILIES
    >>> sizes = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    >>> sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64}
    >>> def logits():
    ...     model = Decoder(FAMILIES["llama"].read(sizes, "config.json"), rngs=nnx.Rngs(0))
    ...     hidden, cache = model.extend(jnp.ones((1, 8), int), model.empty_cache(1, 8), 0)
    ...     return model.logits(hidden)
    >>> jax.eval_shape(logits).shape
    (1, 8, 100)
    """

    table = "embed.embedding"

    def __init__(self, config: DecoderConfig, *, activations: Activations = "float32", rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.List([Layer(config.layer, each, activations, rngs) for each in config.attentions])
        self.norm = _norm(config.layer, rngs)
        if not config.tied:
            self.head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)

    def empty_cache(self, batch: int, positions: int, dtype: CacheType = "float32") -> Cache:
        """Allocate a cache for this many positions."""
        layer = self.config.layer
        empty = partial(Cached.empty, (batch, positions, layer.kv_heads, layer.size), dtype)
        return [(empty(), empty()) for _ in self.config.attentions]

    def extend(
        self,
        ids: Int[Array, "batch tokens"],
        cache: Cache,
        start: int | Int[Array, ""],
        first: Int[Array, "batch"] | None = None,
    ) -> tuple[Float[Array, "batch tokens width"], Cache]:
        """Run tokens that follow `start` others; return their hidden states, and the cache with them in it."""
        at = start + jnp.arange(ids.shape[1], dtype=jnp.int32)
        positions = at if first is None else jnp.maximum(at[None] - first[:, None], 0)
        ropes = {each.rope: _turns(each.rope, positions) for each in self.config.attentions}
        x = self.begin(ids)
        filled: Cache = []
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            x, both = layer.extend(x, keys, values, at, ropes[layer.attention.rope], first)
            filled.append(both)
        return self.end(x), filled

    def begin(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens width"]:
        """Compute the first layer's inputs."""
        return _times(self.config.embedding_scale, self.embed(ids))

    def end(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Turn the last layer's outputs into hidden states."""
        return self.norm(x)

    def logits(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocabulary"]:
        """Compute scores of the next token."""
        found = self.embed.attend(hidden) if self.config.tied else self.head(hidden)
        return Scores(cap=self.config.logit_cap).bound(_times(self.config.logit_scale, found))


class Layer(nnx.Module):
    """Attention and a gated feed-forward part, each added to its input."""

    def __init__(self, config: LayerConfig, attention: Attention, activations: Activations, rngs: nnx.Rngs) -> None:
        self.config, self.attention = config, attention
        self.activations: Activations = activations
        width, queries, keys = config.width, config.heads * config.size, config.kv_heads * config.size

        def linear(name: str, inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=name in config.biased, rngs=rngs)

        if config.fused:
            self.qkv = linear("qkv", width, queries + 2 * keys)
            self.gate_up = linear("gate_up", width, 2 * config.inner)
        else:
            self.query, self.key = linear("query", width, queries), linear("key", width, keys)
            self.value = linear("value", width, keys)
            self.gate, self.up = linear("gate", width, config.inner), linear("up", width, config.inner)
        self.out, self.down = linear("out", queries, width), linear("down", config.inner, width)
        if config.norms != "after":
            self.attention_norm, self.feed_norm = _norm(config, rngs), _norm(config, rngs)
        if config.norms != "before":
            self.after_attention_norm, self.after_feed_norm = _norm(config, rngs), _norm(config, rngs)
        if config.qk_norm:
            whole = config.qk_norm == "width"
            self.query_norm = _norm(config, rngs, queries if whole else config.size)
            self.key_norm = _norm(config, rngs, keys if whole else config.size)

    def __call__(
        self, x: Float[Array, "batch tokens width"], mask: Bool[Array, "batch tokens"]
    ) -> Float[Array, "batch tokens width"]:
        """Run one layer on whole texts; masked tokens after a text change nothing in it."""
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)
        empty = Cached.empty((x.shape[0], x.shape[1], self.config.kv_heads, self.config.size))
        return self.extend(x, empty, empty, positions, _turns(self.attention.rope, positions))[0]

    def extend(
        self,
        x: Float[Array, "batch tokens width"],
        keys: Cached,
        values: Cached,
        at: Int[Array, "tokens"],
        rope: tuple[Array, Array] | None,
        first: Int[Array, "batch"] | None = None,
    ) -> tuple[Float[Array, "batch tokens width"], tuple[Cached, Cached]]:
        """Run one layer; the keys and values of these tokens go into the cache, where they are then read."""
        batch, tokens, _ = x.shape
        q, k, v = self._queries_keys_values(x if self.config.norms == "after" else self.attention_norm(x))
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        keys, values = keys.put(k, at[0]), values.put(v, at[0])
        how = self.attention.scores
        mixed = cached_attention(q, keys, values, at, product_dtype(self.activations), how, first)
        x = self._add(self.out, mixed.reshape(batch, tokens, -1), x, "after_attention_norm")
        gated = self._gated(x if self.config.norms == "after" else self.feed_norm(x))
        return self._add(self.down, gated, x, "after_feed_norm"), (keys, values)

    def _queries_keys_values(
        self, x: Float[Array, "batch tokens width"]
    ) -> tuple[
        Float[Array, "batch tokens heads size"],
        Float[Array, "batch tokens kv_heads size"],
        Float[Array, "batch tokens kv_heads size"],
    ]:
        config = self.config
        if config.fused:
            ends = (config.heads * config.size, (config.heads + config.kv_heads) * config.size)
            q, k, v = jnp.split(self.qkv(x), ends, axis=-1)
        else:
            q, k, v = self.query(x), self.key(x), self.value(x)
        if config.qk_norm == "width":
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (part.reshape(*x.shape[:2], -1, config.size) for part in (q, k, v))
        return (self.query_norm(q), self.key_norm(k), v) if config.qk_norm == "head" else (q, k, v)

    def _gated(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens inner"]:
        if self.config.fused:
            gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
            return ACTS[self.config.act](gate) * up
        return follow(self.gate, x, Epilogue(factor=self.up(x), act=self.config.act))

    def _add(
        self, layer: nnx.Linear | QLinear, x: Array, residual: Array, norm: str
    ) -> Float[Array, "batch tokens width"]:
        """Add what a linear layer gives, normalized if norms come after it."""
        if self.config.norms != "before":
            return residual + getattr(self, norm)(layer(x))
        if self.config.residual_scale != 1:
            return residual + self.config.residual_scale * layer(x)
        return follow(layer, x, Epilogue(residual=residual))


class UnitGainNorm(nnx.Module):
    """RMSNorm (arXiv:1910.07467) with the gain 1 + `scale`.

    >>> UnitGainNorm(2, 0.0)(jnp.array([2.0, 2.0])).tolist()
    [1.0, 1.0]
    """

    def __init__(self, size: int, epsilon: float) -> None:
        self.scale, self.epsilon = nnx.Param(jnp.zeros(size, jnp.float32)), epsilon

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalize over the last axis."""
        factor = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
        return x * (factor * (1 + self.scale.get_value()).reshape((1,) * (x.ndim - 1) + (-1,)))


def _norm(config: LayerConfig, rngs: nnx.Rngs, size: int | None = None) -> nnx.RMSNorm | UnitGainNorm:
    size = size or config.width
    if config.unit_gain:
        return UnitGainNorm(size, config.epsilon)
    return nnx.RMSNorm(size, epsilon=config.epsilon, rngs=rngs)


def _turns(rope: Rope | None, positions: Int[Array, "*batch tokens"]) -> tuple[Array, Array] | None:
    return None if rope is None else rope.cos_sin(positions)


def _times(factor: float, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return x if factor == 1 else factor * x
