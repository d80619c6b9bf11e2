"""Families of models by the model_type of config.json; nothing else has a list of them.

    family           the protocols of a family and of its models
    bert             encoders of sentences; roberta, distilbert and mpnet are settings of it
    rotary           encoders with rotary positions, whose settings modernbert and nomic read
    static           tables whose rows' mean is an embedding
    decoder          language models: one module, whose settings are in `decoder_config`, and read by a file a family:
    llama mistral qwen gemma phi3 smollm3 olmo granite

A new one is a file like those, with a `Family`, and a line in FAMILIES: it is then loaded, calibrated, trained,
validated and spread over devices as the others are. Layers are made of `nnx.Linear`s, which loading replaces by
quantized ones, of norms, and of blocks from `nn.blocks` and `ops`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aq_jax.nn.models.bert import BERT
from aq_jax.nn.models.distilbert import DISTILBERT
from aq_jax.nn.models.family import Cache, Family, LanguageModel, Model, Scorer, Task
from aq_jax.nn.models.gemma import GEMMA, GEMMA2, GEMMA3
from aq_jax.nn.models.granite import GRANITE
from aq_jax.nn.models.llama import LLAMA
from aq_jax.nn.models.mistral import MISTRAL
from aq_jax.nn.models.modernbert import MODERNBERT
from aq_jax.nn.models.mpnet import MPNET
from aq_jax.nn.models.nomic import NOMIC
from aq_jax.nn.models.olmo import OLMO2, OLMO3
from aq_jax.nn.models.phi3 import PHI3
from aq_jax.nn.models.qwen import QWEN2, QWEN3
from aq_jax.nn.models.roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA
from aq_jax.nn.models.smollm3 import SMOLLM3
from aq_jax.nn.models.static import STATIC

_ENCODERS = (BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, DISTILBERT, MPNET, MODERNBERT, NOMIC, STATIC)
_DECODERS = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3, SMOLLM3, OLMO2, OLMO3, GRANITE)
FAMILIES: dict[str, Family] = {kind: family for family in (*_ENCODERS, *_DECODERS) for kind in family.model_types}

__all__ = ["FAMILIES", "Cache", "Family", "LanguageModel", "Model", "Scorer", "Task", "family_of", "model_types"]


def family_of(fields: Mapping[str, Any]) -> Family | None:
    """Find the family of a parsed config.json; None if it is unknown.

    >>> [family_of({"model_type": kind}) is None for kind in ("bert", "t5", ["bert"])]
    [False, True, True]
    """
    kind = fields.get("model_type")
    return FAMILIES.get(kind) if isinstance(kind, str) else None


def model_types(task: Task) -> str:
    """List the model_types of a task, for errors.

    >>> model_types("embed").split(", ")[:2]
    ['bert', 'roberta']
    """
    return ", ".join(kind for kind, family in FAMILIES.items() if family.task == task)
