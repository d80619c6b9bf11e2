"""SmolLM3: a Llama in which each fourth layer turns no queries and keys (NoPE, arXiv:2501.18795)."""

from __future__ import annotations

from aq_jax.config.fields import Fields
from aq_jax.errors import FormatError
from aq_jax.nn.models.decoder_config import (
    FULL,
    SLIDING,
    Attention,
    DecoderConfig,
    Sizes,
    read_kinds,
    read_one_rope,
    read_reaches,
    read_used_window,
)  # fmt: skip
from aq_jax.nn.models.decoder_family import make_family
from aq_jax.nn.models.llama import read_biases
from aq_jax.ops import Scores


def read(fields: Fields, sizes: Sizes) -> DecoderConfig:
    """Read config.json.

    Raises:
        FormatError: for layers of which it does not say, by 0 or 1, whether they turn queries and keys.
    """
    layer = sizes.layer(fields, biased=read_biases(fields))
    rope = read_one_rope(fields, sizes, theta=2e6)
    every = fields.take("no_rope_layer_interval", int, 4)
    turned = fields.take("no_rope_layers", list, [int((i + 1) % every != 0) for i in range(sizes.layers)])
    if len(turned) < sizes.layers or not set(turned) <= {0, 1}:
        raise FormatError(f"{fields.where}: no_rope_layers is {str(turned)[:80]}; wanted {sizes.layers} times 0 or 1")
    turned = turned[: sizes.layers]
    window = read_used_window(fields, None)
    kinds = read_kinds(fields, [FULL if window is None or each else SLIDING for each in turned])
    reaches = read_reaches(fields, kinds, window, "a sliding_window, and its use")
    fields.require(pretraining_tp=1, rope_interleaved=False)
    fields.leave("max_window_layers")
    attentions = [
        Attention(rope if each else None, Scores(reach=reaches[kind])) for each, kind in zip(turned, kinds, strict=True)
    ]
    return sizes.config(fields, layer, attentions, tied=True)


SMOLLM3 = make_family("smollm3", read, pad=128004)
