"""Llama 1 to 3, SmolLM and SmolLM2, TinyLlama: arXiv:2302.13971, arXiv:2407.21783."""

from __future__ import annotations

from aq_jax.config.fields import Fields
from aq_jax.nn.models.decoder_config import Attention, DecoderConfig, Sizes, read_one_rope
from aq_jax.nn.models.decoder_family import make_family
from aq_jax.ops import Scores

ATTENTION, FEED = frozenset({"query", "key", "value", "out"}), frozenset({"gate", "up", "down"})


def read(fields: Fields, sizes: Sizes) -> DecoderConfig:
    """Read config.json, of transformers 4 or 5."""
    layer = sizes.layer(fields, biased=read_biases(fields))
    rope = read_one_rope(fields, sizes)
    fields.require(pretraining_tp=1, rope_interleaved=False)
    fields.leave("is_llama_config")
    return sizes.config(fields, layer, [Attention(rope, Scores())] * sizes.layers)


def read_biases(fields: Fields) -> frozenset[str]:
    """Read which linear layers have a bias: those of attention, those of feed-forward parts, both, or none."""
    return read_attention_biases(fields) | (FEED if fields.take("mlp_bias", bool, False) else frozenset())


def read_attention_biases(fields: Fields) -> frozenset[str]:
    """Read which linear layers of attention have a bias: all or none."""
    return ATTENTION if fields.take("attention_bias", bool, False) else frozenset()


LLAMA = make_family("llama", read)
