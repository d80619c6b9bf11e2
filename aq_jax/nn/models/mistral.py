"""Mistral: a Llama whose tokens see the last tokens only (arXiv:2310.06825)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aq_jax.config.fields import Fields
from aq_jax.nn.models.decoder import make_family
from aq_jax.nn.models.decoder_config import Attention, DecoderConfig, reach_of, read_act, read_one_rope, read_sizes
from aq_jax.ops import Scores


def read(given: Mapping[str, Any], where: str) -> DecoderConfig:
    """Read a parsed config.json.

    Raises:
        FormatError: for missing fields, fields of another type, and what is not computed or not known.
    """
    fields = Fields(given, where)
    sizes = read_sizes(fields)
    layer = sizes.layer(fields, read_act(fields, default="silu"))
    rope = read_one_rope(fields, sizes)
    reach = reach_of(fields.take("sliding_window", int, 4096, null=None))
    tied = fields.take("tie_word_embeddings", bool, False)
    fields.finish()
    attentions = (Attention(rope, Scores(reach=reach)),) * sizes.layers
    return DecoderConfig(sizes.vocab_size, sizes.positions, layer, attentions, tied)


MISTRAL = make_family("mistral", read)
