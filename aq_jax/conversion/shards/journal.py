"""Keep a journal of finished shards in the folder that a conversion writes, so that another run can resume it."""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import ExitStack
from typing import Self

from aq_jax.conversion.shards.task import ShardResult, ShardTask
from aq_jax.errors import FormatError
from aq_jax.store.files import locked
from aq_jax.store.folders import Folder
from aq_jax.store.jsonfile import read_json
from aq_jax.store.manifest import MANIFEST

JOURNAL = ".converting"
_BUSY = "another process converts into this folder; wait for it, or name another output"
_BEGUN = f"{JOURNAL}/plan.json"
_SHARDS = "weights-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].parquet"


def refuse_taken(folder: Folder, beside: Collection[str]) -> None:
    """Refuse to convert into a folder that holds anything but an unfinished conversion.

    Args:
        folder: The folder to write.
        beside: The names of other files that may be there.

    Raises:
        FormatError: naming what is there: a finished table, or files of another origin.
    """
    if folder.state(_BEGUN) is not None:
        return
    if folder.state(MANIFEST) is not None:
        folder.remove_folder(JOURNAL)  # a killed run left it half removed
    tops = {name.partition("/")[0] for name in beside} | {JOURNAL}
    if others := [name for name in folder.names() if name not in tops]:
        raise FormatError(f"{folder.join(others[0])}: already exists; wanted an empty folder, or the name of a new one")


class Journal:
    """The journal of one conversion: a context, in which no other process of this machine converts into the folder.

    Args:
        folder: The folder to write.
        fingerprint: The conversion's fingerprint; the work of a conversion with another one is thrown away.
    """

    def __init__(self, folder: Folder, fingerprint: str) -> None:
        self.folder, self._fingerprint = folder, fingerprint
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Take the folder.

        Raises:
            ConfigError: if another process converts into it.
        """
        begun = self.folder.state(_BEGUN) is not None
        if self.folder.local is not None:
            self._stack.enter_context(locked(self.folder.local / JOURNAL, _BUSY))
        try:
            if not begun or self._read_fingerprint() != self._fingerprint:
                self._start_over()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def finished(self, tasks: tuple[ShardTask, ...]) -> dict[int, ShardResult]:
        """Read the results of earlier runs, by index: recorded, and the file there in the recorded size."""
        found: dict[int, ShardResult] = {}
        for task in tasks:
            name = self._record_name(task.index)
            if self.folder.state(name) is None:
                continue
            try:
                done = ShardResult.from_json(self.folder.read(name))
            except FormatError:
                continue  # the shard is done again
            state = self.folder.state(task.file)
            if done.entry.file == task.file and state is not None and state.size == done.entry.bytes:
                found[task.index] = done
        return found

    def record(self, done: ShardResult) -> None:
        """Record that a shard is finished."""
        self.folder.write(self._record_name(done.index), done.to_json())

    def close(self, manifest: bytes) -> None:
        """Publish the finished shards by their manifest, and remove the journal."""
        self.folder.write(MANIFEST, manifest)
        for name in self.folder.glob(f"{JOURNAL}/[0-9]*.json"):
            self.folder.remove(name)
        self.folder.remove_folder(JOURNAL)

    def _record_name(self, index: int) -> str:
        return f"{JOURNAL}/{index + 1:05}.json"

    def _read_fingerprint(self) -> object:
        try:
            return (read_json(self.folder, _BEGUN, dict) or {}).get("fingerprint")
        except FormatError:
            return None

    def _start_over(self) -> None:
        # The old fingerprint goes last: until then a run that is stopped here is recognized.
        patterns = (MANIFEST, _SHARDS, f".{_SHARDS}.*tmp", f"{JOURNAL}/[0-9]*.json")
        for name in [name for pattern in patterns for name in self.folder.glob(pattern)]:
            self.folder.remove(name)
        self.folder.write(_BEGUN, json.dumps({"fingerprint": self._fingerprint}).encode())
