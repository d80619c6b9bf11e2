"""Find the language models that suites measure, in a folder that a variable names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import Skipped

VARIABLE = "AQ_JAX_LANGUAGE"  # a folder with files of models; `language` wants calibration.txt and judged.txt, too


@dataclass(frozen=True)
class Subject:
    """A language model that is measured.

    Args:
        name: Its name in tables.
        file: The name of its file.
        group: The elements of a group, for configs that have groups: it divides the model's rows.
        calibrating: The number of windows of 512 tokens that calibrate it.
        judging: The number of windows that judge it.
    """

    name: str
    file: str
    group: int
    calibrating: int = 128
    judging: int = 32

    @property
    def path(self) -> Path:
        """The path of its file."""
        return Path(os.environ[VARIABLE], self.file)


SUBJECTS = (
    Subject("SmolLM2", "smollm2.gguf", 96),
    # Fewer windows, since its vocabulary is five times as large.
    Subject("Gemma 3 270M", "gemma3.gguf", 128, calibrating=16, judging=12),
)


def present() -> Iterator[Subject | Skipped]:
    """Yield each model whose file is there, and why another is not measured."""
    folder = os.environ.get(VARIABLE)
    for subject in SUBJECTS:
        if not folder:
            yield Skipped(subject.name, f"{VARIABLE} names no folder")
        elif subject.path.is_file():
            yield subject
        else:
            yield Skipped(subject.name, f"{VARIABLE} names a folder without {subject.file}")


def text(name: str) -> str:
    """Return the path of a text of the folder."""
    return str(Path(os.environ[VARIABLE], name))
