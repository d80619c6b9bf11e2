"""The corridor: an open source is checked, solved where its model must run, written, and its side files copied."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from aq_jax.calibration.solve import Solved
from aq_jax.config import (
    AllocationConfig,
    CalibrationConfig,
    Compression,
    ConversionConfig,
    QuantizationConfig,
    TrainingConfig,
)
from aq_jax.config.schema import load_plan
from aq_jax.conversion.prequantized import check_quantizable
from aq_jax.conversion.sidefiles import SideFiles, check_side_files, copy_side_files, recorded
from aq_jax.conversion.source import Source
from aq_jax.conversion.write import Written, write_model
from aq_jax.errors import ConfigError, FormatError
from aq_jax.progress import Progress
from aq_jax.quantizers.lookup import calibrated, check_conversion, check_policy
from aq_jax.store import check_table
from aq_jax.store.files import check_writable
from aq_jax.store.folders import Folder, split_url

if TYPE_CHECKING:
    from aq_jax.calibration.plan import Allocation


def to_table(
    source: Source,
    output: str | os.PathLike[str],
    config: QuantizationConfig | None = None,
    *,
    calibration: CalibrationConfig | None = None,
    goal: AllocationConfig | None = None,
    train: TrainingConfig | None = None,
    compression: Compression = "none",
    progress: Progress | None = None,
) -> Written:
    """Take a source into a table, with what goes beside it.

    Args:
        source: that a format has opened.
        output: .parquet or .arrow, or a URL of one; appears whole, or not at all.
        config: None writes the tensors as they are.
        calibration: for solver = "gptq", for which the model is run.
        goal: what the width of each tensor is chosen for, first.
        train: trains what was calibrated.
        compression: "zstd" compresses the weights too.
        progress: called with each tensor's name, its bytes, and the bytes of all.

    Raises:
        ConfigError: for a solver that is none; if weights are to be solved on the running model, and it is not on this
            machine.
        FormatError: for weights that are quantized already, unless they are written as they are; for an output whose
            folder holds another model's config or tokenizer files.
        AqError: for a tensor that cannot be quantized.
        OSError: for an output that cannot be written, before anything takes long.
    """
    if config is not None:
        check_policy(config)
    target, name = split_url(output)
    check_table(output, compression)
    beside, notes = check_source(source, target, config)
    calibration, checkpoints = calibration or CalibrationConfig(), Path(f"{output}.training")
    widths = solved = None
    if goal is not None and config is not None:
        widths = allocate(source, config, calibration, goal, progress)
        config = widths.config
        if goal.save:
            widths.save(goal.save)
    if config is not None and calibrated(config):
        solved = _solve(source, config, calibration, progress, widths, train, checkpoints)
    with ExitStack() as stack:
        path = target.local / name if target.local is not None else stack.enter_context(target.writing(name))
        done = write_model(
            source, path, config, solved=solved, compression=compression, progress=progress, more=recorded(beside)
        )
    done.path = str(output)
    copy_side_files(beside, target)
    if train is not None:
        shutil.rmtree(checkpoints, ignore_errors=True)  # only now: the table is there
    if widths is not None:
        done.seconds = {"allocate": widths.seconds} | done.seconds
    done.notes += notes
    return done


def check_source(source: Source, target: Folder, config: QuantizationConfig | None) -> tuple[SideFiles, list[str]]:
    """Refuse to quantize what is quantized, and to put what goes beside it in the place of another model's.

    Args:
        source: that is to be converted.
        target: the folder that it goes to.
        config: None takes the tensors as they are.

    Returns:
        What goes beside it, and what there is to know.

    Raises:
        FormatError: naming the tensor, or the file.
    """
    for name, kind in source.quantized.items() if config is not None else ():
        raise FormatError(
            f"{name}: is {kind} already, and would be rounded twice; quantize what {source.folder} was made from, "
            "dequantize this one first, or, to keep it as it is, leave the quantization out"
        )
    source.check_target(target)
    beside = source.side_files(target)
    check_side_files(beside, target)
    notes = source.notes + check_quantizable(source.shapes, source.folder, config is not None) + beside.notes
    if source.rows and source.quantized:
        notes.append(f"{len(source.quantized)} tensors were quantized already, and are written as they are")
    return beside, notes


def allocate(
    source: Source,
    config: QuantizationConfig,
    calibration: CalibrationConfig,
    goal: AllocationConfig,
    progress: Progress | None = None,
) -> Allocation:
    """Choose the width of each tensor by what it does to the running model; nothing is written.

    Raises:
        ConfigError: for a plan that is to be saved under the name of a folder; as `calibration.plan.allocate`.
        OSError: for one that cannot be written.
    """
    from aq_jax.calibration import plan

    if goal.save:
        if Path(goal.save).is_dir():
            raise ConfigError(f"allocate.save = {goal.save!r}: is a folder; wanted the name of a file")
        check_writable(Path(goal.save))
    with source.model_folder() as folder:
        return plan.allocate(source, folder, config, calibration, goal, progress)


def _solve(
    source: Source,
    config: QuantizationConfig,
    calibration: CalibrationConfig,
    progress: Progress | None,
    widths: Allocation | None,
    train: TrainingConfig | None,
    checkpoints: Path,
) -> Solved:
    """Solve the weights for which the model must run."""
    from aq_jax.calibration import plan, solve

    measure = None if widths is None else widths.record
    planned_on = 0 if widths is None else (1 + plan.LAST) * widths.goal.sentences  # and judged by: not trained on
    training = None if train is None else solve.Training(train, checkpoints, planned_on)
    with source.model_folder() as folder:
        return solve.solve_model(source, folder, config, calibration, progress, measure, training)


def with_plan(source: Source, config: ConversionConfig) -> ConversionConfig:
    """Put the overrides of a config's plan, if it has one, before its own.

    Raises:
        ConfigError: for a file that is no plan, and for one that is of another model: an override that matches nothing;
            as `check_conversion`.
    """
    if not config.plan or config.quantization is None:
        return config
    overrides = load_plan(config.plan)
    for i, override in enumerate(overrides):
        if not any(re.search(override.pattern, name) for name in source.shapes):
            raise ConfigError(
                f"{config.plan}: override {i + 1}: pattern {override.pattern!r} matches no tensor of "
                f"{config.source}; wanted a plan of this model"
            )
    merged = replace(config.quantization, overrides=overrides + config.quantization.overrides)
    config = replace(config, plan="", quantization=merged)
    check_conversion(config)
    return config
