"""Granite 3: a Llama with factors of embeddings, scores, residual sums and logits (arXiv:2404.04324, muP)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aq_jax.config.fields import Fields
from aq_jax.nn.models.decoder import make_family
from aq_jax.nn.models.decoder_config import Attention, DecoderConfig, read_act, read_one_rope, read_sizes
from aq_jax.nn.models.llama import read_biases
from aq_jax.ops import Scores


def read(given: Mapping[str, Any], where: str) -> DecoderConfig:
    """Read a parsed config.json.

    Raises:
        FormatError: for missing fields, fields of another type, and what is not computed or not known.
    """
    fields = Fields(given, where)
    sizes = read_sizes(fields)
    biased = read_biases(fields)
    residual_scale = fields.take("residual_multiplier", float, 1.0)
    act = read_act(fields, default="silu")
    layer = sizes.layer(fields, act, biased=biased, residual_scale=residual_scale)
    scores = Scores(fields.take("attention_multiplier", float, 1.0))
    config = DecoderConfig(
        sizes.vocab_size, sizes.positions, layer,
        attentions=(Attention(read_one_rope(fields, sizes), scores),) * sizes.layers,
        tied=fields.take("tie_word_embeddings", bool, False),
        embedding_scale=fields.take("embedding_multiplier", float, 1.0),
        logit_scale=1 / fields.take("logits_scaling", float, 1.0),
    )  # fmt: skip
    fields.finish()
    return config


GRANITE = make_family("granite", read)
