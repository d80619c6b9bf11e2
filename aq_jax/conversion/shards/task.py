"""The work of one shard: what it takes, and what comes of it. Both travel to other processes and machines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from aq_jax.config import Compression, QuantizationConfig
from aq_jax.conversion.source import Opener
from aq_jax.conversion.write import write_model
from aq_jax.errors import FormatError
from aq_jax.store import open_table
from aq_jax.store.folders import Folder
from aq_jax.store.manifest import ShardEntry
from aq_jax.store.writer import release_memory

# Called with the name of a tensor that has been written, and its bytes.
Step = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One file of a conversion.

    Args:
        index: of the file among those of the table, from 0.
        file: its name.
        source: opens what the tensors are read from.
        output: the folder that the file goes to: a path or a URL.
        sizes: bytes of each of the tensors before they are quantized, in order.
        aliases: of these.
        config: None writes plain weights.
        compression: of the weights.
        memory: bytes that the work takes at most, beside what a process has before it begins.
        largest: the tensor that takes them, for messages.
    """

    index: int
    file: str
    source: Opener
    output: str
    sizes: Mapping[str, int]
    aliases: Mapping[str, str]
    config: QuantizationConfig | None
    compression: Compression
    memory: int
    largest: str = ""

    @property
    def bytes(self) -> int:
        """Of the tensors before they are quantized."""
        return sum(self.sizes.values())


@dataclass(frozen=True, slots=True)
class ShardDone:
    """What came of a task: its file, as the manifest names it, and what `pipeline.Written` says of a table."""

    index: int
    entry: ShardEntry
    source_bytes: int
    quantized: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """As text that `from_json` takes."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> ShardDone:
        """What `to_json` wrote.

        Raises:
            FormatError: for anything else.
        """
        try:
            found: dict[str, Any] = json.loads(text)
            entry = found.pop("entry")
            notes, tensors = tuple(found.pop("notes")), tuple(entry.pop("tensors"))
            return cls(entry=ShardEntry(tensors=tensors, **entry), notes=notes, **found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"not the note of a finished shard: {error!r}") from None


def convert_shard(task: ShardTask, step: Step | None = None) -> ShardDone:
    """Do a task: the file appears, whole; doing it again gives the same bytes.

    Raises:
        AqError, OSError: as `pipeline.write_model`.
    """
    output = Folder(task.output)
    with ExitStack() as stack:
        source = stack.enter_context(task.source()).only(task.sizes, task.aliases)
        # write_model sees to it itself that a file here appears whole.
        path = output.local / task.file if output.local is not None else stack.enter_context(output.writing(task.file))
        done = write_model(
            source,
            path,
            task.config,
            compression=task.compression,
            progress=None if step is None else lambda name, size, _: step(name, size),
        )
        with open_table(path) as table:
            assert table.metadata is not None  # noqa: S101
            entry = ShardEntry(task.file, done.bytes, table.metadata.digest, table.names)
    release_memory()
    return ShardDone(
        task.index, entry, done.source_bytes, done.quantized, done.kept, tuple(done.notes), dict(done.seconds)
    )
