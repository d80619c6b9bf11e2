"""Convert one shard: its task and its result, which travel to other processes and machines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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

# Gets the name of a tensor that was written, and its bytes.
OnTensor = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class ShardTask:
    """The task to write one file of a conversion.

    Args:
        index: The file's index in the table, from 0.
        file: The file's name.
        source: A function that opens the source of the tensors.
        output: The folder that the file goes to: a path or a URL.
        sizes: The bytes of each tensor before it is quantized, in order.
        aliases: The tied names of these tensors.
        config: The quantization; None writes plain weights.
        compression: The compression of the weights.
        memory: The peak memory of the work in bytes, beside what an idle process takes.
        largest: The tensor that needs it, for messages.
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
        """Count the bytes of the tensors before they are quantized."""
        return sum(self.sizes.values())


@dataclass(frozen=True, slots=True)
class ShardResult:
    """The result of a task: its file, as the manifest lists it, and the fields of `write.ConversionResult`."""

    index: int
    entry: ShardEntry
    source_bytes: int
    quantized: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Return the text that `from_json` reads."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> ShardResult:
        """Read what `to_json` wrote.

        Raises:
            FormatError: for any other text.
        """
        try:
            found: dict[str, Any] = json.loads(text)
            entry = found.pop("entry")
            tensors = tuple(entry.pop("tensors"))
            return cls(entry=ShardEntry(tensors=tensors, **entry), **found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"is not the record of a finished shard: {error!r}") from None


def convert_shard(task: ShardTask, on_tensor: OnTensor | None = None) -> ShardResult:
    """Do a task: write its file whole; the same task always gives the same bytes.

    Raises:
        AqError, OSError: as `write.write_model`.
    """
    with task.source() as source, Folder(task.output).place(task.file) as path:
        done = write_model(
            source.subset(task.sizes, task.aliases),
            path,
            task.config,
            compression=task.compression,
            progress=None if on_tensor is None else lambda name, size, _: on_tensor(name, size),
        )
        with open_table(path) as table:
            assert table.metadata is not None  # noqa: S101
            entry = ShardEntry(task.file, done.bytes, table.metadata.digest, table.names)
    release_memory()
    return ShardResult(task.index, entry, done.source_bytes, done.quantized, done.kept, dict(done.seconds))
