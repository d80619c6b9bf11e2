"""What is written is read, in both containers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from golden import make

from aq_jax.errors import FormatError
from aq_jax.store import V1, V2, Row, RowInfo, decode, open_table, pieces, row_digest, write_table
from aq_jax.store import writer as writer_module

if TYPE_CHECKING:
    from pathlib import Path

    from aq_jax.store.schema import Version


def equal(a: Row, b: Row) -> bool:
    """Equal in all cells but the digest, which the writer adds."""
    for f in fields(Row):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if f.name != "digest" and not (x.tobytes() == y.tobytes() if isinstance(x, np.ndarray) else x == y):
            return False
    return True


@pytest.mark.parametrize("version", [1, 2])
def test_round_trip(tmp_path: Path, suffix: str, version: Version, v1_rows: list[Row], v2_rows: list[Row]) -> None:
    rows, path = (v1_rows, v2_rows)[version - 1], tmp_path / f"m.{suffix}"
    config = {"a": [1, 2.5, None, "é"]}
    write_table(path, rows, version=version, config=config, aliases={"tied": "embed.weight"})
    with open_table(path) as table:
        assert (table.version, len(table.infos), table.path) == (version, len(rows), path)
        assert table.names == tuple(row.layer_name for row in rows)
        assert table.aliases == {"tied": "embed.weight"}
        assert table.pieces("tied") == table.pieces("embed.weight")
        assert [row.layer_name for row in table.read_tensor("tied")] == ["embed.weight"]
        assert table.metadata is not None
        assert table.metadata.config == config
        assert table.metadata.version == f"{version}.0"
        for info, read, row in zip(table.infos, table.rows(), rows, strict=True):
            assert equal(read, row)
            assert read.digest == info.digest == row_digest(row)
            assert not read.data.flags.writeable
            assert all(getattr(info, f.name) == getattr(read, f.name) for f in fields(RowInfo) if hasattr(read, f.name))
            assert table.pieces(row.layer_name) == [info]


def test_columns_are_those_of_the_format(tmp_path: Path, v1_rows: list[Row], v2_rows: list[Row]) -> None:
    tables: list[tuple[list[Row], pa.Schema, Version]] = [(v1_rows, V1, 1), (v2_rows, V2, 2)]
    for rows, schema, version in tables:
        write_table(tmp_path / "m.parquet", rows, version=version)
        write_table(tmp_path / "m.arrow", rows, version=version)
        assert pq.read_schema(tmp_path / "m.parquet").remove_metadata() == schema
        with pa.ipc.open_file(tmp_path / "m.arrow") as file:
            assert file.schema == schema
    footer = pq.read_metadata(tmp_path / "m.parquet").row_group(0)
    chunks = [footer.column(index) for index in range(footer.num_columns)]
    assert {c.path_in_schema for c in chunks if c.compression == "ZSTD"} == {"scales", "zero_points"}
    assert not any(c.has_dictionary_page or c.is_stats_set for c in chunks)


def test_rewriting_gives_the_same_bytes(tmp_path: Path, suffix: str, v2_rows: list[Row]) -> None:
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    write_table(first, v2_rows, version=2, config={"b": 1, "a": 2}, aliases={"y": "one", "x": "one"})
    with open_table(first) as table:
        assert table.metadata is not None
        write_table(second, table.rows(), version=2, config=table.metadata.config, aliases=table.aliases)
    assert first.read_bytes() == second.read_bytes()


def test_zstd_is_smaller_and_means_the_same(tmp_path: Path) -> None:
    row = Row("w", (1000,), "float32", np.zeros(4000, np.uint8), 1000, "none")
    for compression in ("none", "zstd"):
        write_table(tmp_path / f"{compression}.parquet", [row], version=2, compression=compression)
    assert (tmp_path / "zstd.parquet").stat().st_size < (tmp_path / "none.parquet").stat().st_size - 3000
    with open_table(tmp_path / "zstd.parquet") as table:
        assert equal(table.read(0), row)
    with pytest.raises(FormatError, match="Arrow IPC tables are not compressed"):
        write_table(tmp_path / "m.arrow", [row], version=2, compression="zstd")


def test_a_tensor_in_pieces_is_one_tensor(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m.{suffix}"
    rows: list[Row] = []
    for whole in (make.coded("q", (12, 20), "int3", 0, 16), make.coded("c", (24, 5), "int2", 0, 0)):
        length = whole.group_size or 5
        cuts = pieces(whole.shape, "float32", whole.quant_type, 0, whole.group_size, limit=180)
        assert len(cuts) > 2
        for start, stop in cuts:
            group = slice(start // length, -(-stop // length))
            data = whole.data[start * whole.bits // 8 : -(-stop * whole.bits // 8)]
            part = {"data": data, "scales": whole.scales[group], "zero_points": whole.zero_points[group]}
            rows.append(replace(whole, **part, num_params=stop - start))
        rows.append(replace(whole, layer_name=whole.layer_name + ".whole"))
    write_table(path, rows, version=2)
    with open_table(path) as table:
        tensors = {name: decode(table.read_tensor(name)) for name in table.names}
    for name in ("q", "c"):
        assert (tensors[name] == tensors[name + ".whole"]).all()


def test_row_groups_hold_whole_rows_up_to_a_size(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "GROUP_BYTES", 1000)
    sizes = (400, 600, 1, 1500, 300, 300, 300, 300)
    rows = [Row(f"r{i}", (n,), "uint8", np.full(n, i, np.uint8), n, "none") for i, n in enumerate(sizes)]
    path = tmp_path / f"m.{suffix}"
    write_table(path, rows, version=2)
    if suffix == "parquet":
        footer = pq.read_metadata(path)
        groups = [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
    else:
        with pa.ipc.open_file(path) as file:
            groups = [file.get_batch(index).num_rows for index in range(file.num_record_batches - 1)]
    assert groups == [2, 1, 1, 3, 1]
    with open_table(path) as table:
        for position in (7, 0, 3, 1, 6, 2, 4, 5):
            assert equal(table.read(position), rows[position])
        assert sum(info.disk_bytes for info in table.infos) == pytest.approx(sum(sizes), rel=0.5)


def test_the_callers_arrays_may_change_after_a_row_is_written(tmp_path: Path, suffix: str) -> None:
    data = np.ones(8, np.uint8)
    with writer_module.TableWriter(tmp_path / f"m.{suffix}", version=1) as table:
        for name in ("a", "b"):
            table.write(Row(name, (8,), "uint8", data, 8))
            data += 1
    with open_table(tmp_path / f"m.{suffix}") as read:
        assert [row.data[0] for row in read.rows()] == [1, 2]


def test_an_empty_table(tmp_path: Path, suffix: str) -> None:
    write_table(tmp_path / f"m.{suffix}", [], version=2)
    with open_table(tmp_path / f"m.{suffix}") as table:
        assert (table.infos, table.names, table.version) == ((), (), 2)


def test_the_container_is_told_by_its_bytes(tmp_path: Path, v1_rows: list[Row]) -> None:
    write_table(tmp_path / "m.parquet", v1_rows, version=1)
    (tmp_path / "m.parquet").rename(tmp_path / "m.arrow")
    with open_table(tmp_path / "m.arrow") as table:
        assert len(list(table.rows())) == len(v1_rows)


def test_a_folder_of_shards_is_one_table(tmp_path: Path, v2_rows: list[Row]) -> None:
    write_table(tmp_path / "a.parquet", v2_rows[:4], version=2, aliases={"tied": "embed.weight"})
    write_table(tmp_path / "b.arrow", v2_rows[4:], version=2)
    (tmp_path / "notes.txt").write_text("not a table")
    with open_table(tmp_path) as table:
        assert [info.position for info in table.infos] == list(range(len(v2_rows)))
        assert all(equal(a, b) for a, b in zip(table.rows(), v2_rows, strict=True))
        assert table.aliases == {"tied": "embed.weight"}
    write_table(tmp_path / "c.parquet", v2_rows[2:3], version=2)
    with pytest.raises(FormatError, match=r"c\.parquet: row 0 \(int8\.group\): the name already exists"):
        open_table(tmp_path)


def test_a_folder_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"holds no \.parquet or \.arrow file"):
        open_table(tmp_path)


def test_a_closed_reader_says_so_and_its_arrays_live_on(tmp_path: Path, suffix: str, v2_rows: list[Row]) -> None:
    path = tmp_path / f"m.{suffix}"
    write_table(path, v2_rows, version=2)
    with open_table(path) as table:
        row = table.read(0)
    uses = [lambda: table.read(0), lambda: list(table.rows()), table.verify_table, lambda: table.pieces("one")]
    for use in [*uses, table.__enter__]:
        with pytest.raises(ValueError, match=r"m\.\w+ is closed"):
            use()
    table.close()
    path.unlink()
    assert equal(row, v2_rows[0])


def test_positions_and_names_that_are_not_there(tmp_path: Path, v1_rows: list[Row]) -> None:
    write_table(tmp_path / "m.parquet", v1_rows, version=1)
    with open_table(tmp_path / "m.parquet") as table:
        for position in (-1, len(v1_rows)):
            with pytest.raises(IndexError, match="and no row"):
                table.read(position)
        with pytest.raises(KeyError, match=r"m\.parquet: no layer 'nobody'; the nearest is"):
            table.pieces("nobody")
    with pytest.raises(FileNotFoundError):
        open_table(tmp_path / "other.parquet")


def test_the_store_imports_no_jax_and_no_torch() -> None:
    code = "import sys, aq_jax.store; print([m for m in ('jax', 'torch', 'flax', 'polars') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
