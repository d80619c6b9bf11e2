"""Hostile GGUF files: refused by name, or read; never a crash, never much time or memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile import ggufs, harness


def test_headers_and_fields_that_lie_and_damaged_and_cut_files(tmp_path: Path) -> None:
    good = ggufs.case("as it is", ggufs.GOLDEN.read_bytes(), "same", good=str(ggufs.GOLDEN))
    cases = [good, *ggufs.headers(), *ggufs.said(), *ggufs.flips(200), *ggufs.truncations(97)]
    found = harness.check(harness.run(cases, tmp_path))
    assert found["refused"] > 200


def test_files_that_are_too_long(tmp_path: Path) -> None:
    harness.check(harness.run(ggufs.bombs(), tmp_path))


@pytest.mark.slow
def test_headers_that_are_long(tmp_path: Path) -> None:
    harness.check(harness.run(ggufs.long_headers(), tmp_path))


@pytest.mark.slow
def test_many_damaged_headers(tmp_path: Path) -> None:
    cases = [*ggufs.flips(4000, 1), *ggufs.truncations(1), *ggufs.numbers()]
    harness.check(harness.run(cases, tmp_path))
