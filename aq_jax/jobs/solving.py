"""What solves weights that the running model is needed for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aq_jax.config import CalibrationConfig, QuantizationConfig, TrainingConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from aq_jax.calibration.plan import Allocation
    from aq_jax.pipeline import Progress, Solved, Source


def solver(
    config: QuantizationConfig | None,
    calibration: CalibrationConfig,
    progress: Progress | None,
    allocation: Allocation | None = None,
    train: TrainingConfig | None = None,
    checkpoints: Path = Path(),
) -> Callable[[Source, Path], Solved | None] | None:
    """What solves the weights for which the model must run, if the config asks for it anywhere."""
    if config is None or not config.calibrated:
        return None
    from aq_jax.calibration.plan import LAST
    from aq_jax.calibration.solve import Training, solve_model

    measure = None if allocation is None else allocation.record
    planned_on = 0 if allocation is None else (1 + LAST) * allocation.goal.sentences  # and judged by: not trained on
    training = None if train is None else Training(train, checkpoints, planned_on)
    return lambda source, folder: solve_model(source, folder, config, calibration, progress, measure, training)
