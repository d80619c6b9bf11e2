"""DuckDB and Polars read the tables, and what they write is read here, digests and all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import duckdb
import polars as pl
import pytest

from aq_jax.errors import IntegrityError
from aq_jax.store import Row, open_table, write_table

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def table(tmp_path: Path, v2_rows: list[Row]) -> Path:
    write_table(tmp_path / "m.parquet", v2_rows, version=2)
    return tmp_path / "m.parquet"


def assert_same_rows(path: Path, wanted: Path) -> None:
    with open_table(path) as found, open_table(wanted) as table:
        assert found.metadata is None
        for a, b in zip(found.rows(), table.rows(), strict=True):
            assert a.digest == b.digest
            assert (a.layer_name, a.shape, a.solver, a.cosine) == (b.layer_name, b.shape, b.solver, b.cosine)
            assert a.data.tobytes() == b.data.tobytes()


def test_sql_tells_which_layers_fit_worst(table: Path) -> None:
    query = f"select layer_name from '{table}' where cosine is not null order by cosine, layer_name limit 5"
    with duckdb.connect() as connection:
        worst = connection.sql(query).fetchall()
    assert [name for (name,) in worst] == ["int2.group", "int2.tensor", "int3.channel", "int3.group", "int4.channel"]


def test_a_table_rewritten_by_duckdb_keeps_its_digests(table: Path) -> None:
    copy = table.with_name("duckdb.parquet")
    with duckdb.connect() as connection:
        connection.sql(f"copy (select * from '{table}') to '{copy}' (format parquet)")
        keys = connection.sql(f"select decode(key) from parquet_kv_metadata('{table}')").fetchall()
    assert ("aq_jax",) in keys
    assert_same_rows(copy, table)


@pytest.mark.parametrize("container", ["parquet", "arrow"])
def test_a_table_rewritten_by_polars_keeps_its_digests(table: Path, container: str) -> None:
    copy = table.with_name(f"polars.{container}")
    frame = pl.read_parquet(table)
    if container == "parquet":
        frame.write_parquet(copy)
    else:
        frame.write_ipc(copy)
    assert_same_rows(copy, table)


def test_an_edit_with_polars_is_seen(table: Path) -> None:
    copy = table.with_name("polars.parquet")
    pl.read_parquet(table).with_columns(group_size=pl.col("group_size") * 0).write_parquet(copy)
    with pytest.raises((IntegrityError, ValueError), match="row"), open_table(copy) as edited:
        list(edited.rows())
