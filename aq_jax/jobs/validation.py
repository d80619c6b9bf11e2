"""A model converted and judged, as a config's cases say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aq_jax.jobs.conversion import convert
from aq_jax.jobs.inspection import inspect_table
from aq_jax.jobs.verification import verify_table

if TYPE_CHECKING:
    from aq_jax.evaluate.config import ValidationConfig
    from aq_jax.pipeline import Progress


def validate(config: ValidationConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Convert a model as each case says, judge what comes of it, and write report.json, report.md and report.html.

    Args:
        config: from `evaluate.config.load_validation`, or made by hand.
        progress: called with what is being done, its size, and the size of all.

    Returns:
        The report, as docs/validation.md describes it; `report["ok"]` is the verdict.

    Raises:
        ConfigError, FormatError, AqError: see `evaluate.validation.validate`.

    >>> from aq_jax.evaluate.config import load_validation  # doctest: +SKIP
    >>> validate(load_validation("configs/validate_minilm.toml"))["ok"]  # doctest: +SKIP
    True
    """
    from aq_jax.evaluate.report import write_report
    from aq_jax.evaluate.validation import validate

    report = validate(config, convert, inspect_table, verify_table, progress)
    write_report(report, config.folder)
    return report
