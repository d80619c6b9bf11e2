"""Hostile folders of safetensors: refused by name, or read; never a crash, never much time or memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
from hostile import checkpoints, harness
from hostile.case import Case

from aq_jax.converters.checkpoint import open_checkpoint
from aq_jax.errors import FormatError
from aq_jax.io.tensorfile import SAFETENSORS_DTYPES


@pytest.fixture
def good(tmp_path: Path) -> Path:
    (tmp_path / "good").mkdir()
    checkpoints.write_good(tmp_path / "good")
    return tmp_path / "good"


def test_damaged_files_and_headers_and_indexes_that_lie(good: Path, tmp_path: Path) -> None:
    cases = [*checkpoints.bytes_of(good), *checkpoints.headers(), *checkpoints.indexes(good)]
    found = harness.check(harness.run(cases, tmp_path))
    assert found["refused"] > 300


SCHEMES = Path(__file__).parents[1] / "golden" / "schemes"


@pytest.mark.parametrize("flips", [3, pytest.param(120, marks=pytest.mark.slow)])
def test_damaged_folders_that_other_programs_quantized(flips: int, tmp_path: Path) -> None:
    folders = [folder for folder in sorted(SCHEMES.iterdir()) if (folder / "config.json").exists()]
    cases = [case for folder in folders for case in checkpoints.quantized(folder, flips)]
    found = harness.check(harness.run(cases, tmp_path))
    assert found["refused"] > len(cases) // 3


def test_headers_and_indexes_that_are_too_long(tmp_path: Path) -> None:
    harness.check(harness.run(checkpoints.bombs(), tmp_path))


def test_what_is_read_of_a_damaged_header_is_what_the_library_reads(good: Path, tmp_path: Path) -> None:
    # There is no digest to tell; but a reader of our own must not be the one who errs.
    for number, case in enumerate(checkpoints.bytes_of(good)):
        if checkpoints.SINGLE not in case.files or case.expect != "any":
            continue
        folder = case.write(tmp_path / str(number))
        try:
            with open_checkpoint(folder) as found:
                ours = {name: (found.read(name).shape, found.read(name).tobytes()) for name in found.shapes}
                kinds = {name: found.shapes[name][1].name for name in found.shapes}
        except FormatError:
            continue
        theirs = dict(safetensors.deserialize(case.files[checkpoints.SINGLE]))
        assert ours == {name: (tuple(t["shape"]), bytes(t["data"])) for name, t in theirs.items()}, case.name
        assert kinds == {name: SAFETENSORS_DTYPES[t["dtype"]] for name, t in theirs.items()}, case.name


def test_a_case_that_is_read_though_it_should_not_be_is_reported(good: Path, tmp_path: Path) -> None:
    content = (good / "single" / "model.safetensors").read_bytes()
    case = Case("good", {checkpoints.SINGLE: content}, "refused", "checkpoint", "c")
    with pytest.raises(AssertionError, match="1 of 1 cases, such as\ngood: changed"):
        harness.check(harness.run([case], tmp_path))
