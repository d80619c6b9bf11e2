"""DistilBERT: a BERT of few layers, without token types (arXiv:1910.01108)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aq_jax.config.fields import Fields
from aq_jax.nn.models.bert import Bert, BertConfig, check, make_names
from aq_jax.nn.models.family import Family, Scorer
from aq_jax.nn.models.fields import ACTS, IDLE

SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim", "max_position_embeddings": "max_position_embeddings",
}  # fmt: skip


def read(given: Mapping[str, Any], where: str) -> BertConfig:
    """Read a parsed config.json.

    Raises:
        FormatError: for missing fields, fields of another type, and what is not computed or not known.
    """
    fields = Fields(given, where)
    # Sines and cosines are but the first numbers of a table of positions.
    fields.leave(*IDLE, "sinusoidal_pos_embds", "dropout", "qa_dropout", "seq_classif_dropout", "tie_weights_")
    fields.leave("tie_word_embeddings", "output_past")
    fields.require(pruned_heads={})
    sizes = {ours: fields.take(theirs, int) for ours, theirs in SIZES.items()}
    act = ACTS[fields.choose("activation", ACTS, "gelu")]
    fields.finish()
    return check(BertConfig(**sizes, type_vocab_size=0, hidden_act=act), where)


LINEAR = {
    ours: rf"attention\.{theirs}_lin" for ours, theirs in {"query": "q", "key": "k", "value": "v", "out": "out"}.items()
}
LINEAR |= {"up": r"ffn\.lin1", "down": r"ffn\.lin2"}
NORMS = {"attention_norm": "sa_layer_norm", "output_norm": "output_layer_norm"}
HEADS = r"(?:pre_classifier|classifier|qa_outputs)\.(?:weight|bias)"
NAMES = make_names("distilbert", r"transformer\.layer", LINEAR, NORMS, rf"vocab_\w+\..*|{HEADS}")
KINDS = {"norms": r"(?i)layer_?norm", "attention": "attention", "feed-forward": "ffn", "embeddings": "embed"}
SCORER = Scorer("cls", (("pre_classifier", "ReLU"), ("classifier", "Identity")))
DISTILBERT = Family(
    ("distilbert",), "embed", read, Bert, lambda _: NAMES, heads=HEADS, kinds=KINDS, tokenizer="BertTokenizer",
    scorer=lambda _: SCORER,
)  # fmt: skip
