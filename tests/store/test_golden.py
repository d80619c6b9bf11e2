"""Committed files mean today what they meant when they were written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from aq_jax.store import Row, decode, open_table, pack_codes, row_digest

if TYPE_CHECKING:
    from types import ModuleType

EXISTING = sorted((Path(__file__).parent.parent / "golden" / "existing").glob("*.parquet"))


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def tensors(path: Path) -> dict[str, np.ndarray]:
    with open_table(path) as table:
        return {name: decode([table.read(info.position) for info in table.pieces(name)]) for name in table.names}


@pytest.mark.parametrize("path", EXISTING, ids=lambda path: path.stem)
def test_files_of_the_published_system_mean_what_they_should(path: Path, golden: Path, independent: ModuleType) -> None:
    with np.load(golden / "existing" / "expected.npz") as expected:
        wanted = {key.split("/", 1)[1]: expected[key] for key in expected if key.split("/")[0] == path.stem}
    found = tensors(path)
    assert list(found) == list(wanted)
    assert len(found) == 7
    for name, value in found.items():
        assert same(value, wanted[name]), name
    for name, value in independent.read_tensors(path).items():
        assert same(value, wanted[name]), name


@pytest.mark.parametrize("file", ["v1.parquet", "v1.arrow", "v2.parquet", "v2.arrow"])
def test_golden_files(file: str, golden: Path, make: ModuleType, independent: ModuleType) -> None:
    found, slowly = tensors(golden / file), independent.read_tensors(golden / file)
    assert list(found) == list(slowly)
    assert all(same(found[name], slowly[name]) for name in found)
    rows, metadata = independent.read_rows(golden / file)
    assert [independent.row_digest(row) for row in rows] == [row["digest"] for row in rows]
    assert independent.table_digests(rows, metadata) == (metadata["statistics"], metadata["digest"])
    with open_table(golden / file) as table:
        assert table.version == int(file[1])
        assert table.aliases == make.ALIASES
        assert table.metadata is not None
        assert table.metadata.config == make.CONFIG


def test_golden_values_are_these() -> None:
    path = EXISTING[0].parent.parent / "v2.parquet"
    found = tensors(path)
    # int2 codes run 3 0 1 2 ... less 2: (q + 0.5) / 64
    assert found["int2.tensor"][:4].tolist() == [1.5 / 64, -1.5 / 64, -0.5 / 64, 0.5 / 64]
    assert found["half"].ravel()[:3].tolist() == [0, 0.125, 0.25]
    assert found["half.of_bfloat16"].dtype.name == "bfloat16"
    assert found["none.int64"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_digests_of_the_documentation() -> None:
    codes = np.array([-2, -1, 0, 1, 1, 0, -1, -2], np.int8)
    scales, zeros = np.array([0.5, 2], np.float32), np.array([-0.5, -0.5], np.float32)
    rows = [
        Row("w", (2, 4), "float32", pack_codes(codes, 2), 8, "int2", scales, zeros, 0, 4),
        Row("a", (3,), "uint8", np.array([7, 8, 9], np.uint8), 3),
    ]
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    assert re.findall(r"BLAKE3 = (\w+)", text) == [row_digest(row).hex() for row in rows]
