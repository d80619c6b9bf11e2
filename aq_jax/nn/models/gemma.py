"""Gemma 1 to 3: arXiv:2403.08295, arXiv:2408.00118, arXiv:2503.19786.

Embeddings are scaled, and gains are 1 + what is stored. Gemma 2 bounds scores and logits, normalizes before and after
attention and feed-forward parts, and lets each second layer see a window only; Gemma 3 normalizes queries and keys
instead of bounding their scores, and turns them by two rotations.
"""

from __future__ import annotations

from typing import Any

from aq_jax.config.fields import Fields
from aq_jax.nn.models.decoder_config import (
    FULL,
    SLIDING,
    Attention,
    DecoderConfig,
    LayerConfig,
    Sizes,
    read_act,
    read_kinds,
    read_one_rope,
    read_reaches,
    read_two_ropes,
)  # fmt: skip
from aq_jax.nn.models.decoder_family import make_family
from aq_jax.nn.models.llama import read_attention_biases
from aq_jax.ops import Scores

GELU = "gelu_pytorch_tanh"


def read_first(fields: Fields, sizes: Sizes) -> DecoderConfig:
    """Read config.json of Gemma 1."""
    act = fields.choose("hidden_act", ("gelu", GELU), GELU)  # its first files say gelu, and mean the approximation
    fields.require(hidden_activation=GELU)
    layer = _layer(fields, sizes, "gelu_new" if act == "gelu" else read_act(fields, default=GELU))
    return _config(fields, sizes, layer, [Attention(read_one_rope(fields, sizes), Scores())] * sizes.layers)


def read_second(fields: Fields, sizes: Sizes) -> DecoderConfig:
    """Read config.json of Gemma 2."""
    layer = _layer(fields, sizes, read_act(fields, "hidden_activation", GELU), norms="both")
    fields.require(hidden_act=GELU)
    rope = read_one_rope(fields, sizes)
    scale = fields.take("query_pre_attn_scalar", float, 256.0) ** -0.5
    cap = fields.take("attn_logit_softcapping", float, 50.0, null=0.0)
    window = fields.take("sliding_window", int, 4096, null=None)
    kinds = read_kinds(fields, [FULL if i % 2 else SLIDING for i in range(sizes.layers)])
    reaches = read_reaches(fields, kinds, window)
    attentions = [Attention(rope, Scores(scale, cap, reaches[kind])) for kind in kinds]
    return _config(fields, sizes, layer, attentions, fields.take("final_logit_softcapping", float, 30.0, null=0.0))


def read_third(fields: Fields, sizes: Sizes) -> DecoderConfig:
    """Read config.json of Gemma 3, of text alone."""
    layer = _layer(fields, sizes, read_act(fields, "hidden_activation", GELU), norms="both", qk_norm="head")
    ropes = read_two_ropes(fields, sizes, {FULL: ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 1e4)})
    scale = fields.take("query_pre_attn_scalar", float, 256.0) ** -0.5
    fields.leave("attn_logit_softcapping")  # which transformers reads and does not use
    window = fields.take("sliding_window", int, 4096, null=None)
    every = fields.take("_sliding_window_pattern", int, fields.take("sliding_window_pattern", int, 6))
    kinds = read_kinds(fields, [SLIDING if (i + 1) % every else FULL for i in range(sizes.layers)])
    reaches = read_reaches(fields, kinds, window)
    attentions = [Attention(ropes[kind], Scores(scale, reach=reaches[kind])) for kind in kinds]
    return _config(fields, sizes, layer, attentions, fields.take("final_logit_softcapping", float, 0.0))


def _layer(fields: Fields, sizes: Sizes, act: str, **settings: Any) -> LayerConfig:
    return sizes.layer(fields, act, biased=read_attention_biases(fields), unit_gain=True, **settings)


def _config(
    fields: Fields, sizes: Sizes, layer: LayerConfig, attentions: list[Attention], logit_cap: float = 0.0
) -> DecoderConfig:
    fields.require(use_bidirectional_attention=False)
    scale = sizes.width**0.5
    return sizes.config(fields, layer, attentions, tied=True, embedding_scale=scale, logit_cap=logit_cap)


GEMMA = make_family("gemma", read_first, head_dim=256, pad=0, tokenizer="GemmaTokenizer")
GEMMA2 = make_family("gemma2", read_second, head_dim=256, pad=0, tokenizer="GemmaTokenizer")
GEMMA3 = make_family("gemma3_text", read_third, head_dim=256, pad=0, tokenizer="GemmaTokenizer")
