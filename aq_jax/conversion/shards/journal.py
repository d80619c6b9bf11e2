"""What of a conversion is finished, kept in the folder that it writes, so that another run goes on from there."""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import ExitStack
from typing import Self

from aq_jax.conversion.shards.task import ShardDone, ShardTask
from aq_jax.errors import FormatError
from aq_jax.store.files import locked
from aq_jax.store.folders import Folder
from aq_jax.store.jsonfile import read_json
from aq_jax.store.manifest import MANIFEST

JOURNAL = ".converting"
_BUSY = "another process converts into this folder; wait for it, or name another output"
_PLAN = f"{JOURNAL}/plan.json"
_SHARDS = "weights-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].parquet"


def refuse_taken(folder: Folder, beside: Collection[str]) -> None:
    """Refuse to convert into a folder that holds anything but what a conversion has begun there.

    Args:
        folder: that is to be written.
        beside: what else may be there.

    Raises:
        FormatError: naming what is there: a table that is finished, or what nobody has converted.
    """
    if folder.state(_PLAN) is not None:
        return
    if folder.state(MANIFEST) is not None:
        folder.remove_folder(JOURNAL)  # of a run that was killed while it removed it
    tops = {name.partition("/")[0] for name in beside} | {JOURNAL}
    if others := [name for name in folder.names() if name not in tops]:
        raise FormatError(
            f"{folder.at(others[0])}: is there already; wanted an empty folder, or the name of one that is to be made"
        )


class Journal:
    """The journal of one conversion: a context, in which no other process of this machine converts into the folder.

    Args:
        folder: that is written.
        fingerprint: of the conversion; what another one has begun there is thrown away.
    """

    def __init__(self, folder: Folder, fingerprint: str) -> None:
        self.folder, self._fingerprint = folder, fingerprint
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Take the folder.

        Raises:
            ConfigError: if another process converts into it.
        """
        begun = self.folder.state(_PLAN) is not None
        if self.folder.local is not None:
            self._stack.enter_context(locked(self.folder.local / JOURNAL, _BUSY))
        try:
            if not begun or self._read_plan() != self._fingerprint:
                self._begin_anew()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def finished(self, tasks: tuple[ShardTask, ...]) -> dict[int, ShardDone]:
        """What was done before, by index: noted, and there in the size that was noted."""
        found: dict[int, ShardDone] = {}
        for task in tasks:
            name = self._note(task.index)
            if self.folder.state(name) is None:
                continue
            try:
                done = ShardDone.from_json(self.folder.read(name))
            except FormatError:
                continue  # it is done again
            state = self.folder.state(task.file)
            if done.entry.file == task.file and state is not None and state.size == done.entry.bytes:
                found[task.index] = done
        return found

    def note(self, done: ShardDone) -> None:
        """A shard is there."""
        self.folder.write(self._note(done.index), done.to_json())

    def close(self, manifest: bytes) -> None:
        """All shards are there: the manifest makes a table of them, and the journal goes."""
        self.folder.write(MANIFEST, manifest)
        for name in self.folder.glob(f"{JOURNAL}/[0-9]*.json"):
            self.folder.remove(name)
        self.folder.remove_folder(JOURNAL)

    def _note(self, index: int) -> str:
        return f"{JOURNAL}/{index + 1:05}.json"

    def _read_plan(self) -> object:
        try:
            return (read_json(self.folder, _PLAN, dict) or {}).get("fingerprint")
        except FormatError:
            return None

    def _begin_anew(self) -> None:
        # The old plan goes last: until then a run that is stopped here is known for what it is.
        patterns = (MANIFEST, _SHARDS, f".{_SHARDS}.*tmp", f"{JOURNAL}/[0-9]*.json")
        for name in [name for pattern in patterns for name in self.folder.glob(pattern)]:
            self.folder.remove(name)
        self.folder.write(_PLAN, json.dumps({"fingerprint": self._fingerprint}).encode())
