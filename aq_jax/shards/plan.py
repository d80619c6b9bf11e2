"""Which tensors go into which file: decided by the model and the config alone, so that every run decides alike."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from blake3 import blake3

from aq_jax._version import __version__
from aq_jax.config import ConversionConfig, ShardsConfig
from aq_jax.converters.extents import Extent
from aq_jax.errors import ConfigError, FormatError
from aq_jax.shards.memory import PARENT_BYTES, PROCESS_BYTES, machine_bytes, shard_bytes
from aq_jax.shards.task import ShardTask
from aq_jax.store.digest import canonical_json
from aq_jax.store.folders import Folder
from aq_jax.store.manifest import shard_name

if TYPE_CHECKING:
    from aq_jax.converters.checkpoint import Checkpoint

MAX_SHARDS = 99_999


def plan_shards(checkpoint: Checkpoint, config: ConversionConfig) -> tuple[ShardTask, ...]:
    """The tasks of a conversion: tensors in the checkpoint's order, as many to a file as `shards.size` holds.

    Raises:
        FormatError: if there are no tensors.
        ConfigError: if there would be too many files.
    """
    size = (config.shards or ShardsConfig()).size_bytes
    parts = list(_parts(checkpoint.extents, size))
    if not parts:
        raise FormatError(f"{checkpoint.folder}: holds no tensors")
    if len(parts) > MAX_SHARDS:
        raise ConfigError(
            f"size = {size} bytes a shard: makes {len(parts)} files, more than {MAX_SHARDS}; ask for more"
        )
    source, output = _absolute(checkpoint.folder), _absolute(Folder(config.output))
    tasks: list[ShardTask] = []
    for index, part in enumerate(parts):
        aliases = {alias: stored for alias, stored in checkpoint.aliases.items() if stored in part}
        memory, _ = shard_bytes(part, config.quantization, config.compression)
        tasks.append(
            ShardTask(
                index, shard_name(index, len(parts)), source, output, part, aliases,
                config.quantization, config.compression, memory,
            )
        )  # fmt: skip
    return tuple(tasks)


def _parts(extents: Mapping[str, Extent], size: int) -> Iterator[dict[str, Extent]]:
    part: dict[str, Extent] = {}
    held = 0
    for name, extent in extents.items():
        if part and held + extent.size > size:
            yield part
            part, held = {}, 0
        part[name] = extent
        held += extent.size
    if part:
        yield part


def _absolute(folder: Folder) -> str:
    """A location that means the same to a process that runs elsewhere."""
    return str(folder.local.absolute()) if folder.local is not None else folder.location


def fingerprint(tasks: tuple[ShardTask, ...]) -> str:
    """What the bytes of all files depend on: shards of one fingerprint belong together, whoever made them, and when."""
    source = Folder(tasks[0].source)
    files = sorted({extent.file for task in tasks for extent in task.extents.values()})
    states = [(file, asdict(state) if (state := source.state(file)) else None) for file in files]
    work = [[task.file, {name: asdict(extent) for name, extent in task.extents.items()}] for task in tasks]
    config = None if tasks[0].config is None else tasks[0].config.to_dict()
    made = [__version__, importlib.metadata.version("jax"), config, tasks[0].compression]
    return blake3(canonical_json([tasks[0].source, states, work, made])).hexdigest()


def workers_within(tasks: tuple[ShardTask, ...], shards: ShardsConfig, cores: int) -> int:
    """How many processes of this machine may work at once.

    Raises:
        ConfigError: if there is not memory enough for one.
    """
    limit = shards.max_memory_bytes or machine_bytes() // 4
    largest = max(tasks, key=lambda task: task.memory)
    each = PROCESS_BYTES + largest.memory
    if each > limit:
        name = shard_bytes(largest.extents, largest.config, largest.compression)[1]
        raise ConfigError(
            f"max_memory = {limit:,} bytes: {name} {list(largest.extents[name].shape)} takes about {each:,}; allow that"
        )
    several = max(1, (limit - PARENT_BYTES) // each)  # of one worker, the parent does the work itself
    return min(shards.workers or cores, several, len(tasks))
