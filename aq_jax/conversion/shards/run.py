"""Convert a source into a folder of tables: partition it, run the tasks, resume an earlier run, publish the result."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from aq_jax.config import ConversionConfig, ShardsConfig
from aq_jax.conversion.corridor import check_source
from aq_jax.conversion.shards import engines
from aq_jax.conversion.shards.journal import Journal, refuse_taken
from aq_jax.conversion.shards.partition import fingerprint, partition, workers_within
from aq_jax.conversion.sidefiles import SideFiles, copy_side_files
from aq_jax.conversion.source import Source
from aq_jax.conversion.write import ConversionResult
from aq_jax.cores import cores
from aq_jax.quantizers.treatment import kept_notes, treat
from aq_jax.store.folders import Folder
from aq_jax.store.manifest import MANIFEST, compose_manifest

if TYPE_CHECKING:
    from aq_jax.progress import Progress


def convert_to_shards(source: Source, config: ConversionConfig, progress: Progress | None = None) -> ConversionResult:
    """Write a source as a folder of tables, its manifest last; files that an earlier run finished are kept.

    Memory stays under `shards.max_memory` however large the model is: safetensors are read through memory maps, and a
    tensor that is larger than 1 GiB is held a piece at a time.

    Args:
        source: A source that a format opened.
        config: A config whose output is a folder.
        progress: A callback that gets each tensor's name, its bytes, and the bytes of all.

    Raises:
        FormatError: for a source that is quantized already and would be again; for an output that already holds a
            table or another model's files.
        OSError: for an output that cannot be written to.
        ConfigError: if the memory allowed is too little for one tensor; if another process converts into the folder;
            for a quantizer that cannot be sent to other processes.
        AqError: for a tensor that cannot be quantized, or a process that ended: run again, and the rest is done.

    >>> import numpy as np, os, safetensors.numpy, tempfile
    >>> import aq_jax as aq
    >>> folder = tempfile.mkdtemp()
    >>> weights = {name: np.ones((4, 8), np.float32) for name in "ab"}
    >>> safetensors.numpy.save_file(weights, folder + "/model.safetensors")
    >>> shards = aq.ShardsConfig(size=128, workers=1)
    >>> config = ConversionConfig(folder, folder + "/int8", aq.QuantizationConfig("int8"), shards=shards)
    >>> done = aq.convert(config)
    >>> sorted(file for file in os.listdir(done.path))
    ['manifest.json', 'weights-00001-of-00002.parquet', 'weights-00002-of-00002.parquet']
    >>> aq.load(done.path, "numpy")["b"].sum()
    np.float32(32.0)
    """
    shards = config.shards or ShardsConfig()
    output, started = Folder(config.output), time.perf_counter()
    beside, notes = check_folder(source, output, config)
    tasks = partition(source, config)
    run = engines.ray_engine if shards.engine == "ray" else engines.local_engine(workers_within(tasks, shards, cores()))
    total = sum(task.bytes for task in tasks)

    def on_tensor(name: str, size: int) -> None:
        if progress:
            progress(name, size, total)

    with Journal(output, fingerprint(source, tasks)) as journal:
        found = journal.finished(tasks)
        if found:
            on_tensor(f"{len(found)} files were finished before", sum(tasks[index].bytes for index in found))
        waiting = [task for task in tasks if task.index not in found]
        if waiting:
            for done in run(waiting, on_tensor):
                journal.record(done)
                found[done.index] = done
        copy_side_files(beside, output)
        ordered = [found[task.index] for task in tasks]
        made = dict(source.provenance) | (
            {"quantization": config.quantization.to_dict()} if config.quantization else {}
        )
        journal.close(compose_manifest([done.entry for done in ordered], made))
    written = ConversionResult(config.output)
    for done in ordered:
        written.quantized |= done.quantized
        written.kept |= done.kept
        written.source_bytes += done.source_bytes
        written.bytes += done.entry.bytes
        for what, seconds in done.seconds.items():
            written.seconds[what] = written.seconds.get(what, 0.0) + seconds
    treatments = {name: treat(config.quantization, name, *found) for name, found in source.shapes.items()}
    written.notes += kept_notes(treatments) + notes
    written.seconds["all"] = time.perf_counter() - started
    return written


def check_folder(source: Source, output: Folder, config: ConversionConfig) -> tuple[SideFiles, list[str]]:
    """Refuse an output that a conversion of this source would not write into.

    Returns:
        The side files, and notes.

    Raises:
        FormatError: naming what is in the way: a table, another model's config or tokenizer files, or anything else;
            as `corridor.check_source`.
        OSError: for a folder that cannot be written to.
    """
    beside, notes = check_source(source, output, config.quantization, config.requantize, config.calibration)
    refuse_taken(output, beside.names)
    output.check_writable(MANIFEST)
    return beside, notes
