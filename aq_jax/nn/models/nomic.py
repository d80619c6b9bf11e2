"""NomicBERT: a BERT with rotary positions, gates, and no biases but those of norms (arXiv:2402.01613)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aq_jax.config.fields import Fields
from aq_jax.errors import FormatError
from aq_jax.nn.models.decoder_config import Attention, read_act
from aq_jax.nn.models.family import Family, Scorer
from aq_jax.nn.models.fields import IDLE
from aq_jax.nn.models.rotary import RotaryConfig, RotaryEncoder
from aq_jax.nn.rope import Rope, read_rope
from aq_jax.nn.weights import NameRule, keep, transpose
from aq_jax.ops import Scores

# The names of transformers 5, and those of the model's own code.
NEW = {
    "width": "hidden_size", "inner": "intermediate_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "positions": "max_position_embeddings", "epsilon": "layer_norm_eps",
}  # fmt: skip
OLD = {
    "width": "n_embd", "inner": "n_inner", "layers": "n_layer", "heads": "n_head", "positions": "n_positions",
    "epsilon": "layer_norm_epsilon",
}  # fmt: skip
# What the model's own code has, and no released model uses.
ONLY: Mapping[str, Any] = {
    "activation_function": "swiglu", "causal": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False,
    "parallel_block": False, "parallel_block_tied_norm": False, "prenorm": False, "qkv_proj_bias": False,
    "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True, "use_rms_norm": False, "max_position_embeddings": 0,
}  # fmt: skip
IDLE_HERE = (
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "dense_seq_output", "fused_bias_fc", "fused_dropout_add_ln",
    "last_layer_subset", "pad_vocab_size_multiple", "reorder_and_upcast_attn", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "use_flash_attn",
    "use_xentropy", "tie_word_embeddings",
)  # fmt: skip


def read(given: Mapping[str, Any], where: str) -> RotaryConfig:
    """Read a parsed config.json, of transformers 5 or of the model's own code.

    Raises:
        FormatError: for missing fields, fields of another type, and what is not computed or not known.
    """
    fields = Fields(given, where)
    fields.leave(*IDLE, *IDLE_HERE)
    old = "n_embd" in given
    spelled = OLD if old else NEW
    width, inner, layers, heads, positions = (
        fields.take(spelled[name], int) for name in ("width", "inner", "layers", "heads", "positions")
    )
    if width % heads or width // heads % 2:
        raise FormatError(f"{where}: {heads} heads of {width}; wanted heads that divide the width, of even size")
    if old:
        fields.require(**ONLY)
        # Only texts that are longer are turned otherwise.
        trained = fields.take("max_trained_positions", int, 2048)
        if fields.take("rotary_scaling_factor", float, None) or fields.take("rotary_emb_scale_base", float, None):
            positions = min(positions, trained)
        theta = fields.take("rotary_emb_base", float, 10000.0)
        rope, act = Rope(tuple(theta ** (-2 * i / (width // heads)) for i in range(width // heads // 2))), "silu"
    else:
        fields.require(head_dim=width // heads)
        said = fields.take("rope_parameters", dict, {})
        rope = read_rope(
            said, f"{where}: rope_parameters", fields.take("rope_theta", float, 1000.0), width // heads, positions
        )
        act = read_act(fields, default="silu")
    config = RotaryConfig(
        fields.take("vocab_size", int), width, inner, heads, positions, (Attention(rope, Scores()),) * layers,
        fields.take(spelled["epsilon"], float, 1e-12), act, type_vocab_size=fields.take("type_vocab_size", int, 2),
    )  # fmt: skip
    fields.finish()
    return config


_LAYER = r"(?:nomic_bert\.|bert\.)?encoder\.layers\.(\d+)\."
_LINEAR = {
    r"attn\.Wqkv": "qkv", r"attn\.out_proj": "out", r"mlp\.fc11": "up", r"mlp\.fc12": "gate", r"mlp\.fc2": "down",
}  # fmt: skip
HEADS = r"classifier\.(?:weight|bias)"


def _names() -> tuple[NameRule, ...]:
    """List the rules for names, which transformers 5 writes as they were: those of the model's own code."""
    embed = r"(?:nomic_bert\.|bert\.)?"
    rules: list[NameRule] = [
        (embed + r"embeddings\.word_embeddings\.weight", "word.embedding", keep),
        (embed + r"embeddings\.token_type_embeddings\.weight", "token_type.embedding", keep),
        *((rf"{_LAYER}{theirs}\.weight", rf"layers.\1.{ours}.kernel", transpose) for theirs, ours in _LINEAR.items()),
    ]
    norms = {embed + "emb_ln": "norm", _LAYER + "norm1": r"layers.\1.attention_norm"}
    norms |= {_LAYER + "norm2": r"layers.\1.feed_norm"}
    for theirs, ours in norms.items():
        rules += [(rf"{theirs}\.weight", f"{ours}.scale", keep), (rf"{theirs}\.bias", f"{ours}.bias", keep)]
    return (*rules, (embed + r"(?:pooler|cls)\..*", None, keep), (HEADS, None, keep))


NAMES = _names()
KINDS = {"norms": r"norm\d\.|emb_ln", "attention": r"\.attn\.", "feed-forward": r"\.mlp\.", "embeddings": "embed"}
SCORER = Scorer("cls", (("nomic_bert.pooler.dense", "Tanh"), ("classifier", "Identity")))
NOMIC = Family(
    ("nomic_bert",), "embed", read, RotaryEncoder, lambda _: NAMES, heads=HEADS, kinds=KINDS, tokenizer="BertTokenizer",
    scorer=lambda _: SCORER,
)  # fmt: skip
