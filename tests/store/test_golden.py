"""Committed files mean today what they meant when they were written."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import independent_reader
import numpy as np
import pytest
from golden import make

import aq_jax as aq
from aq_jax.codes.bits import pack_codes
from aq_jax.store import Row, decode, open_table, row_digest

STEMS = ("v1", "v2", "rotated", "widths", "trellis", "grids", "levels", "unsigned", "integers", "addends", "nested")
FILES = [f"{name}.{suffix}" for name in STEMS for suffix in ("parquet", "arrow")]
EXISTING = sorted((Path(__file__).parent.parent / "golden" / "existing").glob("*.parquet"))


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def tensors(path: Path) -> dict[str, np.ndarray]:
    with open_table(path) as table:
        return {name: decode(table.read_tensor(name)) for name in table.names}


@pytest.mark.parametrize("path", EXISTING, ids=lambda path: path.stem)
def test_files_of_the_published_system_mean_what_they_should(path: Path, golden: Path) -> None:
    with np.load(golden / "existing" / "expected.npz") as expected:
        wanted = {key.split("/", 1)[1]: expected[key] for key in expected if key.split("/")[0] == path.stem}
    found = tensors(path)
    assert list(found) == list(wanted)
    assert len(found) == 7
    for name, value in found.items():
        assert same(value, wanted[name]), name
    for name, value in independent_reader.read_tensors(path).items():
        assert same(value, wanted[name]), name


@pytest.mark.parametrize("file", FILES)
def test_golden_files(file: str, golden: Path) -> None:
    found, slowly = tensors(golden / file), independent_reader.read_tensors(golden / file)
    assert list(found) == list(slowly)
    rows, metadata = independent_reader.read_rows(golden / file)
    turned = {row["layer_name"] for row in rows if row.get("rotation")}
    assert all(same(found[name], slowly[name]) for name in found if name not in turned)
    for name in turned:  # sums are in any order
        np.testing.assert_allclose(found[name], slowly[name], rtol=0, atol=1e-6 * float(np.linalg.norm(slowly[name])))
    assert bool(turned) is file.startswith(("rotated", "widths", "trellis"))
    assert [independent_reader.row_digest(row) for row in rows] == [row["digest"] for row in rows]
    assert independent_reader.table_digests(rows, metadata) == (metadata["statistics"], metadata["digest"])
    assert independent_reader.begins_with(golden / file, independent_reader.V2) is not file.startswith("v1")
    assert independent_reader.reads_as_v1(golden / file)  # V2 begins with the columns of V1
    with open_table(golden / file) as table:
        assert table.version == (1 if file.startswith("v1") else 2)
        assert table.aliases == make.ALIASES
        assert table.metadata is not None
        assert table.metadata.config == make.CONFIG


@pytest.mark.parametrize("file", FILES)
def test_golden_rows_are_written_as_they_were(file: str, golden: Path, tmp_path: Path) -> None:
    make.write(tmp_path / file)
    (rows, metadata), (wanted, before) = (independent_reader.read_rows(folder / file) for folder in (tmp_path, golden))
    assert rows == wanted
    assert metadata["config"] == before["config"]


def test_golden_values_are_these() -> None:
    path = EXISTING[0].parent.parent / "v2.parquet"
    found = tensors(path)
    # int2 codes run 3 0 1 2 ... less 2: (q + 0.5) / 64
    assert found["int2.tensor"][:4].tolist() == [1.5 / 64, -1.5 / 64, -0.5 / 64, 0.5 / 64]
    assert found["half"].ravel()[:3].tolist() == [0, 0.125, 0.25]
    assert found["half.of_bfloat16"].dtype.name == "bfloat16"
    assert found["none.int64"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_rotated_values_are_these(golden: Path) -> None:
    with open_table(golden / "rotated.arrow") as table:
        rows = table.read_tensor("embed.weight")
        cut = table.read_tensor("int3h.pieces")
    # Codes run 3 8 13 2 7 ... less 8, the first channel's scale is 1 / 64 and its zero point 0.
    assert rows[0].data[:2].tobytes().hex() == "832d"
    v = np.array([-5, 0, 5, -6]) / 64
    wanted = [(v[0] + v[1] + v[2] + v[3]) / 2, (v[0] - v[1] + v[2] - v[3]) / 2,
              (v[0] + v[1] - v[2] - v[3]) / 2, (-v[0] + v[1] + v[2] - v[3]) / 2]  # fmt: skip
    np.testing.assert_allclose(decode(rows)[0], wanted, rtol=0, atol=1e-7)
    assert [row.num_params for row in cut] == [24, 40]
    assert [row.rotation for row in cut] == [16, 16]


def test_the_rotated_example_of_the_documentation() -> None:
    one = np.array([0.5], np.float32)
    data = pack_codes(np.array([3, 1, -1, 1], np.int8), 4)
    row = Row("w", (1, 4), "float32", data, 4, "int4h", one, 0 * one, 0, 0, 4)
    assert row.data.tobytes().hex() == "9b97"
    assert decode([row]).tolist() == [[1, 0, 1, -1]]


@pytest.mark.parametrize(("kind", "data", "wanted"), [
    ("tcq2", "c61f", [[27, -56], [-38, -8], [-46, -53], [0, -74]]),
    ("tcq1.5", "c60f", [[27, -6, 23, 13], [-40, -12, -19, 5]]),
])  # fmt: skip
def test_the_trellis_examples_of_the_documentation(kind: str, data: str, wanted: list[list[int]]) -> None:
    rows, columns = len(wanted), len(wanted[0])
    stream, scales = np.frombuffer(bytes.fromhex(data), np.uint8), np.ones(rows, np.float32)
    row = Row("w", (rows, columns), "float32", stream, 8, kind, scales, scales[:0], 0, 0)
    assert decode([row]).tolist() == wanted


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_every_road_unrotates_alike(suffix: str, golden: Path) -> None:
    wanted = independent_reader.read_tensors(golden / f"rotated.{suffix}")
    in_numpy, in_jax = (aq.load(golden / f"rotated.{suffix}", framework) for framework in ("numpy", "jax"))
    packed = aq.load(golden / f"rotated.{suffix}", packed=True)
    for name, value in wanted.items():
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6 * float(np.linalg.norm(value)))
        assert packed[name].spec.rotation == (0 if name == "int4" else value.shape[-1] & -value.shape[-1])
        for found in (in_numpy[name], in_jax[name], aq.dequantize(packed[name])):
            close(found, value)


def test_the_example_of_records_of_the_documentation() -> None:
    scales, zeros = (np.frombuffer(bytes.fromhex(text), np.uint8) for text in ("0038411004411004", "0034c2200cc2200c"))
    data = np.zeros(128, np.uint8)
    data[0] = 0xF0
    row = Row("w", (1, 256), "float32", data, 256, "q4_k", scales, zeros, 0, 32)
    assert decode([row])[0, [0, 1, 2, 32]].tolist() == [-0.5, 7, -0.5, -0.75]


def test_the_example_of_integer_zero_points_of_the_documentation() -> None:
    data, scales, zeros = (np.frombuffer(bytes.fromhex(text), np.uint8) for text in ("f07c", "0038", "fd"))
    row = Row("w", (1, 4), "float32", data, 4, "int4_f16i", scales.view(np.float16), zeros.view(np.int8), 0, 4)
    assert decode([row]).tolist() == [[-2.5, 5, 3.5, 1]]


def test_the_example_of_nested_scales_of_the_documentation() -> None:
    data, scales = (np.frombuffer(bytes.fromhex(text), np.uint8) for text in ("f07f", "0002"))
    numbers = np.concatenate([np.float32([2, 3, 5]), np.zeros(253, np.float32), np.float32([0.5, 4])])
    row = Row("w", (1, 4), "float32", data, 4, "nf4_nested", scales, numbers, 0, 2)
    assert decode([row]).tolist() == [[-8.5, 8.5, 20.5, 0]]


def test_the_digests_of_the_documentation() -> None:
    codes = np.array([-2, -1, 0, 1, 1, 0, -1, -2], np.int8)
    scales, zeros = np.array([0.5, 2], np.float32), np.array([-0.5, -0.5], np.float32)
    rows = [
        Row("w", (2, 4), "float32", pack_codes(codes, 2), 8, "int2", scales, zeros, 0, 4),
        Row("a", (3,), "uint8", np.array([7, 8, 9], np.uint8), 3),
    ]
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    assert re.findall(r"BLAKE3 = (\w+)", text) == [row_digest(row).hex() for row in rows]
