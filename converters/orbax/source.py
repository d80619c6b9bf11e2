"""The tensors of a checkpoint as `aq_jax.pipeline` asks for them, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

BATCH_BYTES = 256 << 20
"""How much of a checkpoint is read at once when it becomes a table; a larger tensor is alone."""


class Source:
    """Tensors of a checkpoint in order, read some at a time.

    Args:
        sizes: bytes of each.
        read: some of them, by name.
        shapes: of each, and its dtype, for `write_model`.
        aliases: tied tensors: name -> stored name.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        read: Callable[[list[str]], dict[str, Any]],
        shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self.shapes, self.aliases = shapes or {}, aliases or {}
        self._sizes, self._read = sizes, read
        self._held: dict[str, Any] = {}

    def array(self, name: str) -> Any:
        if name not in self._held:
            names = list(self._sizes)
            batch, room = [], BATCH_BYTES
            for other in names[names.index(name) :]:
                room -= self._sizes[other]
                if batch and room < 0:
                    break
                batch.append(other)
            self._held = {}  # before more is read
            self._held = self._read(batch)
        return self._held.pop(name)
