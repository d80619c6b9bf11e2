"""Granite 3: a Llama with factors of embeddings, scores, residual sums and logits (arXiv:2404.04324, muP)."""

from __future__ import annotations

from aq_jax.config.fields import Fields
from aq_jax.nn.models.decoder_config import Attention, DecoderConfig, Sizes, read_one_rope
from aq_jax.nn.models.decoder_family import make_family
from aq_jax.nn.models.llama import read_biases
from aq_jax.ops import Scores


def read(fields: Fields, sizes: Sizes) -> DecoderConfig:
    """Read config.json."""
    biased = read_biases(fields)
    layer = sizes.layer(fields, biased=biased, residual_scale=fields.take("residual_multiplier", float, 1.0))
    scores = Scores(fields.take("attention_multiplier", float, 1.0))
    return sizes.config(
        fields, layer, [Attention(read_one_rope(fields, sizes), scores)] * sizes.layers,
        embedding_scale=fields.take("embedding_multiplier", float, 1.0),
        logit_scale=1 / fields.take("logits_scaling", float, 1.0),
    )  # fmt: skip


GRANITE = make_family("granite", read)
