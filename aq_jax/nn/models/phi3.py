"""Phi-3 and Phi-4: one linear layer makes queries, keys and values, and one the gate and what it lets through
(arXiv:2404.14219, arXiv:2412.08905)."""

from __future__ import annotations

from aq_jax.config.fields import Fields
from aq_jax.nn.models.decoder_config import Attention, DecoderConfig, Sizes, reach_of, read_one_rope
from aq_jax.nn.models.decoder_family import make_family
from aq_jax.ops import Scores


def read(fields: Fields, sizes: Sizes) -> DecoderConfig:
    """Read config.json; frequencies that depend on the length of the text (longrope) are not computed."""
    layer = sizes.layer(fields, epsilon=1e-5, fused=True)
    said = fields.take("rope_scaling", dict, {}) or fields.take("rope_parameters", dict, {})
    part = fields.take("partial_rotary_factor", float, 1.0)
    part = Fields(said, f"{fields.where}: rope_parameters").take("partial_rotary_factor", float, part)
    rope = read_one_rope(fields, sizes, part=part)
    reach = reach_of(fields.take("sliding_window", int, None))
    fields.require(attention_bias=False, mlp_bias=False)
    # Dropout is for training; the positions before frequencies were changed matter to longrope only.
    fields.leave("resid_pdrop", "embd_pdrop", "original_max_position_embeddings")
    return sizes.config(fields, layer, [Attention(rope, Scores(reach=reach))] * sizes.layers)


PHI3 = make_family("phi3", read, pad=32000)
