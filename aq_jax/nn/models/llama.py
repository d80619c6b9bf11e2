"""Llama 1 to 3, SmolLM and SmolLM2, TinyLlama: arXiv:2302.13971, arXiv:2407.21783."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aq_jax.config.fields import Fields
from aq_jax.nn.models.decoder import make_family
from aq_jax.nn.models.decoder_config import Attention, DecoderConfig, read_act, read_one_rope, read_sizes
from aq_jax.ops import Scores

ATTENTION, FEED = frozenset({"query", "key", "value", "out"}), frozenset({"gate", "up", "down"})


def read(given: Mapping[str, Any], where: str) -> DecoderConfig:
    """Read a parsed config.json, of transformers 4 or 5.

    Raises:
        FormatError: for missing fields, fields of another type, and what is not computed or not known.
    """
    fields = Fields(given, where)
    sizes = read_sizes(fields)
    biased = read_biases(fields)
    layer = sizes.layer(fields, read_act(fields, default="silu"), biased=biased)
    rope = read_one_rope(fields, sizes)
    fields.require(pretraining_tp=1, rope_interleaved=False)
    fields.leave("is_llama_config")
    tied = fields.take("tie_word_embeddings", bool, False)
    fields.finish()
    attentions = (Attention(rope, Scores()),) * sizes.layers
    return DecoderConfig(sizes.vocab_size, sizes.positions, layer, attentions, tied)


def read_biases(fields: Fields) -> frozenset[str]:
    """Read which linear layers have a bias: those of attention, those of feed-forward parts, both, or none."""
    attention = ATTENTION if fields.take("attention_bias", bool, False) else frozenset()
    return attention | (FEED if fields.take("mlp_bias", bool, False) else frozenset())


LLAMA = make_family("llama", read)
