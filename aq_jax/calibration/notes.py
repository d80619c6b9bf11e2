"""Note what a calibration asked of its text and did not get, and what the text is."""

from __future__ import annotations

from collections.abc import Iterator

from aq_jax.calibration.layerwise import CalibrationResult
from aq_jax.calibration.text import BUILT_IN, Text
from aq_jax.config import CalibrationConfig


def limit_notes(text: Text, calibration: CalibrationConfig, longest: int, cut: int) -> Iterator[str]:
    """List notes about numbers that exceed what there is, and about lines that were cut.

    Args:
        text: The lines that were drawn.
        calibration: The config that asked for them.
        longest: The number of tokens at which they were cut.
        cut: The number of those that were cut.
    """
    default, unit = CalibrationConfig(), "windows" if calibration.joined else "lines"
    lines, tokens, count = calibration.sentences, calibration.max_tokens, len(text.lines)
    if count < lines != default.sentences:  # nobody asked for a default
        yield f"calibration.sentences = {lines}: {text.name} has {count} {unit} to calibrate on"
    if longest < tokens != default.max_tokens:
        yield f"calibration.max_tokens = {tokens}: the model takes {longest} tokens; {unit} are cut there"
    if cut and not calibration.joined:  # windows are made longer, to be cut
        yield f"{cut} of {count} lines to calibrate on have more than {longest} tokens, and are cut there"


def text_notes(text: Text, done: CalibrationResult) -> Iterator[str]:
    """List notes about the text that a model was calibrated on."""
    if text.name == BUILT_IN:
        yield (
            f"calibrated on {len(text.lines)} sentences of Python's reference manual: English, but about one subject; "
            "give text like that which the model will see as calibration.text = FILE"
        )
    most = max(q.shape[1] for q in done.weights.values()) if done.weights else 0
    if done.tokens < most:
        yield (
            f"calibrated on {done.tokens} tokens, fewer than the {most} inputs of the widest layer: more text would "
            "serve better"
        )
