"""Partition a model's tensors into files, by the model and the config alone, so that every run decides alike."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping

from blake3 import blake3

from aq_jax._version import __version__
from aq_jax.config import ConversionConfig, ShardsConfig
from aq_jax.conversion.shards.memory import PARENT_BYTES, PROCESS_BYTES, machine_memory, peak_memory
from aq_jax.conversion.shards.task import ShardTask
from aq_jax.conversion.source import Source
from aq_jax.errors import ConfigError, FormatError
from aq_jax.quantizers.lookup import resolve_solvers
from aq_jax.store.digest import canonical_json
from aq_jax.store.folders import Folder
from aq_jax.store.manifest import shard_name

MAX_SHARDS = 99_999


def partition(source: Source, config: ConversionConfig) -> tuple[ShardTask, ...]:
    """List the tasks of a conversion: tensors in the source's order, as many to a file as `shards.size` holds.

    Raises:
        FormatError: if there are no tensors.
        ConfigError: if there would be too many files.
    """
    size = (config.shards or ShardsConfig()).size_bytes
    parts = list(_partition_sizes({name: source.nbytes(name) for name in source.shapes}, size))
    if not parts:
        raise FormatError(f"{source.folder}: holds no tensors; wanted one or more")
    if len(parts) > MAX_SHARDS:
        raise ConfigError(
            f"shards.size = {size} bytes: gives {len(parts)} files, more than {MAX_SHARDS}; ask for larger files"
        )
    output = Folder(config.output).absolute
    policy = None if config.quantization is None else resolve_solvers(config.quantization)
    tasks: list[ShardTask] = []
    for index, part in enumerate(parts):
        aliases = {alias: stored for alias, stored in source.aliases.items() if stored in part}
        memory, largest = peak_memory(source, part, policy, config.compression)
        tasks.append(
            ShardTask(
                index, shard_name(index, len(parts)), source.opener(part), output, part, aliases,
                policy, config.compression, memory, f"{largest} {list(source.shapes[largest][0])}",
            )
        )  # fmt: skip
    return tuple(tasks)


def _partition_sizes(sizes: Mapping[str, int], most: int) -> Iterator[dict[str, int]]:
    part: dict[str, int] = {}
    held = 0
    for name, size in sizes.items():
        if part and held + size > most:
            yield part
            part, held = {}, 0
        part[name] = size
        held += size
    if part:
        yield part


def fingerprint(source: Source, tasks: tuple[ShardTask, ...]) -> str:
    """Digest all that the files' bytes depend on: shards of one fingerprint fit together, whoever made them."""
    tensors = [[name, list(shape), dtype.name] for name, (shape, dtype) in source.shapes.items()]
    work = [[task.file, list(task.sizes)] for task in tasks]
    policy = tasks[0].config
    config = None
    if policy is not None:  # quantizers may have settings of their own, beside their names
        config = [policy.to_dict(), [repr(each.solver) for each in (policy, *policy.overrides)]]
    made = [__version__, importlib.metadata.version("jax"), config, tasks[0].compression]
    return blake3(canonical_json([source.folder.absolute, source.file_states(), tensors, work, made])).hexdigest()


def workers_within(tasks: tuple[ShardTask, ...], shards: ShardsConfig, cores: int) -> int:
    """Compute how many processes of this machine may work at once.

    Raises:
        ConfigError: if there is not enough memory for one.
    """
    limit = shards.max_memory_bytes or machine_memory() // 4
    largest = max(tasks, key=lambda task: task.memory)
    each = PROCESS_BYTES + largest.memory
    if each > limit:
        raise ConfigError(f"max_memory = {limit:,} bytes: {largest.largest} takes about {each:,}; allow as much")
    several = max(1, (limit - PARENT_BYTES) // each)  # of one worker, the parent does the work itself
    return min(shards.workers or cores, several, len(tasks))
