"""ModernBERT: norms before, gates, and two of three layers that see the tokens around only (arXiv:2412.13663)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from aq_jax.config.fields import Fields
from aq_jax.errors import FormatError
from aq_jax.nn.models.decoder_config import FULL, SLIDING, Attention, read_act, read_kinds
from aq_jax.nn.models.family import Family, Scorer
from aq_jax.nn.models.fields import IDLE
from aq_jax.nn.models.rotary import RotaryConfig, RotaryEncoder
from aq_jax.nn.pooling import EPSILON, Mode
from aq_jax.nn.rope import read_rope
from aq_jax.nn.weights import NameRule, keep, transpose
from aq_jax.ops import Scores

# Of training, of heads, and of how transformers computes.
IDLE_HERE = (
    "initializer_cutoff_factor", "embedding_dropout", "mlp_dropout", "decoder_bias", "classifier_pooling",
    "classifier_bias", "classifier_activation", "deterministic_flash_attn", "sparse_prediction",
    "sparse_pred_ignore_index", "reference_compile", "repad_logits_with_grad", "tie_word_embeddings", "layer_norm_eps",
)  # fmt: skip
TORCH_ACTS = {"gelu": "GELU", "relu": "ReLU", "silu": "SiLU", "tanh": "Tanh"}
THETAS = {FULL: ("global_rope_theta", 160000.0), SLIDING: ("local_rope_theta", 10000.0)}


def read(given: Mapping[str, Any], where: str) -> RotaryConfig:
    """Read a parsed config.json.

    Raises:
        FormatError: for missing fields, fields of another type, and what is not computed or not known.
    """
    fields = Fields(given, where)
    fields.leave(*IDLE, *IDLE_HERE)
    fields.require(position_embedding_type="absolute", is_encoder_decoder=False)  # so its first files say, of old
    width, heads = fields.take("hidden_size", int), fields.take("num_attention_heads", int)
    layers, positions = fields.take("num_hidden_layers", int), fields.take("max_position_embeddings", int)
    if width % heads or width // heads % 2:
        raise FormatError(f"{where}: {heads} heads of {width}; wanted heads that divide the width, of even size")
    every = fields.take("global_attn_every_n_layers", int, 3)
    kinds = read_kinds(fields, [SLIDING if i % every else FULL for i in range(layers)])
    reaches = {FULL: None, SLIDING: fields.take("local_attention", int, 128) // 2}
    said = Fields(fields.take("rope_parameters", dict, {}), f"{where}: rope_parameters")
    ropes = {}
    for kind, (name, theta) in THETAS.items():
        theta = fields.take(name, float, theta)
        ropes[kind] = read_rope(said.take(kind, dict, {}), f"{said.where}.{kind}", theta, width // heads, positions)
    said.finish()
    biased = {"qkv", "out"} if fields.take("attention_bias", bool, False) else set()
    biased |= {"gate_up", "down"} if fields.take("mlp_bias", bool, False) else set()
    config = RotaryConfig(
        fields.take("vocab_size", int), width, fields.take("intermediate_size", int), heads, positions,
        tuple(Attention(ropes[kind], Scores(reach=reaches[kind])) for kind in kinds),
        fields.take("norm_eps", float, 1e-5), read_act(fields, "hidden_activation", "gelu"), biased=frozenset(biased),
        norm_bias=fields.take("norm_bias", bool, False), before=True, fused=True,
    )  # fmt: skip
    fields.finish()
    return config


_LAYER = r"(?:model\.)?layers\.(\d+)\."
_LINEAR = {r"attn\.Wqkv": "qkv", r"attn\.Wo": "out", r"mlp\.Wi": "gate_up", r"mlp\.Wo": "down"}
HEADS = r"(?:head\.(?:dense|norm)|classifier)\.(?:weight|bias)"


def names(config: RotaryConfig) -> tuple[NameRule, ...]:
    """List the rules for names: Hugging Face names -> paths in RotaryEncoder."""
    rules: list[NameRule] = [(r"(?:model\.)?embeddings\.tok_embeddings\.weight", "word.embedding", keep)]
    for theirs, ours in _LINEAR.items():
        rules.append((rf"{_LAYER}{theirs}\.weight", rf"layers.\1.{ours}.kernel", transpose))
        rules.append((rf"{_LAYER}{theirs}\.bias", rf"layers.\1.{ours}.bias", keep))
    norms = {r"(?:model\.)?embeddings\.norm": "norm", r"(?:model\.)?final_norm": "final_norm"}
    norms |= {_LAYER + "attn_norm": r"layers.\1.attention_norm", _LAYER + "mlp_norm": r"layers.\1.feed_norm"}
    for theirs, ours in norms.items():
        rules.append((rf"{theirs}\.weight", f"{ours}.scale", keep))
        rules.append((rf"{theirs}\.bias", f"{ours}.bias", keep))
    return (*rules, (r"decoder\.(?:weight|bias)", None, keep), (HEADS, None, keep))


KINDS = {"norms": r"norm\.", "attention": r"\.attn\.", "feed-forward": r"\.mlp\.", "embeddings": "embed"}


def read_scorer(given: Mapping[str, Any]) -> Scorer:
    """Read how a sequence classifier scores.

    Raises:
        FormatError: for poolings, activations and norms that are not computed.
    """
    fields = Fields(given, "config.json")
    pooling = fields.choose("classifier_pooling", ("cls", "mean"), "cls")
    act = TORCH_ACTS[fields.choose("classifier_activation", TORCH_ACTS, "gelu")]
    fields.require(norm_eps=EPSILON)
    return Scorer(cast("Mode", pooling), (("head.dense", act), ("head.norm", "LayerNorm"), ("classifier", "Identity")))


MODERNBERT = Family(("modernbert",), "embed", read, RotaryEncoder, names, heads=HEADS, kinds=KINDS, scorer=read_scorer)
