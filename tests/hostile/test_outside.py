"""The bad files of others: AQ_JAX_BAD_FILES names a folder of them, such as those of apache/parquet-testing.

They are not part of this repository. Fetched, they are run by

    AQ_JAX_BAD_FILES=parquet-testing/bad_data python -m pytest tests/hostile/test_outside.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import harness
from hostile.case import Case

VARIABLE = "AQ_JAX_BAD_FILES"
LARGEST = 64 << 20


def outside(folder: Path) -> Iterator[Case]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size <= LARGEST and is_container(path):
            yield Case(str(path.relative_to(folder)), {path.name: path.read_bytes()})


def is_container(path: Path) -> bool:
    """By its name, or by its first bytes: files of fuzzers have names of their own."""
    named = (
        ".parquet" in path.name or ".arrow" in path.name or path.name.startswith(("crash-", "clusterfuzz-", "fuzz-"))
    )
    with path.open("rb") as file:
        return named or file.read(4) in (b"PAR1", b"ARRO")


@pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} names no folder of bad files")
def test_bad_files_of_others_are_refused(tmp_path: Path) -> None:
    results = harness.run(outside(Path(os.environ[VARIABLE])), tmp_path)
    assert results, "the folder holds no Parquet or Arrow file"
    print(harness.check(results))
