"""SmolLM3: a Llama in which each fourth layer turns no queries and keys (NoPE, arXiv:2501.18795)."""

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
    reach_of,
    read_act,
    read_kinds,
    read_one_rope,
    read_sizes,
)  # fmt: skip
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
    layer = sizes.layer(fields, read_act(fields, default="silu"), biased=biased)
    rope = read_one_rope(fields, sizes, theta=2e6)
    every = fields.take("no_rope_layer_interval", int, 4)
    turned = fields.take("no_rope_layers", list, [int((i + 1) % every != 0) for i in range(sizes.layers)])
    if len(turned) < sizes.layers or not set(turned) <= {0, 1}:
        raise FormatError(f"{where}: no_rope_layers is {str(turned)[:80]}; wanted {sizes.layers} times 0 or 1")
    slides, window = fields.take("use_sliding_window", bool, False), fields.take("sliding_window", int, None)
    usual = [SLIDING if slides and window and not each else FULL for each in turned[: sizes.layers]]
    kinds = read_kinds(fields, usual)
    if SLIDING in kinds and not (slides and window):
        raise FormatError(f"{where}: layer_types has {SLIDING!r}; wanted a sliding_window, and its use")
    reaches = {FULL: None, SLIDING: reach_of(window)}
    fields.require(pretraining_tp=1, rope_interleaved=False)
    fields.leave("max_window_layers")
    tied = fields.take("tie_word_embeddings", bool, True)
    fields.finish()
    attentions = tuple(
        Attention(rope if each else None, Scores(reach=reaches[kind]))
        for each, kind in zip(turned[: sizes.layers], kinds, strict=True)
    )
    return DecoderConfig(sizes.vocab_size, sizes.positions, layer, attentions, tied)


SMOLLM3 = make_family("smollm3", read, pad=128004)
