"""Read a model's architecture from config.json: its family and its sizes, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from aq_jax.core.dispatch import Activations
from aq_jax.errors import FormatError
from aq_jax.nn.models import FAMILIES, Family, Model, family_of
from aq_jax.nn.static import find_static
from aq_jax.nn.weights import NameRule, abstract_model, fill
from aq_jax.store.folders import Folder
from aq_jax.store.jsonfile import read_json
from aq_jax.store.modules import read_modules, transformer_path

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Architecture:
    """A model without its weights.

    Args:
        family: The model's family.
        config: The model's sizes.
        fields: The fields of config.json.
    """

    family: Family
    config: Any
    fields: dict[str, Any]

    @property
    def names(self) -> tuple[NameRule, ...]:
        """List the mappings from stored tensors to parameters."""
        return self.family.names(self.config)

    def fill(self, tensors: Mapping[str, Any], activations: Activations, where: str) -> Model:
        """Build the model with these weights (see `nn.weights.fill`)."""
        make = partial(self.family.module, self.config, activations=activations)
        return fill(abstract_model(lambda rngs: make(rngs=rngs)), tensors, self.names, activations, where)


def is_classifier(fields: Mapping[str, Any]) -> bool:
    """Tell whether config.json names a sequence classifier."""
    named = fields.get("architectures")
    return isinstance(named, list) and any(str(name).endswith("ForSequenceClassification") for name in named)


def read_architecture(folder: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Architecture:
    """Read config.json, which old folders of sentence-transformers keep in a module's folder.

    A language model whose folder has modules.json, or a classifier's head, is an encoder, without a head. Static
    embeddings have no config.json, or one without sizes.

    Args:
        folder: The folder that holds config.json.
        shapes: The shapes of the stored tensors by name, for families whose config.json lacks sizes; None if sizes do
            not matter.

    Raises:
        FormatError: if there is none, or the model is of an unknown family.
    """
    file = folder / transformer_path(Folder(folder)) / "config.json"
    static = find_static(folder)
    fields = read_json(file.parent, file.name, dict) if static is None else static.config
    if fields is None:
        raise FormatError(f"{file}: no such file; wanted the model's config, which `convert` copies there")
    family = family_of(fields)
    if family is None:
        mixture = any(fields.get(name) for name in EXPERTS) and ", a mixture of experts, which is not computed"
        known = " or ".join(map(repr, FAMILIES))
        raise FormatError(f"{file}: model_type is {fields.get('model_type')!r}{mixture or ''}; wanted {known}")
    if family.sizes is not None and shapes is not None:
        fields |= family.sizes(shapes, str(folder))
    config = family.read(fields, str(file))
    without_head = read_modules(Folder(folder)) is not None or is_classifier(fields)
    if family.task == "generate" and family.headless is not None and without_head:
        family, config = replace(family, task="embed"), family.headless(config)
    return Architecture(family, config, fields)
