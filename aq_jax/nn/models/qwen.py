"""Qwen2, with biases of queries, keys and values, and Qwen3, which normalizes queries and keys instead.

See arXiv:2407.10671 and arXiv:2505.09388. Qwen3-Embedding is a Qwen3 that sentence-transformers' files make an encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
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
from aq_jax.nn.models.llama import ATTENTION
from aq_jax.ops import Scores


def read(given: Mapping[str, Any], where: str, *, third: bool) -> DecoderConfig:
    """Read a parsed config.json.

    Args:
        given: The fields.
        where: The file's name, for errors.
        third: Whether it is a Qwen3.

    Raises:
        FormatError: for missing fields, fields of another type, and what is not computed or not known.
    """
    fields = Fields(given, where)
    sizes = read_sizes(fields, head_dim=128 if third else None)
    biased = ATTENTION - {"out"}
    if third:
        biased = ATTENTION if fields.take("attention_bias", bool, False) else frozenset()
    act = read_act(fields, default="silu")
    layer = sizes.layer(fields, act, biased=biased, qk_norm="head" if third else "")
    rope = read_one_rope(fields, sizes)
    attentions = tuple(Attention(rope, Scores(reach=reach)) for reach in read_reaches(fields, sizes.layers))
    fields.require(use_mrope=False)
    tied = fields.take("tie_word_embeddings", bool, False)
    fields.finish()
    return DecoderConfig(sizes.vocab_size, sizes.positions, layer, attentions, tied)


def read_reaches(fields: Fields, layers: int) -> list[int | None]:
    """Read how far the tokens of each layer see.

    Raises:
        FormatError: for a sliding layer without a window.
    """
    slides = fields.take("use_sliding_window", bool, False)
    window = fields.take("sliding_window", int, 4096, null=None)
    window = window if slides else None
    first = fields.take("max_window_layers", int, 28, null=28)
    usual = [SLIDING if window is not None and i >= first else FULL for i in range(layers)]
    kinds = read_kinds(fields, usual)
    if window is None and SLIDING in kinds:
        raise FormatError(f"{fields.where}: layer_types has {SLIDING!r}; wanted a sliding_window, and its use")
    return [reach_of(window) if kind == SLIDING else None for kind in kinds]


QWEN2 = make_family("qwen2", partial(read, third=False), tokenizer="Qwen2Tokenizer")
QWEN3 = make_family("qwen3", partial(read, third=True), tokenizer="Qwen2Tokenizer")
