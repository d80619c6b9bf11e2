"""An Orbax checkpoint: one that `converters.orbax` wrote, or any other that holds arrays."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from aq_jax.errors import FormatError
from aq_jax.store.folders import Folder

if TYPE_CHECKING:
    from aq_jax.conversion.source import Source

# What Orbax writes into the folder of a checkpoint, in one release or another; and what is ours.
_MARKS = (
    "_CHECKPOINT_METADATA", "orbax.checkpoint", "_METADATA", "manifest.ocdbt", "aq_jax_metadata", "aq_jax_arrays",
)  # fmt: skip


class Orbax:
    """Nothing goes beside it: a checkpoint has neither config nor tokenizer."""

    about = "an Orbax checkpoint, the folder of one step"

    def recognizes(self, location: str) -> bool:
        folder = Folder(location)
        return folder.exists() and any(folder.holds(mark) for mark in _MARKS)

    def open(self, location: str, *, packed: bool, allow_pickle: bool) -> AbstractContextManager[Source]:
        from aq_jax.converters.orbax.sources import open_checkpoint

        if (path := Folder(location).local) is None:
            raise FormatError(f"{location}: is not on this machine, where checkpoints are read; fetch the folder")
        return open_checkpoint(path, packed=packed)
