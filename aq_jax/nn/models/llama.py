"""Llama: rotary positions (arXiv:2104.09864), grouped queries (arXiv:2305.13245), SwiGLU (arXiv:2002.05202), RMSNorm.

Residual sums are float32; linear layers and attention round their inputs to `activations`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from aq_jax.config.fields import read_fields
from aq_jax.core.dispatch import Activations, product_dtype
from aq_jax.errors import FormatError
from aq_jax.nn.blocks import LLAMA3_SCALING, apply_rope, follow, rope_cos_sin
from aq_jax.nn.models.family import Cache, Family, LanguageModel
from aq_jax.nn.weights import NameRule, keep, transpose
from aq_jax.ops import Epilogue, cached_attention


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of a Hugging Face config.json that the computation depends on.

    `rope_scaling` holds the numbers of the llama3 rule, in the order of `LLAMA3_SCALING`, or nothing.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: tuple[float, ...] = ()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], where: str) -> LlamaConfig:
        """Read a parsed config.json, of transformers 4 or 5.

        Raises:
            FormatError: for missing fields, fields of another type, heads that cannot be shared or rotated, and
                variants that this model does not compute.
        """
        # Absent and null mean the same there.
        given = {name: value for name, value in fields.items() if value is not None}
        heads = given.get("num_attention_heads")
        given.setdefault("num_key_value_heads", heads)
        if type(heads) is int and heads > 0 and type(given.get("hidden_size")) is int:
            given.setdefault("head_dim", given["hidden_size"] // heads)
        rope: dict[str, Any] = {}
        for name in ("rope_scaling", "rope_parameters"):
            if not isinstance(said := given.pop(name, {}), dict):
                raise FormatError(f"{where}: {name} is {said!r}; wanted an object")
            rope |= said
        given["rope_theta"] = rope.get("rope_theta", given.get("rope_theta", 10000.0))
        kind = rope.get("rope_type", rope.get("type", "default"))
        scaling: tuple[float, ...] = ()
        if kind == "llama3":
            missing = [name for name in LLAMA3_SCALING if not isinstance(rope.get(name), int | float)]
            if missing:
                raise FormatError(f"{where}: rope_scaling of type llama3 has no number {', '.join(missing)}")
            scaling = tuple(float(rope[name]) for name in LLAMA3_SCALING)
        elif kind != "default":
            raise FormatError(f"{where}: rope_type is {kind!r}; wanted 'default' or 'llama3'")
        config = read_fields(cls, given, where, {"hidden_act": ("silu",), "pretraining_tp": (1,)})
        if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
            raise FormatError(
                f"{where}: num_attention_heads {config.num_attention_heads}, num_key_value_heads "
                f"{config.num_key_value_heads}, head_dim {config.head_dim}; wanted a number of heads that the "
                "key-value heads divide, and an even head_dim"
            )
        return dataclasses.replace(config, rope_scaling=scaling)


class Llama(LanguageModel):
    """The decoder: ids to logits, with a cache of keys and values.

    Args:
        config: The model's sizes.
        activations: The type that linear layers (once quantized) and attention round their inputs to.
        rngs: The random streams of the initial weights.

    >>> from flax import nnx
    >>> config = LlamaConfig(100, 16, 32, 1, 4, 2, 4, 64)
    >>> def logits():
    ...     model = Llama(config, rngs=nnx.Rngs(0))
    ...     hidden, cache = model.extend(jnp.ones((1, 8), int), model.empty_cache(1, 8), 0)
    ...     return model.logits(hidden)
    >>> jax.eval_shape(logits).shape
    (1, 8, 100)
    """

    table = "embed.embedding"

    def __init__(self, config: LlamaConfig, *, activations: Activations = "float32", rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.List([Layer(config, activations, rngs) for _ in range(config.num_hidden_layers)])
        self.norm = _norm(config, rngs)
        if not config.tie_word_embeddings:
            self.head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)

    def empty_cache(self, batch: int, positions: int) -> Cache:
        """Allocate a cache for this many positions."""
        shape = (batch, positions, self.config.num_key_value_heads, self.config.head_dim)
        zeros = partial(jnp.zeros, shape, jnp.float32)
        return [(zeros(), zeros()) for _ in range(self.config.num_hidden_layers)]

    def extend(
        self, ids: Int[Array, "batch tokens"], cache: Cache, start: int | Int[Array, ""]
    ) -> tuple[Float[Array, "batch tokens width"], Cache]:
        """Run tokens that follow `start` others; return their hidden states, and the cache with them in it."""
        positions = start + jnp.arange(ids.shape[1], dtype=jnp.int32)
        rope = rope_of(self.config, positions)
        x = self.begin(ids)
        filled: Cache = []
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            x, both = layer.extend(x, keys, values, positions, rope)
            filled.append(both)
        return self.end(x), filled

    def begin(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens width"]:
        """Compute the first layer's inputs."""
        return self.embed(ids)

    def end(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Turn the last layer's outputs into hidden states."""
        return self.norm(x)

    def logits(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocabulary"]:
        """Compute scores of the next token."""
        return self.embed.attend(hidden) if self.config.tie_word_embeddings else self.head(hidden)


class Layer(nnx.Module):
    """Attention and a gated feed-forward part, each on the normalized input and added to it."""

    def __init__(self, config: LlamaConfig, activations: Activations, rngs: nnx.Rngs) -> None:
        width, size, bias = config.hidden_size, config.head_dim, config.attention_bias
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.config = config
        self.activations: Activations = activations
        self.query = nnx.Linear(width, heads * size, use_bias=bias, rngs=rngs)
        self.key = nnx.Linear(width, kv_heads * size, use_bias=bias, rngs=rngs)
        self.value = nnx.Linear(width, kv_heads * size, use_bias=bias, rngs=rngs)
        self.out = nnx.Linear(heads * size, width, use_bias=bias, rngs=rngs)
        self.gate = nnx.Linear(width, config.intermediate_size, use_bias=config.mlp_bias, rngs=rngs)
        self.up = nnx.Linear(width, config.intermediate_size, use_bias=config.mlp_bias, rngs=rngs)
        self.down = nnx.Linear(config.intermediate_size, width, use_bias=config.mlp_bias, rngs=rngs)
        self.attention_norm, self.feed_norm = _norm(config, rngs), _norm(config, rngs)

    def __call__(
        self, x: Float[Array, "batch tokens width"], mask: Bool[Array, "batch tokens"]
    ) -> Float[Array, "batch tokens width"]:
        """Run one layer on whole texts; masked tokens after a text change nothing in it."""
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)
        empty = jnp.zeros((*x.shape[:2], self.config.num_key_value_heads, self.config.head_dim), jnp.float32)
        return self.extend(x, empty, empty, positions, rope_of(self.config, positions))[0]

    def extend(
        self,
        x: Float[Array, "batch tokens width"],
        keys: Float[Array, "batch positions kv_heads size"],
        values: Float[Array, "batch positions kv_heads size"],
        positions: Int[Array, "tokens"],
        rope: tuple[Array, Array],
    ) -> tuple[Float[Array, "batch tokens width"], tuple[Array, Array]]:
        """Run one layer; the keys and values of these tokens go into the cache at their positions."""
        batch, tokens, _ = x.shape
        heads, kv_heads, size = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        normed = self.attention_norm(x)
        q = apply_rope(self.query(normed).reshape(batch, tokens, heads, size), rope)
        k = apply_rope(self.key(normed).reshape(batch, tokens, kv_heads, size), rope)
        v = self.value(normed).reshape(batch, tokens, kv_heads, size)
        keys = jax.lax.dynamic_update_slice_in_dim(keys, k, positions[0], axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(values, v, positions[0], axis=1)
        mixed = cached_attention(q, keys, values, positions, product_dtype(self.activations))
        x = follow(self.out, mixed.reshape(batch, tokens, -1), Epilogue(residual=x))
        normed = self.feed_norm(x)
        gated = follow(self.gate, normed, Epilogue(factor=self.up(normed), act="silu"))
        return follow(self.down, gated, Epilogue(residual=x)), (keys, values)


def rope_of(config: LlamaConfig, positions: Int[Array, "tokens"]) -> tuple[Array, Array]:
    """Compute the rotary cosines and sines at these positions."""
    return rope_cos_sin(positions, config.head_dim, config.rope_theta, config.rope_scaling)


def _norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)


def names(config: LlamaConfig) -> tuple[NameRule, ...]:
    """List the rules for names: Hugging Face names -> paths in Llama."""
    layer = r"model\.layers\.(\d+)\."
    moved = {
        "self_attn.q_proj": "query",
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.o_proj": "out",
    }
    moved |= {f"mlp.{name}_proj": name for name in ("gate", "up", "down")}
    linear: list[NameRule] = []
    for theirs, ours in moved.items():
        pattern = layer + theirs.replace(".", r"\.")
        linear += [
            (pattern + r"\.weight", rf"layers.\1.{ours}.kernel", transpose),
            (pattern + r"\.bias", rf"layers.\1.{ours}.bias", keep),
        ]
    return (
        (r"model\.embed_tokens\.weight", "embed.embedding", keep),
        (r"model\.norm\.weight", "norm.scale", keep),
        (r"lm_head\.weight", None if config.tie_word_embeddings else "head.kernel", transpose),
        (layer + r"input_layernorm\.weight", r"layers.\1.attention_norm.scale", keep),
        (layer + r"post_attention_layernorm\.weight", r"layers.\1.feed_norm.scale", keep),
        (layer + r"self_attn\.rotary_emb\.inv_freq", None, keep),
        *linear,
    )


LLAMA = Family(("llama",), "generate", LlamaConfig.from_json, Llama, names)
