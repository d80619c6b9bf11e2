"""OLMo 2 and 3: norms after attention and feed-forward parts, and of whole queries and keys: arXiv:2501.00656.

OLMo 3 lets three of four layers see a window only.
"""

from __future__ import annotations

from aq_jax.config.fields import Fields
from aq_jax.nn.models.decoder_config import (
    FULL,
    SLIDING,
    Attention,
    DecoderConfig,
    LayerConfig,
    Sizes,
    read_kinds,
    read_one_rope,
    read_reaches,
    read_two_ropes,
)  # fmt: skip
from aq_jax.nn.models.decoder_family import make_family
from aq_jax.nn.models.llama import read_attention_biases
from aq_jax.ops import Scores


def read_second(fields: Fields, sizes: Sizes) -> DecoderConfig:
    """Read config.json of OLMo 2."""
    layer = _layer(fields, sizes)
    return sizes.config(fields, layer, [Attention(read_one_rope(fields, sizes), Scores())] * sizes.layers)


def read_third(fields: Fields, sizes: Sizes) -> DecoderConfig:
    """Read config.json of OLMo 3."""
    layer = _layer(fields, sizes)
    kinds = read_kinds(fields, [SLIDING if (i + 1) % 4 else FULL for i in range(sizes.layers)])
    reaches = read_reaches(fields, kinds, fields.take("sliding_window", int, 4096, null=None))
    ropes = read_two_ropes(fields, sizes, {FULL: ("rope_theta", 5e5), SLIDING: ("rope_local_base_freq", 5e5)})
    return sizes.config(fields, layer, [Attention(ropes[kind], Scores(reach=reaches[kind])) for kind in kinds])


def _layer(fields: Fields, sizes: Sizes) -> LayerConfig:
    biased = read_attention_biases(fields)
    return sizes.layer(fields, epsilon=1e-5, biased=biased, norms="after", qk_norm="width")


OLMO2 = make_family("olmo2", read_second, pad=1)
OLMO3 = make_family("olmo3", read_third, pad=1)
