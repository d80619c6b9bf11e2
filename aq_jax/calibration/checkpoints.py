"""Where a training stands, in a folder of Orbax checkpoints: what is read back is what was written, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from blake3 import blake3
from orbax.checkpoint import v1 as ocp

from aq_jax.errors import ConfigError, IntegrityError

T = TypeVar("T")


class Checkpoints:
    """The last checkpoint of one training.

    Args:
        folder: is made when something is saved.
        of: what the training depends on; a folder of another is refused.

    >>> import tempfile
    >>> store = Checkpoints(Path(tempfile.mkdtemp(), "run"), {"seed": 0})
    >>> store.save(1, {"w": np.ones(3)}, {"seconds": 2.5})
    >>> store.load({"w": np.zeros(3)})
    (1, {'w': array([1., 1., 1.])}, {'seconds': 2.5})
    """

    def __init__(self, folder: Path, of: Mapping[str, Any]) -> None:
        self.folder, self._of = folder.absolute(), dict(of)

    def save(self, step: int, state: Any, notes: Mapping[str, Any]) -> None:
        """Write a pytree of arrays, and then remove what was there before."""
        leaves = jax.device_get(jax.tree.leaves(state))
        known = {"of": self._of, "notes": dict(notes), "digest": _digest(leaves)}
        with self._open() as checkpointer:
            checkpointer.save(step, leaves, custom_metadata=known, overwrite=True)

    def load(self, like: T) -> tuple[int, T, dict[str, Any]] | None:
        """Step, state and notes of the last checkpoint; None if there is none.

        Args:
            like: a pytree of the shapes and types that were saved.

        Raises:
            ConfigError: if the folder is of another training.
            IntegrityError: if what is read is not what was written.
        """
        if not self.folder.exists():
            return None
        leaves, tree = jax.tree.flatten(like)
        with self._open() as checkpointer:
            last = checkpointer.latest
            if last is None:
                return None
            known = checkpointer.metadata(last).custom_metadata
            if not isinstance(known, dict) or known.get("of") != self._of:
                found = known.get("of") if isinstance(known, dict) else known
                raise ConfigError(
                    f"{self.folder}: found a training of {found}; wanted {self._of}, which it could go on with; remove "
                    "the folder to begin anew"
                )
            try:
                read = checkpointer.load(last, [np.empty(leaf.shape, leaf.dtype) for leaf in leaves])
            except (ValueError, OSError, KeyError) as error:
                raise IntegrityError(f"{self._where(last.step)}: {error}; remove the folder to begin anew") from None
        read = jax.device_get(read)
        if _digest(read) != known.get("digest"):
            raise IntegrityError(
                f"{self._where(last.step)}: is not what was written; wanted digest {known.get('digest')}, found "
                f"{_digest(read)}; remove the folder to begin anew"
            )
        return last.step, jax.tree.unflatten(tree, read), known["notes"]

    def _where(self, step: int) -> Path:
        return self.folder / str(step)

    def _open(self) -> ocp.training.Checkpointer:
        keep: Any = ocp.training.preservation_policies.LatestN(1)
        return ocp.training.Checkpointer(str(self.folder), preservation_policy=keep, cleanup_tmp_directories=True)


def _digest(leaves: list[np.ndarray]) -> str:
    state = blake3()
    for leaf in leaves:
        state.update(f"{leaf.dtype.name}{list(leaf.shape)}".encode())
        state.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return state.hexdigest()
