"""Mistral: a Llama whose tokens see the last tokens only (arXiv:2310.06825)."""

from __future__ import annotations

from aq_jax.config.fields import Fields
from aq_jax.nn.models.decoder_config import Attention, DecoderConfig, Sizes, reach_of, read_one_rope
from aq_jax.nn.models.decoder_family import make_family
from aq_jax.ops import Scores


def read(fields: Fields, sizes: Sizes) -> DecoderConfig:
    """Read config.json."""
    layer = sizes.layer(fields)
    rope = read_one_rope(fields, sizes)
    reach = reach_of(fields.take("sliding_window", int, 4096, null=None))
    return sizes.config(fields, layer, [Attention(rope, Scores(reach=reach))] * sizes.layers)


MISTRAL = make_family("mistral", read)
