"""Hostile tables: refused by name, or read as the good file is; never a crash, never much time or memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import harness, tables
from hostile.case import Case
from hostile.tables import Good


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[Good]:
    return tables.good_files(tmp_path_factory.mktemp("good"))


def some(good: list[Good], *names: str) -> list[Good]:
    return [each for each in good if each.name in names]


def test_flipped_bits(good: list[Good], tmp_path: Path) -> None:
    cases = [case for each in good for case in tables.flips(each, 60)]
    cases += tables.footer_flips(good[2], 9)
    assert len(cases) > 700
    found = harness.check(harness.run(cases, tmp_path))
    assert found["refused"] > 500


@pytest.mark.slow
def test_many_flipped_bits(good: list[Good], tmp_path: Path) -> None:
    harness.check(harness.run((case for each in good for case in tables.flips(each, 5000, seed=1)), tmp_path))
    harness.check(harness.run(tables.footer_flips(good[2], 1), tmp_path))


def cut(good: list[Good]) -> Iterator[Case]:
    for each in good:
        yield from tables.truncations(each)
        yield from tables.cuts(each)


def test_whole_files_are_read_and_truncated_and_cut_ones_are_not(good: list[Good], tmp_path: Path) -> None:
    cases = [each.case("as it is", each.content, "same") for each in good]
    harness.check(harness.run([*cases, *cut(some(good, "v2.parquet", "batches.arrow"))], tmp_path))


@pytest.mark.slow
def test_truncated_and_cut_files(good: list[Good], tmp_path: Path) -> None:
    harness.check(harness.run(cut(good), tmp_path))


def lies(good: list[Good], step: int) -> Iterator[Case]:
    for each in good:
        yield from tables.length_lies(each)
        if each.path.suffix == ".arrow":
            yield from tables.word_lies(each, step)
            yield from tables.offset_lies(each)
        elif each.name in ("v2.parquet", "dictionary.parquet", "v2pages.parquet"):
            yield from tables.footer_lies(each, step)
            yield from tables.page_lies(each, step)


def test_headers_that_lie(good: list[Good], tmp_path: Path) -> None:
    harness.check(harness.run(lies(some(good, "v2.parquet", "v2.arrow", "batches.arrow"), 64), tmp_path))


@pytest.mark.slow
def test_every_header_that_lies(good: list[Good], tmp_path: Path) -> None:
    harness.check(harness.run(lies(good, 1), tmp_path))


def test_rows_metadata_folders_and_names_that_lie(tmp_path: Path) -> None:
    lying = (tables.row_lies, tables.row_losses, tables.metadata_lies)
    cases = [case for suffix in ("parquet", "arrow") for make in lying for case in make(suffix)]
    (tmp_path / "good").mkdir()
    harness.check(harness.run([*cases, *tables.folders(), *tables.names(tmp_path / "good")], tmp_path))


def test_files_that_unpack_to_more_than_they_should(tmp_path: Path) -> None:
    harness.check(harness.run(tables.bombs(), tmp_path))


def test_verify_finds_just_what_a_loader_refuses(good: list[Good], tmp_path: Path) -> None:
    cases = [case for each in good for case in tables.flips(each, 12, seed=2)]
    cases += [case for each in good[2:4] for case in tables.cuts(each)][::9]
    cases += [*tables.row_lies("parquet"), *tables.row_losses("arrow"), *tables.metadata_lies("parquet")]
    cases += [case for case in tables.folders() if case.opens == "t"]
    harness.check(
        harness.run([dataclasses.replace(case, kind="verify", expect="any", good="") for case in cases], tmp_path)
    )
