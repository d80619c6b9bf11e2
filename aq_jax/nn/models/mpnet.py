"""MPNet: a BERT whose scores have a bias for each distance, and whose positions follow that of padding.

See arXiv:2004.09297.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aq_jax.config.fields import Fields
from aq_jax.errors import FormatError
from aq_jax.nn.models.bert import NORMS, Bert, BertConfig, make_names
from aq_jax.nn.models.family import Family
from aq_jax.nn.models.roberta import SCORER
from aq_jax.nn.weights import NameRule, keep

PADDING = 1  # whatever the config says


def read(given: Mapping[str, Any], where: str) -> BertConfig:
    """Read a parsed config.json.

    Raises:
        FormatError: for missing fields, fields of another type, and what is not computed or not known.
    """
    fields = Fields(given, where)
    buckets = fields.take("relative_attention_num_buckets", int, 32)
    if buckets != 32:  # transformers numbers distances for 32, and has a table of another length
        raise FormatError(f"{where}: relative_attention_num_buckets is {buckets}; wanted 32")
    config = BertConfig.from_fields(fields, padding_id=PADDING, type_vocab_size=0, relative_buckets=buckets)
    fields.finish()
    return config


LINEAR = {
    ours: rf"attention\.attn\.{theirs}" for ours, theirs in {"query": "q", "key": "k", "value": "v", "out": "o"}.items()
}
LINEAR |= {"up": r"intermediate\.dense", "down": r"output\.dense"}
HEADS = r"classifier\.(?:dense|out_proj)\.(?:weight|bias)|(?:classifier|qa_outputs)\.(?:weight|bias)"
BIAS: NameRule = (r"(?:mpnet\.)?encoder\.relative_attention_bias\.weight", "layers.0.relative.table", keep)
NAMES = (
    *make_names(
        "mpnet", r"encoder\.layer", LINEAR, NORMS | {"attention_norm": r"attention\.LayerNorm"},
        rf"pooler\..*|lm_head\..*|{HEADS}",
    ),
    BIAS,
)  # fmt: skip
MPNET = Family(
    ("mpnet",), "embed", read, Bert, lambda _: NAMES, heads=HEADS, tokenizer="MPNetTokenizer", scorer=lambda _: SCORER
)
