"""The format of Orbax checkpoints: those that `converters.orbax` wrote, and any others that hold arrays."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from aq_jax.converters.formats.locations import require_local
from aq_jax.store.folders import Folder

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source

# The names that some release of Orbax writes into a checkpoint's folder; and our own.
_MARKS = (
    "_CHECKPOINT_METADATA", "orbax.checkpoint", "_METADATA", "manifest.ocdbt", "aq_jax_metadata", "aq_jax_arrays",
)  # fmt: skip


class Orbax:
    """An Orbax checkpoint. It has neither config nor tokenizer, and so no side files."""

    about = "an Orbax checkpoint, the folder of one step"

    def recognizes(self, location: str) -> bool:
        folder = Folder(location)
        return folder.exists() and any(folder.holds(mark) for mark in _MARKS)

    def open(self, location: str, *, packed: bool, allow_pickle: bool) -> AbstractContextManager[Source]:
        from aq_jax.converters.orbax.source import open_checkpoint

        path = require_local(location, Folder(location).local, "checkpoints are", "the folder")
        return open_checkpoint(path, packed=packed)
