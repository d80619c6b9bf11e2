"""Families of models, by what config.json calls them; nobody else has a list of them.

    bert    encoders of sentences
    llama   language models
    family  what a family says of itself, and what its models have

A new one is a file like those, with a `Family` that says what others ask, and a line in FAMILIES: it is then loaded,
calibrated, trained, validated and spread over devices as the others are. Layers are made of `nnx.Linear`s and norms,
which loading replaces by quantized ones, and of what stands in `nn.blocks` and `ops`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aq_jax.nn.models.bert import BERT
from aq_jax.nn.models.family import Cache, Family, LanguageModel, Model, Task
from aq_jax.nn.models.llama import LLAMA

FAMILIES: dict[str, Family] = {kind: family for family in (BERT, LLAMA) for kind in family.model_types}

__all__ = ["FAMILIES", "Cache", "Family", "LanguageModel", "Model", "Task", "family_of", "model_types"]


def family_of(fields: Mapping[str, Any]) -> Family | None:
    """The family of a parsed config.json; None if it is none of these.

    >>> [family_of({"model_type": kind}) is None for kind in ("bert", "t5", ["bert"])]
    [False, True, True]
    """
    kind = fields.get("model_type")
    return FAMILIES.get(kind) if isinstance(kind, str) else None


def model_types(task: Task) -> str:
    """The model_types of a task, for errors that say what is wanted.

    >>> model_types("embed")
    'bert'
    """
    return ", ".join(kind for kind, family in FAMILIES.items() if family.task == task)
