"""Name what a config says that holds for no tensor of a model: misspelled, shadowed, or without effect."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from aq_jax.config import QuantizationConfig
from aq_jax.errors import some_of
from aq_jax.quantizers.treatment import Treatment

_GRID = ("per_channel", "group_size", "symmetric", "solver", "rotate")
"""The fields that say how a grid is chosen."""


def unused_notes(
    config: QuantizationConfig, treatments: Mapping[str, Treatment], aliases: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """Name what a config says that holds for no tensor of a model.

    Args:
        config: The model's config.
        treatments: What becomes of each tensor, by its name.
        aliases: The names of tensors that are tied to others, and have no numerics of their own.
    """

    def none_of(matches: Callable[[str], object]) -> str:
        if any(map(matches, treatments)):
            return ""
        tied = next((alias for alias in aliases if matches(alias)), None)
        return "no tensor" if tied is None else f"no tensor but {tied}, which is tied to {aliases[tied]}: name that"

    notes = []
    owners = {name: config.override_of(name) for name in treatments}
    for override in config.overrides:
        what = f"override {override.pattern!r}"
        own = [treatments[name] for name, owner in owners.items() if owner is override]
        if why := none_of(re.compile(override.pattern).search):
            notes.append(f"{what} matches {why}")
        elif not own:
            notes.append(f"{what} holds for no tensor: overrides before it match all that it does")
        elif override.quant_type and own[0].policy.coded and all(each.spec is None for each in own):
            notes.append(f"{what} quantizes nothing: what it matches has one axis, or holds no floats")
        elif not own[0].policy.coded and (idle := [key for key in _GRID if key in override.given]):
            notes.append(f"{what}: {', '.join(idle)}: without effect on {own[0].policy.quant_type}")
    for part in config.mixed_precision_layers:
        if why := none_of(lambda name, part=part: part in name):
            notes.append(f"mixed_precision_layers: {part!r} is a part of the name of {why}")
    rotated = {name: found.spec for name, found in treatments.items() if found.spec and found.policy.rotate}
    if odd := [name for name, spec in rotated.items() if not spec.rotation]:
        notes.append(f"not rotated, as their last axis is odd: {some_of(odd, 20)}")
    if not config.coded and not any(found.policy.coded for found in treatments.values()):
        plain = QuantizationConfig(config.quant_type)
        if idle := [key for key in _GRID if getattr(config, key) != getattr(plain, key)]:
            notes.append(f"{', '.join(idle)}: without effect on {config.quant_type}")
    return notes
