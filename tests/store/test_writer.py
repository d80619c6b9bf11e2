"""Whatever is wrong with what is written, the file is the old one or the whole new one (tests/test_crash.py kills)."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from aq_jax.errors import FormatError
from aq_jax.store import Row, TableWriter, write_table, writer
from aq_jax.store.files import EarlySync

if TYPE_CHECKING:
    from pathlib import Path


def row(name: str, fill: int, count: int = 8) -> Row:
    return Row(name, (count,), "uint8", np.full(count, fill, np.uint8), count)


def test_missing_folders_are_made(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "a" / "b" / f"m.{suffix}"
    write_table(path, [row("r", 1)], version=1)
    assert os.listdir(path.parent) == [path.name]


def test_targets_that_cannot_be_are_named(tmp_path: Path) -> None:
    for name in ("m.safetensors", "m"):
        with pytest.raises(FormatError, match=r"name ends in \.parquet or \.arrow"):
            TableWriter(tmp_path / name, version=1)
    (tmp_path / "d.parquet").mkdir()
    with pytest.raises(FormatError, match=r"d\.parquet: is a folder"):
        TableWriter(tmp_path / "d.parquet", version=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_table(tmp_path / "file" / "m.parquet", [], version=1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, suffix: str, error: type[BaseException]
) -> None:
    path = tmp_path / f"m.{suffix}"
    for old in (None, b"old"):
        if old:
            path.write_bytes(old)
        with pytest.raises(error), TableWriter(path, version=1) as table:  # noqa: PT012
            table.write(row("big", 1, 9 << 20))
            table.write(row("small", 1))
            raise error
        assert os.listdir(tmp_path) == ([path.name] if old else [])
        assert not old or path.read_bytes() == old


def test_a_table_that_breaks_a_rule_at_its_end_is_not_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m.{suffix}"
    unfinished = Row("p", (16,), "uint8", np.zeros(8, np.uint8), 8)
    with pytest.raises(FormatError, match="end of the table: p still lacks 8 of 16 elements"):
        write_table(path, [unfinished], version=1)
    with pytest.raises(FormatError, match="alias 'a' leads to 'b', which is not stored"):
        write_table(path, [row("r", 1)], version=1, aliases={"a": "b"})
    with pytest.raises(FormatError, match="config cannot be written as JSON"):
        write_table(path, [row("r", 1)], version=1, config={"a": object()})
    with pytest.raises(FormatError, match="config cannot be written as JSON"):
        write_table(path, [row("r", 1)], version=1, config={"a": float("nan")})
    assert os.listdir(tmp_path) == []


def test_rows_are_checked_and_named(tmp_path: Path, v2_rows: list[Row]) -> None:
    path = tmp_path / "m.parquet"
    short = Row("r", (9,), "uint8", np.zeros(8, np.uint8), 9)
    with pytest.raises(FormatError, match=r"m\.parquet: row 0 \(r\): data holds 8 bytes, shape \[9\] uint8 needs 9"):
        write_table(path, [short], version=1)
    with pytest.raises(FormatError, match=r"m\.parquet: row 1 \(r\): the name already exists"):
        write_table(path, [row("r", 1), row("r", 2)], version=1)
    with pytest.raises(FormatError, match=r"row 0 \(embed.weight\): a V1 table holds no int8 rows; write version 2"):
        write_table(path, v2_rows, version=1)
    with pytest.raises(FormatError, match=r"row 0 \(r\): quant_type None cannot be written; a V2 table has int8"):
        write_table(path, [row("r", 1)], version=2)
    with pytest.raises(FormatError, match="alias 'a' already leads to 'r'"), TableWriter(path, version=1) as table:  # noqa: PT012
        table.write(row("r", 1))
        table.alias("a", "r")
        table.alias("a", "s")
    assert os.listdir(tmp_path) == []


def test_a_value_over_two_gigabytes_is_refused_before_it_is_written(tmp_path: Path) -> None:
    count = 2**31
    data = np.broadcast_to(np.zeros(1, np.uint8), (count,))  # takes no memory
    with pytest.raises(FormatError, match="data holds 2147483648 bytes, one value may hold 2147483647; store pieces"):
        write_table(tmp_path / "m.parquet", [Row("r", (2, count // 2), "uint8", data, count)], version=1)


def test_a_writer_is_used_in_a_with_block(tmp_path: Path) -> None:
    table = TableWriter(tmp_path / "m.parquet", version=1)
    for call in (lambda: table.write(row("r", 1)), table.flush):
        with pytest.raises(ValueError, match=r"m\.parquet: the table is not open"):
            call()
    assert os.listdir(tmp_path) == []


def test_leftovers_of_dead_writers_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = tmp_path / f".m.parquet.{dead.pid}.0123abcd.tmp"
    kept = [
        tmp_path / f".m.parquet.{os.getppid()}.0123abcd.tmp",
        tmp_path / f".other.parquet.{dead.pid}.0123abcd.tmp",
        tmp_path / f".m.parquet.{dead.pid}.tmp",
    ]
    for file in [gone, *kept]:
        file.write_bytes(b"")
    write_table(path, [row("r", 1)], version=1)
    assert not gone.exists()
    assert all(file.exists() for file in kept)


@pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="os.fdatasync is not everywhere")
def test_what_is_written_during_a_sync_is_synced_once_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, begun, goes_on, seen = tmp_path / "file", threading.Event(), threading.Event(), []

    def sync(descriptor: int) -> None:
        seen.append(os.fstat(descriptor).st_size)
        begun.set()
        assert goes_on.wait(60)

    monkeypatch.setattr(os, "fdatasync", sync)
    with path.open("wb", 0) as file, EarlySync(path) as early:
        for _ in range(4):
            file.write(b"x")
            early.start()
            assert begun.wait(60)
        goes_on.set()
    assert seen == [1, 4]


@pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="os.fdatasync is not everywhere")
@pytest.mark.parametrize("failing", [1, 2])
def test_a_disk_that_fails_while_a_table_is_written_is_reported(
    tmp_path: Path, v2_rows: list[Row], monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The system says so to one of those who flush the file, and once."""
    calls, large = [], replace(v2_rows[0], digest=None)

    def fail(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    monkeypatch.setattr(writer, "GROUP_BYTES", 1)  # each row is a group

    def write() -> None:
        with TableWriter(tmp_path / "m.parquet", version=2) as table:
            for i in range(2):
                table.write(replace(large, layer_name=f"w{i}"))
                table._sync._thread.submit(int).result()  # until the flush has run

    with pytest.raises(OSError, match="Input/output error"):
        write()
    assert len(calls) >= failing
    assert not list(tmp_path.iterdir())
