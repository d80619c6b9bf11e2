"""OLMo 2 and 3: norms after attention and feed-forward parts, and of whole queries and keys: arXiv:2501.00656.

OLMo 3 lets three of four layers see a window only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aq_jax.config.fields import Fields
from aq_jax.errors import FormatError
from aq_jax.nn.models.decoder import make_family
from aq_jax.nn.models.decoder_config import (
    FULL,
    SLIDING,
    Attention,
    DecoderConfig,
    LayerConfig,
    Sizes,
    reach_of,
    read_act,
    read_kinds,
    read_one_rope,
    read_sizes,
    read_two_ropes,
)  # fmt: skip
from aq_jax.nn.models.llama import ATTENTION
from aq_jax.ops import Scores


def read_second(given: Mapping[str, Any], where: str) -> DecoderConfig:
    """Read a parsed config.json of OLMo 2.

    Raises:
        FormatError: for missing fields, fields of another type, and what is not computed or not known.
    """
    fields = Fields(given, where)
    sizes = read_sizes(fields)
    layer = _layer(fields, sizes)
    attentions = (Attention(read_one_rope(fields, sizes), Scores()),) * sizes.layers
    return _config(fields, sizes, layer, attentions)


def read_third(given: Mapping[str, Any], where: str) -> DecoderConfig:
    """Read a parsed config.json of OLMo 3.

    Raises:
        FormatError: for missing fields, fields of another type, and what is not computed or not known.
    """
    fields = Fields(given, where)
    sizes = read_sizes(fields)
    layer = _layer(fields, sizes)
    kinds = read_kinds(fields, [SLIDING if (i + 1) % 4 else FULL for i in range(sizes.layers)])
    window = fields.take("sliding_window", int, 4096, null=None)
    if window is None and SLIDING in kinds:
        raise FormatError(f"{where}: layer_types has {SLIDING!r}; wanted a sliding_window")
    ropes = read_two_ropes(fields, sizes, {FULL: ("rope_theta", 5e5), SLIDING: ("rope_local_base_freq", 5e5)})
    reaches = {FULL: None, SLIDING: reach_of(window)}
    attentions = tuple(Attention(ropes[kind], Scores(reach=reaches[kind])) for kind in kinds)
    return _config(fields, sizes, layer, attentions)


def _layer(fields: Fields, sizes: Sizes) -> LayerConfig:
    biased = ATTENTION if fields.take("attention_bias", bool, False) else frozenset()
    act = read_act(fields, default="silu")
    return sizes.layer(fields, act, 1e-5, biased=biased, norms="after", qk_norm="width")


def _config(fields: Fields, sizes: Sizes, layer: LayerConfig, attentions: tuple[Attention, ...]) -> DecoderConfig:
    tied = fields.take("tie_word_embeddings", bool, False)
    fields.finish()
    return DecoderConfig(sizes.vocab_size, sizes.positions, layer, attentions, tied)


OLMO2 = make_family("olmo2", read_second, pad=1)
OLMO3 = make_family("olmo3", read_third, pad=1)
