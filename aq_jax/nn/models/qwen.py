"""Qwen2, with biases of queries, keys and values, and Qwen3, which normalizes queries and keys instead.

See arXiv:2407.10671 and arXiv:2505.09388. Qwen3-Embedding is a Qwen3 that sentence-transformers' files make an encoder.
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
    read_used_window,
)  # fmt: skip
from aq_jax.nn.models.decoder_family import make_family
from aq_jax.nn.models.llama import ATTENTION, read_attention_biases
from aq_jax.ops import Scores


def read_second(fields: Fields, sizes: Sizes) -> DecoderConfig:
    """Read config.json of Qwen2."""
    return _config(fields, sizes, sizes.layer(fields, biased=ATTENTION - {"out"}))


def read_third(fields: Fields, sizes: Sizes) -> DecoderConfig:
    """Read config.json of Qwen3."""
    return _config(fields, sizes, sizes.layer(fields, biased=read_attention_biases(fields), qk_norm="head"))


def _config(fields: Fields, sizes: Sizes, layer: LayerConfig) -> DecoderConfig:
    rope = read_one_rope(fields, sizes)
    window = read_used_window(fields, 4096)
    first = fields.take("max_window_layers", int, 28, null=28)
    kinds = read_kinds(fields, [FULL if window is None or i < first else SLIDING for i in range(sizes.layers)])
    reaches = read_reaches(fields, kinds, window, "a sliding_window, and its use")
    fields.require(use_mrope=False)
    return sizes.config(fields, layer, [Attention(rope, Scores(reach=reaches[kind])) for kind in kinds])


QWEN2 = make_family("qwen2", read_second, tokenizer="Qwen2Tokenizer")
QWEN3 = make_family("qwen3", read_third, head_dim=128, tokenizer="Qwen2Tokenizer")
