"""A model without its weights: its family, as a folder's config.json names it, and its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from aq_jax.core.dispatch import Activations
from aq_jax.errors import FormatError
from aq_jax.nn.models import FAMILIES, Family, Model, family_of
from aq_jax.nn.weights import Mapped, abstract, fill
from aq_jax.store.folders import Folder
from aq_jax.store.jsonfile import read_json
from aq_jax.store.modules import transformer_path


@dataclass(frozen=True)
class Architecture:
    """A model without its weights.

    Args:
        family: what others ask of such models.
        config: its sizes.
        fields: of config.json.
    """

    family: Family
    config: Any
    fields: dict[str, Any]

    @property
    def names(self) -> tuple[Mapped, ...]:
        """Where each stored tensor goes."""
        return self.family.names(self.config)

    def fill(self, tensors: Mapping[str, Any], activations: Activations, where: str) -> Model:
        """The model with these weights (see `nn.weights.fill`)."""
        make = partial(self.family.module, self.config, activations=activations)
        return fill(abstract(lambda rngs: make(rngs=rngs)), tensors, self.names, activations, where)


def read_architecture(folder: Path) -> Architecture:
    """Read config.json, which in old folders of sentence-transformers lies in one of the modules'.

    Raises:
        FormatError: if there is none, or it is of a model that is not computed here.
    """
    file = folder / transformer_path(Folder(folder)) / "config.json"
    fields = read_json(file.parent, file.name, dict)
    if fields is None:
        raise FormatError(f"{file}: no such file; wanted the model's config, which `convert` copies there")
    family = family_of(fields)
    if family is None:
        raise FormatError(
            f"{file}: model_type is {fields.get('model_type')!r}; wanted {' or '.join(map(repr, FAMILIES))}"
        )
    return Architecture(family, family.read(fields, str(file)), fields)
