"""Measure how large tables are beside checkpoints of other programs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.scheme_checkpoints import GROUPS, Programs
from benchmarks.timing import Line, Result


def schemes(full: bool) -> Iterator[Line]:
    """Convert a matrix as each program stores it into a table of each kind; compare the files."""
    import aq_jax as aq
    from aq_jax.config import ConversionConfig

    programs = Programs(4096 if full else 1024)
    for group in GROUPS:
        for checkpoint in programs.checkpoints(group):
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder, "source")
                source.mkdir()
                before, sizes = checkpoint.write(source).stat().st_size, {}
                for suffix in (".parquet", ".arrow"):
                    done = aq.convert(ConversionConfig(str(source), str(Path(folder, "table", f"m{suffix}"))))
                    sizes[suffix] = Path(done.path).stat().st_size / before
            case = f"{checkpoint.name}, groups of {group}: .parquet / source"
            yield Result(case, sizes[".parquet"], "", "<= 1.05", figures={".arrow / source": sizes[".arrow"]})
