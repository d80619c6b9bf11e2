"""Make families of decoders: the names of their tensors, and what they share in reading a config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp

from aq_jax.config.fields import Fields
from aq_jax.core.qtensor import QTensor
from aq_jax.errors import FormatError
from aq_jax.nn.models.decoder import Decoder
from aq_jax.nn.models.decoder_config import DecoderConfig, Sizes, read_sizes
from aq_jax.nn.models.family import Family, Scorer
from aq_jax.nn.weights import NameRule, keep, transpose
from aq_jax.ops import dequantize

# Hugging Face's names of a layer's linear layers, and of its norms by where they stand.
LINEAR = {"q": "query", "k": "key", "v": "value", "o": "out", "qkv": "qkv"}
LINEAR = {f"self_attn.{theirs}_proj": ours for theirs, ours in LINEAR.items()}
LINEAR |= {f"mlp.{name}_proj": name for name in ("gate", "up", "down", "gate_up")}
NORMS = {
    "before": {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_norm"},
    "after": {
        "post_attention_layernorm": "after_attention_norm", "post_feedforward_layernorm": "after_feed_norm",
    },
    "both": {
        "input_layernorm": "attention_norm", "post_attention_layernorm": "after_attention_norm",
        "pre_feedforward_layernorm": "feed_norm", "post_feedforward_layernorm": "after_feed_norm",
    },
}  # fmt: skip


def names(config: DecoderConfig) -> tuple[NameRule, ...]:
    """List the rules for names: Hugging Face names -> paths in Decoder."""
    layer = r"(?:model\.)?layers\.(\d+)\."
    linear: list[NameRule] = []
    for theirs, ours in LINEAR.items():
        pattern = layer + theirs.replace(".", r"\.")
        linear += [
            (pattern + r"\.weight", rf"layers.\1.{ours}.kernel", transpose),
            (pattern + r"\.bias", rf"layers.\1.{ours}.bias", keep),
        ]
    moved = NORMS[config.layer.norms] | {"self_attn.q_norm": "query_norm", "self_attn.k_norm": "key_norm"}
    norms = [(rf"{layer}{re}\.weight", rf"layers.\1.{ours}.scale", keep) for re, ours in moved.items()]
    return (
        (r"(?:model\.)?embed_tokens\.weight", "embed.embedding", keep),
        (r"(?:model\.)?norm\.weight", "norm.scale", keep),
        (r"lm_head\.weight", None if config.tied else "head.kernel", transpose),
        (layer + r"self_attn\.rotary_emb\.inv_freq", None, keep),
        (HEADS, None, keep),
        *norms,
        *linear,
    )


def check_tied(tensors: Mapping[str, Any], where: str) -> None:
    """Refuse a head that is another matrix than the embedding to which config.json ties it.

    The same matrix may be quantized twice, more and less coarsely: what two have in common then tells.

    Raises:
        FormatError: for another matrix.
    """
    head = tensors.get("lm_head.weight")
    words = next((value for name, value in tensors.items() if name.endswith("embed_tokens.weight")), None)
    if head is None or words is None:
        return
    a, b = (dequantize(w) if isinstance(w, QTensor) else jnp.asarray(w, jnp.float32) for w in (head, words))
    # Nothing in common is 1.4; float16, in which a table may keep one of them, is half a step away.
    apart = 0.7 if isinstance(head, QTensor) or isinstance(words, QTensor) else 2.0**-11
    if a.shape != b.shape or not jnp.linalg.norm(a - b) <= apart * jnp.linalg.norm(b):
        raise FormatError(
            f"{where}: lm_head.weight is another matrix than the embedding, to which tie_word_embeddings = true of "
            "config.json ties it; make that false, or convert without lm_head.weight"
        )


HEADS = r"score\.weight"


def read_scorer(pad: int | None, given: Mapping[str, Any]) -> Scorer:
    """Read how a sequence classifier scores: at its last token that is not pad_token_id, as transformers does.

    Args:
        pad: The pad_token_id of a config.json that has none.
        given: The parsed config.json.

    Raises:
        FormatError: for a pad_token_id that is no integer.
    """
    found = given.get("pad_token_id", pad)
    if found is not None and type(found) is not int:
        raise FormatError(f"config.json: pad_token_id is {found!r}; wanted an integer or null")
    return Scorer("lasttoken", (("score", "Identity"),), found)


def make_family(
    model_type: str,
    read: Callable[[Fields, Sizes], DecoderConfig],
    *,
    head_dim: int | None = None,
    pad: int | None = None,
    tokenizer: str | None = None,
) -> Family:
    """Make a family of decoders.

    Args:
        model_type: Its name in config.json.
        read: A function from the fields of config.json, and the sizes that have been read of them, to the settings.
        head_dim: The default of `head_dim`; width / heads if it is None.
        pad: The pad_token_id of a config.json that has none.
        tokenizer: The class of transformers that makes the tokenizer, see `Family`.
    """

    def read_all(given: Mapping[str, Any], where: str) -> DecoderConfig:
        fields = Fields(given, where)
        config = read(fields, read_sizes(fields, head_dim))
        fields.finish()
        return config

    return Family(
        (model_type,), "generate", read_all, Decoder, names, HEADS, scorer=partial(read_scorer, pad),
        headless=lambda config: replace(config, tied=True), tokenizer=tokenizer,
    )  # fmt: skip
