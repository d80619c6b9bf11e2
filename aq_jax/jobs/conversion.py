"""What a conversion's config asks for: planned, or done."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from aq_jax.config import ConversionConfig
from aq_jax.configfile import load_plan
from aq_jax.errors import ConfigError
from aq_jax.jobs.solving import solver
from aq_jax.store import TableWriter
from aq_jax.store.files import check_writable
from aq_jax.store.folders import Folder, split_url

if TYPE_CHECKING:
    from aq_jax.calibration.plan import Allocation
    from aq_jax.pipeline import Progress, Written


def convert(config: ConversionConfig, progress: Progress | None = None) -> Written:
    """Do what a TOML file says: a folder of weights becomes a table, its config and tokenizer files beside it.

    Where the output is a folder, the table is several files in it (see `shards.convert.convert_to_shards`).

    Args:
        config: from `load_config`, or made by hand.
        progress: called with each tensor's name, its bytes, and the bytes of all.

    Raises:
        ConfigError, FormatError, AqError: see `converters.huggingface.to_table`.

    >>> import numpy as np, safetensors.numpy, tempfile
    >>> import aq_jax as aq
    >>> folder = tempfile.mkdtemp()
    >>> safetensors.numpy.save_file({"w": np.ones((4, 8), np.float32)}, folder + "/model.safetensors")
    >>> config = ConversionConfig(folder, folder + "/m.parquet", aq.QuantizationConfig("int8"))
    >>> aq.convert(config).quantized
    {'w': 1.0}
    """
    if config.in_shards:
        from aq_jax.shards.convert import convert_to_shards

        return convert_to_shards(planned(config), progress)
    from aq_jax.converters import huggingface

    allocation, config = allocate(config, progress) if config.allocate else None, planned(config)
    if allocation is not None:
        config = replace(config, allocate=None, quantization=allocation.config)
        if allocation.goal.save:
            allocation.save(allocation.goal.save)
    checkpoints = Path(f"{config.output}.training")
    done = huggingface.to_table(
        config.source,
        config.output,
        config.quantization,
        solve=solver(config.quantization, config.calibration, progress, allocation, config.train, checkpoints),
        allow_pickle=config.allow_pickle,
        compression=config.compression,
        progress=progress,
    )
    if config.train is not None:
        shutil.rmtree(checkpoints, ignore_errors=True)  # only now: the table is there
    if allocation is not None:
        done.seconds = {"allocate": allocation.seconds} | done.seconds
    return done


def allocate(config: ConversionConfig, progress: Progress | None = None) -> Allocation:
    """Choose the width of each tensor, as `config.allocate` asks for; nothing is written.

    Args:
        config: of the conversion.
        progress: called with each tensor's name, its bytes, and the bytes of all.

    Raises:
        ConfigError, FormatError, AqError: as `calibration.plan.allocate`, and as `convert` for a source or an output.
    """
    from aq_jax.calibration.plan import allocate
    from aq_jax.converters.checkpoint import open_checkpoint
    from aq_jax.converters.huggingface import source_folder
    from aq_jax.converters.prequantized import check_quantizable
    from aq_jax.converters.sidefiles import check_side_files

    if config.allocate is None or config.quantization is None:
        raise ConfigError("[allocate]: is not in the config; wanted target_bpw or min_cosine in it")
    if Path(config.allocate.save).is_dir() and config.allocate.save:
        raise ConfigError(f"allocate.save = {config.allocate.save!r}: is a folder; wanted the name of a file")
    if config.allocate.save:
        check_writable(Path(config.allocate.save))
    # What could not be written is said before minutes are spent.
    target, _ = split_url(config.output)
    TableWriter(config.output, version=2, compression=config.compression)
    folder = source_folder(config.source)
    check_side_files(folder, target)
    if folder.local is None:
        raise ConfigError(f"{folder}: is not on this machine, and [allocate] runs the model; fetch the folder")
    with open_checkpoint(folder, config.allow_pickle) as checkpoint:
        check_quantizable(checkpoint.shapes, checkpoint.folder, quantizes=True)
        return allocate(checkpoint, folder.local, config.quantization, config.calibration, config.allocate, progress)


def planned(config: ConversionConfig) -> ConversionConfig:
    """The config with the overrides of its plan, if it has one, before its own.

    Raises:
        ConfigError: for a file that is no plan, and for one that is of another model: an override that matches nothing.
    """
    if not config.plan or config.quantization is None:
        return config
    from aq_jax.converters.checkpoint import open_checkpoint
    from aq_jax.converters.huggingface import source_folder

    overrides = load_plan(config.plan)
    with open_checkpoint(source_folder(config.source), config.allow_pickle) as checkpoint:
        for i, override in enumerate(overrides):
            if not any(re.search(override.pattern, name) for name in checkpoint.shapes):
                raise ConfigError(
                    f"{config.plan}: override {i + 1}: pattern {override.pattern!r} matches no tensor of "
                    f"{config.source}; wanted a plan of this model"
                )
    merged = replace(config.quantization, overrides=overrides + config.quantization.overrides)
    return replace(config, plan="", quantization=merged)


@dataclass(frozen=True, slots=True)
class Planned:
    """A row that a conversion will write: bytes are an upper bound, before scales are compressed.

    Args:
        vector: whether it is left alone for being a norm or a bias by its name (see `solvers.treatment.treat`).
    """

    name: str
    shape: tuple[int, ...]
    quant_type: str
    bytes: int
    vector: bool = False


def plan(config: ConversionConfig) -> list[Planned]:
    """What `convert` will write. Only tensors that may be kept in float16 are looked at; nothing is written.

    Raises:
        ConfigError, FormatError: as `convert` would, for a source or an output that cannot be.
    """
    from aq_jax.converters.checkpoint import open_checkpoint
    from aq_jax.converters.huggingface import source_folder
    from aq_jax.converters.prequantized import check_quantizable
    from aq_jax.converters.sidefiles import check_side_files
    from aq_jax.solvers.screen import to_half
    from aq_jax.solvers.treatment import treat

    config = planned(config)
    if config.allocate is not None:
        config = replace(config, allocate=None, quantization=allocate(config).config)
    folder, rows = source_folder(config.source), []
    if config.in_shards:
        from aq_jax.shards.convert import check_output

        check_output(folder, Folder(config.output))
    else:
        TableWriter(config.output, version=2 if config.quantization else 1, compression=config.compression)
        check_side_files(folder, split_url(config.output)[0])
    with open_checkpoint(folder, config.allow_pickle) as checkpoint:
        check_quantizable(checkpoint.shapes, checkpoint.folder, config.quantization is not None)
        for name, (shape, dtype) in checkpoint.shapes.items():
            kind, size, vector = dtype.name, math.prod(shape) * dtype.itemsize, False
            if config.quantization:
                treatment, kind = treat(config.quantization, name, shape, dtype), "none"
                vector = treatment.vector
                if (spec := treatment.spec) is not None:
                    kind = spec.quant_type
                    size = -(-math.prod(shape) * spec.bits // 8) + 8 * spec.group_count(shape)
                elif treatment.half:
                    half = to_half(checkpoint.array(name))
                    kind, size = ("fp16" if half.dtype == "float16" else "none"), half.nbytes
            rows.append(Planned(name, shape, kind, size, vector))
    return rows
