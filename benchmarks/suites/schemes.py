"""Measure how large tables are beside checkpoints of other programs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.scheme_checkpoints import GROUPS, Checkpoint, Programs
from benchmarks.timing import Line, Result


def schemes(full: bool) -> Iterator[Line]:
    """Convert a matrix as each program stores it into a table of each kind; compare the files.

    Of groups of several lengths, the largest table counts.
    """
    programs, found = Programs(4096 if full else 1024), dict[str, list[dict[str, float]]]()
    for group in GROUPS:
        for checkpoint in programs.checkpoints(group):
            found.setdefault(checkpoint.name, []).append(_sizes(checkpoint))
    for name, sizes in found.items():
        parquet, arrow = (max(each[suffix] for each in sizes) for suffix in (".parquet", ".arrow"))
        yield Result(f"{name}: .parquet / source", parquet, "", "<= 1.05", figures={".arrow / source": arrow})


def _sizes(checkpoint: Checkpoint) -> dict[str, float]:
    """Compute the size of tables over that of the checkpoint, by suffix."""
    import aq_jax as aq
    from aq_jax.config import ConversionConfig

    with tempfile.TemporaryDirectory() as folder:
        source, found = Path(folder, "source"), dict[str, float]()
        source.mkdir()
        before = checkpoint.write(source).stat().st_size
        for suffix in (".parquet", ".arrow"):
            done = aq.convert(ConversionConfig(str(source), str(Path(folder, "table", f"m{suffix}"))))
            found[suffix] = Path(done.path).stat().st_size / before
    return found
