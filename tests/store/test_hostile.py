"""Malformed tables: what the errors say. That there is always one, and no crash, is asked in tests/hostile."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile.tables import bare, edited, stored

from aq_jax.errors import AqError, FormatError, IntegrityError
from aq_jax.store import Row, open_table, write_table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def contents(path: Path) -> list[tuple[object, ...]]:
    """Everything that a table says."""
    with open_table(path) as table:
        head = (table.version, table.names, sorted(table.aliases.items()), table.metadata)
        cells = (
            "layer_name",
            "shape",
            "dtype",
            "quant_type",
            "quant_axis",
            "group_size",
            "solver",
            "cosine",
            "rel_mse",
        )
        arrays = ("data", "scales", "zero_points")
        rows = [
            (*(getattr(r, name) for name in cells), *(getattr(r, name).tobytes() for name in arrays))
            for r in table.rows()
        ]
    return [head, *rows]


def store(path: Path, table: pa.Table) -> Path:
    path.write_bytes(stored(table, path.suffix[1:]))
    return path


@pytest.fixture
def cells(golden: Path) -> pa.Table:
    return bare(golden / "v2.parquet")


# row 4 is int4.group: shape [4, 8], 16 bytes of data, 2 groups of 16
EDITS: list[tuple[str, object, str]] = [
    ("data", b"\0" * 15, r"row 4 \(int4.group\): data holds 15 bytes, shape \[4, 8\] int4 needs 16"),
    ("data", b"\0" * 17, r"row 4 \(int4.group\): data holds 17 bytes, shape \[4, 8\] int4 needs 16"),
    ("data", None, r"row 4 \(int4.group\): data is null"),
    ("scales", None, r"row 4 \(int4.group\): scales is null"),
    ("scales", b"\0" * 7, r"row 4 \(int4.group\): scales holds 7 bytes, which is not a whole number of float32"),
    ("scales", b"\0" * 4, r"row 4 \(int4.group\): scales holds 4 bytes, .* needs 8"),
    ("scales", b"\0" * 8, r"row 4 \(int4.group\): scales are 0 to 0"),
    ("scales", np.array([1, np.nan], "<f4").tobytes(), r"row 4 \(int4.group\): scales are nan"),
    ("zero_points", b"\0" * 12, r"row 4 \(int4.group\): zero_points holds 12 bytes, .* needs 8"),
    ("zero_points", np.array([0, np.inf], "<f4").tobytes(), r"row 4 \(int4.group\): zero_points are not all finite"),
    ("num_params", 33, r"row 4 \(int4.group\): num_params is 33, shape \[4, 8\] has 32 elements"),
    ("num_params", 31, r"row 4 \(int4.group\): piece of 31 elements; all pieces but the last must be a multiple of 16"),
    ("num_params", 16, r"row 5 \(int3.group\): int4.group still lacks 16 of 32 elements"),
    ("num_params", -1, r"row 4 \(int4.group\): num_params is -1"),
    ("num_params", None, r"row 4 \(int4.group\): num_params is null"),
    ("shape", None, r"row 4 \(int4.group\): shape is null"),
    ("shape", [4, None], r"row 4 \(int4.group\): shape has a null"),
    ("shape", [4, -8], r"row 4 \(int4.group\): shape \[4, -8\] has an axis outside"),
    ("shape", [2**30, 2**30, 4], r"row 4 \(int4.group\): shape .* is too large for any memory"),
    ("layer_name", None, r"row 4 \(None\): layer_name is null"),
    ("layer_name", "", r"row 4 \(\): layer_name must be a non-empty string"),
    ("layer_name", "embed.weight", r"row 4 \(embed.weight\): the name already exists"),
    ("dtype", "torch.float99", r"row 4 \(int4.group\): unknown dtype 'torch.float99'"),
    ("dtype", None, r"row 4 \(int4.group\): dtype is null"),
    ("quant_type", "int9", r"row 4 \(int4.group\): unknown quant_type 'int9'; known are int8"),
    ("quant_type", None, r"row 4 \(int4.group\): quant_type is null"),
    ("quant_axis", None, r"row 4 \(int4.group\): quant_axis is null"),
    ("quant_axis", 7, r"row 4 \(int4.group\): quant_axis is 7"),
    ("group_size", -5, r"row 4 \(int4.group\): quant_axis is 0 and group_size -5"),
    ("group_size", None, r"row 4 \(int4.group\): group_size is null"),
    ("rotation", 3, r"row 4 \(int4.group\): rotation is 3"),
]


@pytest.mark.parametrize(("column", "value", "text"), EDITS, ids=[f"{c}-{str(v)[:12]}" for c, v, _ in EDITS])
def test_an_edited_cell_is_named(
    tmp_path: Path, suffix: str, cells: pa.Table, column: str, value: Any, text: str
) -> None:
    path = store(tmp_path / f"m.{suffix}", edited(cells, {column: value}))
    with pytest.raises(FormatError, match=r"m\.\w+: " + text):
        contents(path)


def test_the_unedited_table_is_good(tmp_path: Path, suffix: str, cells: pa.Table, v2_rows: list[Row]) -> None:
    assert len(contents(store(tmp_path / f"m.{suffix}", cells))) == len(v2_rows) + 1


def test_a_claim_of_too_many_elements_is_refused_at_opening(tmp_path: Path, suffix: str, cells: pa.Table) -> None:
    # All numbers agree with each other: only the bytes are missing.
    claims = {"shape": [2**20, 2**20, 2**18], "num_params": 2**58, "quant_type": "int8", "group_size": 0}
    path = store(tmp_path / f"m.{suffix}", edited(cells, claims))
    with pytest.raises(FormatError, match=r"column data holds \d+ bytes, but the shapes of its rows need 288230376151"):
        open_table(path)


def test_a_column_that_unpacks_to_more_than_its_shapes_need_is_not_unpacked(tmp_path: Path, cells: pa.Table) -> None:
    cells = edited(cells, {"data": b"\0" * (64 << 20)})
    pq.write_table(cells, tmp_path / "m.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "m.parquet").stat().st_size < 100_000
    before = pa.default_memory_pool().max_memory()
    with (
        open_table(tmp_path / "m.parquet") as table,
        pytest.raises(FormatError, match=r"row group 0, column data: unpacks to 67.* bytes, but its shapes need"),
    ):
        table.read(0)
    assert pa.default_memory_pool().max_memory() < max(before, 32 << 20) + (32 << 20)


@pytest.mark.parametrize("column", ["layer_name", "shape", "dtype", "data", "num_params", "scales", "group_size"])
def test_a_missing_column_is_named(tmp_path: Path, suffix: str, cells: pa.Table, column: str) -> None:
    path = store(tmp_path / f"m.{suffix}", cells.drop_columns([column]))
    with pytest.raises(FormatError, match=rf"m\.\w+: has no column {column}; it has "):
        open_table(path)


def test_added_columns_may_be_missing_and_unknown_ones_are_ignored(
    tmp_path: Path, suffix: str, cells: pa.Table
) -> None:
    wanted = contents(store(tmp_path / f"a.{suffix}", cells))
    fewer = cells.drop_columns(["rotation"]).append_column("extra", pa.array([{"a": 1}] * len(cells)))
    assert contents(store(tmp_path / f"b.{suffix}", fewer)) == wanted


@pytest.mark.parametrize(
    ("column", "values", "text"),
    [
        ("layer_name", pa.array([b"x"] * 16), "column 'layer_name' is binary; wanted a string"),
        ("shape", pa.array([3] * 16), "column 'shape' is int64; wanted a list of integers"),
        ("shape", pa.array([[1.0]] * 16), "wanted a list of integers"),
        ("data", pa.array(["x"] * 16), "column 'data' is string; wanted binary"),
        ("num_params", pa.array([1.0] * 16), "column 'num_params' is double; wanted an integer"),
        ("cosine", pa.array(["x"] * 16), "column 'cosine' is string; wanted floating"),
    ],
)
def test_a_column_of_another_type_is_named(
    tmp_path: Path, suffix: str, cells: pa.Table, column: str, values: pa.Array, text: str
) -> None:
    assert len(cells) == 16
    path = store(tmp_path / f"m.{suffix}", cells.set_column(cells.schema.names.index(column), column, values))
    with pytest.raises(FormatError, match=text):
        open_table(path)


def test_a_column_there_twice_is_named(tmp_path: Path, cells: pa.Table) -> None:
    path = store(tmp_path / "m.arrow", cells.append_column("data", cells["data"]))
    with pytest.raises(FormatError, match="column 'data' occurs more than once"):
        open_table(path)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    for content, text in (
        (b"", "m: is empty"),
        (b"hello world, hello", "not a Parquet or Arrow IPC file"),
        (b"PAR1", "damaged, or not a table"),
        (b"PAR1" + b"\xff" * 100 + b"PAR1", "damaged, or not a table"),
        (b"ARROW1\0\0" + b"\xff" * 100 + b"ARROW1", "damaged, or not a table"),
    ):
        (tmp_path / "m").write_bytes(content)
        with pytest.raises(FormatError, match=text):
            open_table(tmp_path / "m")


def test_metadata_that_is_wrong_is_named(tmp_path: Path, v1_rows: list[Row], v2_rows: list[Row]) -> None:
    path, version_1 = tmp_path / "m.parquet", tmp_path / "v1.parquet"
    write_table(path, v2_rows, version=2, aliases={"tied": "one"})
    write_table(version_1, v1_rows, version=1)
    table = pq.read_table(path)
    good = json.loads(table.schema.metadata[b"aq_jax"])

    def refuse(text: bytes, kind: type[AqError], message: str) -> None:
        pq.write_table(table.replace_schema_metadata({b"aq_jax": text}), tmp_path / "bad.parquet")
        with pytest.raises(kind, match=r"bad\.parquet: .*" + message):
            open_table(tmp_path / "bad.parquet")

    def changed(**entries: object) -> bytes:
        return json.dumps(good | entries).encode()

    refuse(b"{", FormatError, "not valid JSON")
    refuse(b"[" * 100_000, FormatError, "not valid JSON")
    refuse(b'{"version": NaN}', FormatError, "not valid JSON: NaN is not JSON")
    refuse(b"[]", FormatError, "has no version")
    refuse(changed(version="3.0"), FormatError, "format version '3.0' is unknown; .* use a newer aq_jax")
    refuse(changed(version="1.0"), FormatError, "says version 1.0, but its columns are V2")
    refuse(changed(rows="7"), FormatError, "must have 'rows', a JSON int")
    refuse(changed(aliases={"a": 1}), FormatError, "alias that is not a string")
    refuse(changed(aliases={"a": "nobody"}), FormatError, "alias 'a' leads to 'nobody', which is not stored")
    refuse(changed(aliases={"half": "one"}), FormatError, "alias 'half' is also the name of a stored tensor")
    refuse(changed(rows=15), IntegrityError, "holds 16 rows, but its metadata says 15")
    refuse(changed(config={"quant_type": "int8"}), IntegrityError, "metadata and row digests have digest")
    refuse(changed(aliases={"tied": "half"}), IntegrityError, "metadata and row digests have digest")
    refuse(changed(added=1), IntegrityError, "metadata and row digests have digest")


def test_rows_that_were_removed_reordered_or_edited_are_seen(tmp_path: Path, v2_rows: list[Row]) -> None:
    write_table(tmp_path / "m.parquet", v2_rows, version=2)
    table = pq.read_table(tmp_path / "m.parquet")

    def refuse(changed: pa.Table, message: str) -> None:
        pq.write_table(changed, tmp_path / "bad.parquet")
        with pytest.raises(IntegrityError, match=r"bad\.parquet: .*" + message):
            contents(tmp_path / "bad.parquet")

    refuse(table.slice(1), "rows were lost or added")
    refuse(table.take([1, 0, *range(2, 16)]), "have digest .*; wanted .*: the file was changed")
    refuse(table.drop_columns(["digest"]), r"row 0 \(embed.weight\): has no digest")
    refuse(edited(table, {"cosine": 0.999}, 3), "statistics of its rows have digest")
    refuse(edited(table, {"digest": b"\0" * 32}, 3), "metadata and row digests have digest")
    refuse(edited(table, {"shape": [8, 4]}), r"row 4 \(int4.group\): its bytes have digest \w{64}; wanted \w{64}")
    refuse(edited(table, {"data": b"\1" * 16}), r"row 4 \(int4.group\): its bytes have digest")
    refuse(edited(table, {"dtype": "torch.float16"}), r"row 4 \(int4.group\): its bytes have digest")


def test_verification_can_be_skipped(tmp_path: Path, v2_rows: list[Row]) -> None:
    write_table(tmp_path / "m.parquet", v2_rows, version=2)
    table = pq.read_table(tmp_path / "m.parquet")
    pq.write_table(edited(table, {"data": b"\1" * 16}), tmp_path / "bad.parquet")
    with open_table(tmp_path / "bad.parquet", verify=False) as bad:
        assert bad.read(4).data.tolist() == [1] * 16


@pytest.fixture
def written(tmp_path: Path, suffix: str, v2_rows: list[Row]) -> Path:
    path = tmp_path / f"m.{suffix}"
    write_table(path, v2_rows, version=2, config={"a": 1}, aliases={"tied": "one"})
    return path


def flip(path: Path, content: bytes, bit: int) -> None:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)


def test_every_flipped_bit_of_data_and_scales_is_an_error(written: Path, v2_rows: list[Row]) -> None:
    content = written.read_bytes()
    needles = [v2_rows[0].data.tobytes(), v2_rows[11].data.tobytes()]
    if written.suffix == ".arrow":  # elsewhere they are compressed
        needles.append(v2_rows[0].scales.tobytes())
    for needle in needles:
        start = content.index(needle)
        for byte in range(start, start + len(needle), 3):
            flip(written, content, byte * 8 + byte % 8)
            with pytest.raises(AqError, match=r"row \d+ \(.*\): (its bytes have digest|scales are)"):
                contents(written)


def test_page_checksums_are_checked_where_there_are_no_digests(tmp_path: Path, cells: pa.Table) -> None:
    path = tmp_path / "m.parquet"
    pq.write_table(cells, path, write_page_checksum=True, compression="none", use_dictionary=False)
    content = path.read_bytes()
    flip(path, content, content.index(cells["data"][0].as_py()) * 8)
    with open_table(path) as table, pytest.raises(FormatError, match=r"(?i)crc|checksum"):
        table.read(0)


def encodings() -> list[Callable[[pa.Table], pa.Table]]:
    def cast(kinds: dict[str, pa.DataType]) -> Callable[[pa.Table], pa.Table]:
        def apply(table: pa.Table) -> pa.Table:
            schema = pa.schema([pa.field(f.name, kinds.get(f.name, f.type)) for f in table.schema])
            return table.cast(schema)

        return apply

    text, heavy = ("layer_name", "dtype", "quant_type", "solver"), ("data", "scales", "zero_points")
    large = {name: pa.large_string() for name in text} | {name: pa.large_binary() for name in (*heavy, "digest")}
    views = {name: pa.string_view() for name in text} | {name: pa.binary_view() for name in heavy}
    words = {name: pa.dictionary(pa.int32(), pa.string()) for name in text}
    return [
        cast(large | {"shape": pa.large_list(pa.int64()), "group_size": pa.int64(), "num_params": pa.int32()}),
        cast(views),
        cast(words),
        lambda table: pa.concat_tables([table.slice(0, 3), table.slice(3, 1), table.slice(4)]),
    ]


@pytest.mark.parametrize("encode", encodings(), ids=["large", "views", "dictionaries", "chunks"])
def test_other_encodings_of_the_columns_mean_the_same(written: Path, encode: Callable[[pa.Table], pa.Table]) -> None:
    wanted = contents(written)[1:]
    if written.suffix == ".parquet":
        table = pq.read_table(written)
    else:
        with pa.ipc.open_file(written) as file:
            table = file.read_all()
    path = store(written.with_name("other" + written.suffix), encode(table.replace_schema_metadata(None)))
    assert contents(path)[1:] == wanted
