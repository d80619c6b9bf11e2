"""Take an open source through the corridor: check it, solve it where its model must run, write it, copy side files."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from aq_jax.calibration.checkpoints import check_training_folder
from aq_jax.calibration.solve import SolvedWeights
from aq_jax.config import (
    AllocationConfig,
    CalibrationConfig,
    Compression,
    ConversionConfig,
    QuantizationConfig,
    TrainingConfig,
)
from aq_jax.config.schema import is_plan, load_plan
from aq_jax.conversion.model_files import is_weight
from aq_jax.conversion.prequantized import check_quantizable
from aq_jax.conversion.sidefiles import SideFiles, check_side_files, copy_side_files, side_file_record
from aq_jax.conversion.source import Source
from aq_jax.conversion.write import ConversionResult, write_model
from aq_jax.errors import ConfigError, FormatError
from aq_jax.progress import Progress
from aq_jax.quantizers.lookup import calibrated, check_conversion, check_policy
from aq_jax.quantizers.treatment import treat
from aq_jax.quantizers.unused import unused_notes
from aq_jax.store import check_table
from aq_jax.store.files import check_writable
from aq_jax.store.folders import Folder, split_url
from aq_jax.store.inspection import inspect_table
from aq_jax.store.urls import is_url

if TYPE_CHECKING:
    from aq_jax.calibration.allocation import Allocation


def to_table(
    source: Source,
    output: str | os.PathLike[str],
    config: QuantizationConfig | None = None,
    *,
    calibration: CalibrationConfig | None = None,
    goal: AllocationConfig | None = None,
    train: TrainingConfig | None = None,
    compression: Compression = "none",
    requantize: bool = False,
    progress: Progress | None = None,
) -> ConversionResult:
    """Write a source as a table, and copy the files that go beside it.

    Args:
        source: A source that a format opened.
        output: The path or URL of a .parquet or .arrow file; it appears whole, or not at all.
        config: The quantization; None writes the tensors as they are.
        calibration: The text for solver = "gptq", which runs the model.
        goal: The goal for which each tensor's width is chosen first.
        train: The training that follows the calibration.
        compression: "zstd" compresses the weights too.
        requantize: Whether weights that are quantized already are quantized again.
        progress: A callback that gets each tensor's name, its bytes, and the bytes of all.

    Raises:
        ConfigError: for an unknown solver; if a solver runs the model, and the model is not on this machine; if
            OUTPUT.training holds something else than this training.
        FormatError: for weights that are quantized already, unless they are written as they are, or requantized; for an
            output whose folder holds another model's config or tokenizer files.
        AqError: for a tensor that cannot be quantized.
        OSError: for an output that cannot be written, before any long work.
    """
    if config is not None:
        check_policy(config)
    target, name = split_url(output)
    calibration = calibration or CalibrationConfig()
    check_table(output, compression)
    beside, notes = check_source(source, target, config, requantize, calibration)
    checkpoints = (Path() if target.local is None else target.local) / f"{name}.training"
    if train is not None:
        check_training_folder(checkpoints)
        if target.local is None:
            notes.append(f"{output} is not on this machine: the training kept its checkpoints in {checkpoints}")
    widths = solved = None
    if goal is not None and config is not None:
        widths = allocate(source, config, calibration, goal, progress, str(output), compression, train is not None)
        config = widths.config
        if goal.save:
            widths.save(goal.save)
    if config is not None and calibrated(config):
        solved = _solve(source, config, calibration, progress, widths, train, checkpoints)
    with target.place(name) as path:
        done = write_model(
            source,
            path,
            config,
            solved=solved,
            compression=compression,
            progress=progress,
            metadata=side_file_record(beside),
        )
        done.notes += widths.budget_note(inspect_table(path).layers) if widths is not None else []
    done.path = str(output)
    copy_side_files(beside, target)
    if train is not None:
        shutil.rmtree(checkpoints, ignore_errors=True)  # only now that the table exists
    if widths is not None:
        done.seconds = {"allocate": widths.seconds} | done.seconds
    done.notes += notes
    return done


def check_source(
    source: Source,
    target: Folder,
    config: QuantizationConfig | None,
    requantize: bool,
    calibration: CalibrationConfig,
) -> tuple[SideFiles, list[str]]:
    """Refuse to quantize what is quantized already, and to overwrite another model's side files.

    Args:
        source: The source to convert.
        target: The folder that it goes to.
        config: The quantization; None keeps the tensors as they are.
        requantize: Whether tensors that are quantized already may be quantized again.
        calibration: The text for solvers that run the model.

    Returns:
        The side files, and notes.

    Raises:
        FormatError: naming the tensor, or the file.
    """
    for name, kind in source.quantized.items() if config is not None and not requantize else ():
        raise FormatError(
            f"{name}: is {kind} already, and would be rounded twice; quantize what it was made from, "
            "set requantize = true, or, to keep it as it is, leave the quantization out"
        )
    source.check_target(target)
    beside = source.side_files(target)
    check_side_files(beside, target)
    notes = source.notes + beside.notes
    if config is not None:
        treatments = {name: treat(config, name, *found) for name, found in source.shapes.items()}
        notes += unused_notes(config, treatments, source.aliases)
    if not source.quantized:  # else the source knows which tensors are
        notes += check_quantizable(source.shapes, source.folder, config is not None)
    elif config is not None:
        notes.append(f"{_quantized(source)}, and are quantized again: their errors add up")
    elif source.row_metadata:
        notes.append(f"{_quantized(source)}, and are written as they are")
    if calibration != CalibrationConfig() and (config is None or not calibrated(config)):
        notes.append("calibration: without effect, as no solver runs the model; its text is not read")
    return beside, notes


def _quantized(source: Source) -> str:
    """Say how many tensors are quantized already, and how."""
    kinds = Counter(source.quantized.values())
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f"{len(source.quantized)} tensors were quantized already ({listed})"


def allocate(
    source: Source,
    config: QuantizationConfig,
    calibration: CalibrationConfig,
    goal: AllocationConfig,
    progress: Progress | None,
    output: str,
    compression: Compression,
    trained: bool,
) -> Allocation:
    """Choose the width of each tensor by its effect on the running model; no table is written.

    Raises:
        ConfigError: if allocate.save names what a plan is not to replace; as `calibration.allocation.allocate`.
        OSError: if the plan cannot be written.
    """
    from aq_jax.calibration import allocation
    from aq_jax.calibration.ladder import calibrated_widths

    goal = replace(goal, widths=goal.widths or calibrated_widths(config, trained))
    if goal.save:
        _check_plan(goal.save, source, output)
    with source.model_folder() as folder:
        return allocation.allocate(source, folder, config, calibration, goal, progress, output, compression)


def _check_plan(save: str, source: Source, output: str) -> None:
    """Refuse to write a plan where it cannot be, in the place of a side file, or of anything that is no plan."""
    path, target, found = Path(save), split_url(output)[0], ""
    beside = [] if target.local is None else [target.local / name for name in source.side_files(target).names]
    if is_url(save):
        found = "is a URL; wanted a path on this machine"
    elif path.is_dir():
        found = "is a folder; wanted the name of a file"
    elif is_weight(path.name):  # as the output's is, and the source's may be
        found = "is a name of weights, which a plan is not to replace; wanted another, such as plan.toml"
    elif path.resolve() in [each.resolve() for each in beside]:
        found = "is where a file goes that belongs beside the model; wanted another name, such as plan.toml"
    elif path.exists() and not (path.is_file() and is_plan(path)):
        found = "already exists and is no plan; name another file, or remove it"
    if found:
        raise ConfigError(f"allocate.save = {save!r}: {found}")
    check_writable(path)


def _solve(
    source: Source,
    config: QuantizationConfig,
    calibration: CalibrationConfig,
    progress: Progress | None,
    widths: Allocation | None,
    train: TrainingConfig | None,
    checkpoints: Path,
) -> SolvedWeights:
    """Solve the weights whose solver runs the model."""
    from aq_jax.calibration import allocation, solve

    measure = None if widths is None else widths.record
    reserved = 0 if widths is None else (1 + allocation.JUDGE_FACTOR) * widths.goal.sentences  # not trained on
    training = None if train is None else solve.TrainingRequest(train, checkpoints, reserved)
    with source.model_folder() as folder:
        return solve.solve_model(source, folder, config, calibration, progress, measure, training)


def apply_plan(source: Source, config: ConversionConfig) -> ConversionConfig:
    """Put the overrides of a config's plan, if it names one, before its own.

    Raises:
        ConfigError: for a file that is no plan, and for the plan of another model, an override of which matches
            nothing; as `check_conversion`.
    """
    if not config.plan or config.quantization is None:
        return config
    overrides = load_plan(config.plan)
    for i, override in enumerate(overrides):
        if not any(re.search(override.pattern, name) for name in source.shapes):
            raise ConfigError(
                f"{config.plan}: override {i + 1}: pattern {override.pattern!r} matches no tensor of "
                f"{config.source}; wanted a plan that was made for this model"
            )
    merged = replace(config.quantization, overrides=overrides + config.quantization.overrides)
    config = replace(config, plan="", quantization=merged)
    check_conversion(config)
    return config
