"""Keep a training's state in a folder of Orbax checkpoints, and refuse what is not read back as it was written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
from blake3 import blake3
from orbax.checkpoint import v1 as ocp

from aq_jax.errors import AqError, ConfigError, IntegrityError, shorten
from aq_jax.store.files import LOCK, check_writable, locked

T = TypeVar("T")
_BUSY = "another process trains here; wait for it, or choose another output"


class Checkpoints:
    """A folder that holds one training's last checkpoint; a context, in which no other process trains there.

    Args:
        folder: The folder, which is made, and removed again if nothing was saved in it.
        fingerprint: What the training depends on; a checkpoint of another is refused.

    >>> import tempfile
    >>> with Checkpoints(Path(tempfile.mkdtemp(), "run"), {"seed": 0}) as store:
    ...     store.save(1, {"w": np.ones(3)}, {"seconds": 2.5})
    ...     store.load({"w": np.zeros(3)})
    (1, {'w': array([1., 1., 1.])}, {'seconds': 2.5})
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder, self._fingerprint = folder.absolute(), dict(fingerprint)
        self._steps = self.folder / "steps"

    def __enter__(self) -> Checkpoints:
        """Take the folder.

        Raises:
            ConfigError: if it is no folder of checkpoints, or another process has it.
        """
        check_training_folder(self.folder)
        self._stack = ExitStack()
        self._stack.enter_context(locked(self.folder, _BUSY))
        return self

    def __exit__(self, *error: object) -> None:
        if not self._steps.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._stack.close()

    def save(self, step: int, state: Any, notes: Mapping[str, Any]) -> None:
        """Write a pytree of arrays, and then remove what was there before.

        Raises:
            AqError: if it cannot be written.
        """
        leaves = jax.device_get(jax.tree.leaves(state))
        metadata = {"of": self._fingerprint, "notes": dict(notes), "digest": _digest(leaves)}
        try:
            with self._open() as checkpointer:
                checkpointer.save(step, leaves, custom_metadata=metadata, overwrite=True)
        except (ValueError, OSError) as error:  # Orbax raises ValueError when the disk is full
            raise AqError(f"{self.folder}: the checkpoint of step {step} cannot be written: {shorten(error)}") from None

    def load(self, like: T) -> tuple[int, T, dict[str, Any]] | None:
        """Read step, state and notes of the last checkpoint; None if there is none.

        Args:
            like: A pytree of the shapes and dtypes that were saved.

        Raises:
            ConfigError: if the checkpoint belongs to another training.
            IntegrityError: if what is read is not what was written.
        """
        if not self._steps.exists():
            return None
        leaves, tree = jax.tree.flatten(like)
        try:
            with self._open() as checkpointer:
                last = checkpointer.latest
                if last is None:
                    return None
                metadata = cast(Any, checkpointer.metadata(last).custom_metadata)
                fingerprint, notes, digest = metadata["of"], metadata["notes"], metadata["digest"]
                read: Any = []
                if fingerprint == self._fingerprint:
                    read = checkpointer.load(last, [np.empty(leaf.shape, leaf.dtype) for leaf in leaves])
        except Exception as error:  # Orbax raises what its parts do
            raise IntegrityError(
                f"{self.folder}: holds no complete checkpoint: {shorten(error)}; remove the folder to start over"
            ) from None
        if fingerprint != self._fingerprint:
            raise ConfigError(
                f"{self.folder}: holds the training {fingerprint}; wanted {self._fingerprint}, to continue it; remove "
                "the folder to start over"
            )
        read = jax.device_get(read)
        if _digest(read) != digest:
            raise IntegrityError(
                f"{self.folder}: the checkpoint of step {last.step} was damaged or changed; wanted digest {digest}, "
                f"found {_digest(read)}; remove the folder to start over"
            )
        return last.step, jax.tree.unflatten(tree, read), notes

    def _open(self) -> ocp.training.Checkpointer:
        keep: Any = ocp.training.preservation_policies.LatestN(1)
        return ocp.training.Checkpointer(str(self._steps), preservation_policy=keep, cleanup_tmp_directories=True)


def check_training_folder(folder: Path) -> None:
    """Refuse a folder in which no training can begin or go on; nothing is made.

    Raises:
        ConfigError: if it is no folder of checkpoints, or another process has it.
        OSError: if it cannot be written.
    """
    check_writable(folder / LOCK)
    if not folder.exists():
        return
    if not (folder / LOCK).is_file():
        raise ConfigError(f"{folder}: already exists and holds no training; move it, or choose another output")
    with locked(folder, _BUSY):
        pass


def _digest(leaves: list[np.ndarray]) -> str:
    state = blake3()
    for leaf in leaves:
        state.update(f"{leaf.dtype.name}{list(leaf.shape)}".encode())
        state.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return state.hexdigest()
