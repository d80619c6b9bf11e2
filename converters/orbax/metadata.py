"""The metadata of a checkpoint: signed by a digest when it is made, checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aq_jax._version import __version__
from aq_jax.converters.orbax.disk import METADATA, read_json, short
from aq_jax.converters.orbax.entries import TensorEntry, nonsense, tensor_entry
from aq_jax.converters.orbax.trees import leaf_names
from aq_jax.errors import FormatError, IntegrityError
from aq_jax.store.digest import table_digest

FORMAT, VERSION = "aq_jax.orbax", "1.0"


@dataclass(frozen=True, slots=True)
class Known:
    """The metadata of a checkpoint, checked.

    Args:
        tree: its shape; leaves are names of tensors.
        leaves: the name of each leaf -> that of its tensor, which tied leaves share.
        tensors: by name, in order.
        config: of the table that they came from.
    """

    tree: Any
    leaves: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]
    config: Mapping[str, Any]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor."""
        return {name: tensor.nbytes for name, tensor in self.tensors.items()}

    @property
    def aliases(self) -> dict[str, str]:
        return {name: stored for name, stored in self.leaves.items() if name != stored}


def new_metadata(tree: Any, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a checkpoint that is about to be written.

    Args:
        tree: its shape as JSON.
        tensors: the entry of each tensor, by name.
        config: of the table that they come from.
    """
    known: dict[str, Any] = {
        "format": FORMAT, "version": VERSION, "writer": f"aq_jax {__version__}", "config": dict(config),
        "tree": tree, "tensors": tensors,
    }  # fmt: skip
    return known | {"digest": table_digest(known).hex()}


def read_metadata(folder: Path) -> Known:
    """What the metadata says, once its digest is found to be right.

    Raises:
        FormatError: if there is none of this format and version, or it says what no checkpoint can hold.
        IntegrityError: if it cannot be read, or was changed.
    """
    raw = read_json(folder)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or not isinstance(version := raw.get("version"), str):
        found = raw.get("format") if isinstance(raw, dict) else raw
        raise FormatError(f"{folder}: its {METADATA} is of format {str(found)[:60]!r}; wanted {FORMAT!r} and a version")
    if version.split(".")[0] != VERSION.split(".")[0]:
        raise FormatError(
            f"{folder}: format version {version[:20]!r} is unknown; this release reads {VERSION}: use a newer aq_jax"
        )
    try:
        digest = table_digest(raw).hex()
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{folder}: its {METADATA} is damaged: {short(error)}; fetch it again") from None
    if digest != raw.get("digest"):
        raise IntegrityError(
            f"{folder}: its {METADATA} has digest {digest}, written was {str(raw.get('digest'))[:64]}: it was damaged "
            "or changed; fetch or write the checkpoint again"
        )
    for key in ("tensors", "config"):
        if not isinstance(raw.get(key), dict):
            raise nonsense(folder, METADATA, key, raw.get(key))
    tensors = {name: tensor_entry(folder, name, entry) for name, entry in raw["tensors"].items()}
    pairs = list(leaf_names(raw.get("tree"), folder))
    if len(dict(pairs)) != len(pairs) or {stored for _, stored in pairs} != set(tensors):
        raise nonsense(folder, METADATA, "tree", pairs)
    return Known(raw.get("tree"), dict(pairs), tensors, raw["config"])
