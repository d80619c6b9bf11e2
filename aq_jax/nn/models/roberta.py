"""RoBERTa, XLM-RoBERTa and CamemBERT: BERTs whose positions follow that of padding.

See arXiv:1907.11692, arXiv:1911.02116, arXiv:1911.03894.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aq_jax.config.fields import Fields
from aq_jax.nn.models.bert import LINEAR, NORMS, Bert, BertConfig, make_names
from aq_jax.nn.models.family import Family, Scorer


def read(given: Mapping[str, Any], where: str) -> BertConfig:
    """Read a parsed config.json.

    Raises:
        FormatError: for missing fields, fields of another type, and what is not computed or not known.
    """
    fields = Fields(given, where)
    padding, types = fields.take("pad_token_id", int, 1), fields.take("type_vocab_size", int, 2)
    config = BertConfig.from_fields(fields, padding_id=padding, type_vocab_size=types)
    fields.finish()
    return config


HEADS = r"classifier\.(?:dense|out_proj)\.(?:weight|bias)|(?:classifier|qa_outputs)\.(?:weight|bias)"
NAMES = make_names("roberta", r"encoder\.layer", LINEAR, NORMS, rf"pooler\..*|lm_head\..*|{HEADS}")
SCORER = Scorer("cls", (("classifier.dense", "Tanh"), ("classifier.out_proj", "Identity")))


def make_family(model_type: str, tokenizer: str) -> Family:
    """Make the family of this name, with this class of tokenizers."""
    return Family(
        (model_type,), "embed", read, Bert, lambda _: NAMES, heads=HEADS, tokenizer=tokenizer, scorer=lambda _: SCORER
    )


ROBERTA = make_family("roberta", "RobertaTokenizer")
XLM_ROBERTA = make_family("xlm-roberta", "XLMRobertaTokenizer")
CAMEMBERT = make_family("camembert", "CamembertTokenizer")
