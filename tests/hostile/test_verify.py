"""What `aq-jax verify` says of damaged tables: what is wrong, where, and what is still good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hostile.containers import Ipc, Parquet, patched
from hostile.tables import GOLDEN, edited, stored, with_ipc_metadata

from aq_jax.store import Row, open_table, write_table
from aq_jax.store.verify import Verdict, verify_table

with open_table(GOLDEN / "v2.parquet") as _table:
    NAMES, ROWS = _table.names, list(_table.rows())


def judged(path: Path, content: bytes) -> Verdict:
    path.write_bytes(content)
    found = verify_table(path)
    assert all(str(path) in problem.problem for problem in found.problems)
    assert all(problem.file == str(path) for problem in found.problems)
    return found


def but(*names: str) -> tuple[str, ...]:
    return tuple(name for name in NAMES if name not in names)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("stem", ["v1", "v2", "rotated"])
def test_good_files_are_good(stem: str, suffix: str) -> None:
    name = f"{stem}.{suffix}"
    with open_table(GOLDEN / name) as table:
        assert verify_table(GOLDEN / name) == Verdict(str(GOLDEN / name), len(table.infos), 0, table.names)


def test_a_damaged_tensor_is_named_with_its_column_and_place(tmp_path: Path) -> None:
    content = (GOLDEN / "v2.parquet").read_bytes()
    start = content.index(ROWS[0].data.tobytes())
    found = judged(tmp_path / "m.parquet", patched(content, start, b"\x7f"))
    assert found.good == but("embed.weight")
    (problem,) = found.problems
    assert (problem.row, problem.name) == (0, "embed.weight")
    chunk = Parquet(content).chunk("data")
    place = f"column data is damaged, within bytes {chunk[9]} to {chunk[9] + chunk[7]} of the file"
    assert "row 0 (embed.weight): its bytes have digest" in problem.problem
    assert place in problem.problem
    content = (GOLDEN / "v2.arrow").read_bytes()
    message = Ipc(content).messages[1]
    damaged = ("embed.weight", "int3.group")
    for row in (0, 5):
        content = patched(content, content.index(ROWS[row].data.tobytes()), b"\x7f")
    found = judged(tmp_path / "m.arrow", content)
    assert not found.ok
    assert (found.good, found.damaged) == (but(*damaged), damaged)
    assert (found.rows, found.unchecked) == (len(NAMES) - 2, 0)
    assert [(bad.row, bad.name) for bad in found.bad] == [(0, "embed.weight"), (5, "int3.group")]
    assert found.errors == tuple(bad.problem for bad in found.bad)
    assert f"something in bytes {message.start} to {message.end} of the file was damaged" in found.errors[0]


def test_a_column_that_cannot_be_read_takes_its_rows_with_it(tmp_path: Path) -> None:
    content = (GOLDEN / "v2.parquet").read_bytes()
    parquet = Parquet(content)
    _, body, end, _ = parquet.pages(parquet.chunk("scales"))[0]
    found = judged(tmp_path / "m.parquet", patched(content, body, bytes(end - body)))
    assert found.good == ()
    assert {(problem.row, problem.name) for problem in found.problems} == set(enumerate(NAMES))
    assert len({problem.problem for problem in found.problems}) == 1
    assert "column scales of row group 0, bytes" in found.problems[0].problem


def test_statistics_that_cannot_be_read_take_no_tensor_with_them(tmp_path: Path) -> None:
    content = (GOLDEN / "v2.parquet").read_bytes()
    parquet = Parquet(content)
    _, body, _, _ = parquet.pages(parquet.chunk("cosine"))[0]
    found = judged(tmp_path / "m.parquet", patched(content, body + 12, b"\xff\xff"))
    assert found.good == NAMES
    assert "column cosine of row group 0, bytes" in found.problems[0].problem


def test_names_that_cannot_be_read_leave_nothing(tmp_path: Path) -> None:
    content = (GOLDEN / "v2.parquet").read_bytes()
    _, _, end, _ = Parquet(content).pages(Parquet(content).chunk("layer_name"))[0]
    found = judged(tmp_path / "m.parquet", patched(content, end - 1, b"\xff"))
    assert found.good == ()
    assert [problem.row for problem in found.problems] == [None, *range(len(NAMES))]
    assert "cannot be verified without its layer_name" in found.problems[1].problem


EDITED: dict[str, tuple[dict[str, Any], str]] = {
    "data": ({"data": bytes(15)}, r"row 4 (int4.group): data holds 15 bytes"),
    "shape": ({"shape": [4, -8]}, r"row 4 (int4.group): shape [4, -8] has an axis outside"),
    "huge": ({"shape": [2**20, 2**20, 2**18], "num_params": 2**58, "group_size": 16}, "row 4 (int4.group): "),
    "name": ({"layer_name": None}, "row 4 (None): layer_name is null"),
    "dtype": ({"dtype": "torch.float99"}, "row 4 (int4.group): unknown dtype"),
    "null": ({"scales": None}, "row 4 (int4.group): scales is null"),
}


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("what", EDITED)
def test_a_row_that_breaks_a_rule_takes_no_other_with_it(tmp_path: Path, suffix: str, what: str) -> None:
    changes, text = EDITED[what]
    table = edited(pq.read_table(GOLDEN / "v2.parquet").replace_schema_metadata(None), changes)
    found = judged(tmp_path / f"m.{suffix}", stored(table, suffix))
    assert found.good == but("int4.group")
    assert found.rows == len(NAMES) - 1
    assert [(problem.row, text in problem.problem) for problem in found.problems] == [(4, True)]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_what_is_wrong_with_the_metadata_is_no_fault_of_the_rows(tmp_path: Path, suffix: str) -> None:
    table = pq.read_table(GOLDEN / "v2.parquet")
    good = json.loads(table.schema.metadata[b"aq_jax"])

    def said(rows: Any = table, **entries: object) -> str:
        text = json.dumps(good | entries).encode()
        if suffix == "parquet":
            content = stored(rows.replace_schema_metadata({b"aq_jax": text}), suffix)
        else:
            content = with_ipc_metadata(rows, text)
        found = judged(tmp_path / f"m.{suffix}", content)
        assert found.good == tuple(rows["layer_name"].to_pylist())
        assert {(problem.row, problem.name) for problem in found.problems} == {(None, None)}
        return "\n".join(problem.problem for problem in found.problems)

    assert "metadata and row digests have digest" in said(digest="0" * 64)
    assert "metadata and row digests have digest" in said(config={})
    assert "statistics of its rows have digest" in said(edited(table, {"cosine": 0.5}))
    assert "says version 1.0, but its columns are V2" in said(version="1.0")
    assert "holds 15 rows, but its metadata says 16: rows were lost or added" in said(table.slice(1))
    assert "metadata and row digests have digest" in said(table.take([1, 0, *range(2, 16)]))
    content = (GOLDEN / f"v2.{suffix}").read_bytes()
    key = content.rindex(b"aq_jax", 0, content.rindex(b'{"aliases"') if suffix == "parquet" else None)
    found = judged(tmp_path / f"m.{suffix}", patched(content, key, b"b"))
    assert (found.good, len(found.problems)) == (NAMES, 1)
    assert "the key of its aq_jax metadata is damaged" in found.problems[0].problem


def test_a_damaged_record_batch_hides_no_other(tmp_path: Path) -> None:
    write_table(tmp_path / "m.arrow", [big(f"w{index}", index) for index in range(3)], version=1)
    content = (tmp_path / "m.arrow").read_bytes()
    messages = Ipc(content).messages
    assert len(messages) == 5  # the schema, three tensors, the metadata
    fields = content.index((1).to_bytes(8, "little"), messages[2].metadata)  # how many rows its first column has
    found = judged(tmp_path / "m.arrow", patched(content, fields, b"\x02"))
    assert found.good == ("w0", "w2")
    assert found.problems[0].row in (None, 1)


def big(name: str, value: int) -> Row:
    data = np.full(5 << 20, value, np.uint8)
    return Row(name, data.shape, "uint8", data, data.size)


def test_doubled_tensors_and_missing_pieces_are_not_whole(tmp_path: Path) -> None:
    table = pq.read_table(GOLDEN / "v2.parquet").replace_schema_metadata(None)
    found = judged(tmp_path / "m.parquet", stored(table.take([0, 1, 2, 0]), "parquet"))
    assert found.good == NAMES[1:3]
    assert "row 3 (embed.weight): the name already exists in row 0 of" in found.problems[0].problem
    pieces = pq.read_table(GOLDEN / "rotated.parquet").replace_schema_metadata(None)
    count = len(pieces)
    found = judged(tmp_path / "m.parquet", stored(pieces.slice(0, count - 1), "parquet"))
    assert "int3h.pieces" not in found.good
    assert len(found.good) == count - 2
    assert "int3h.pieces still lacks 40 of 64 elements" in found.problems[0].problem


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_of_a_damaged_footer_it_says_why_nothing_can_be_read(tmp_path: Path, suffix: str) -> None:
    content = (GOLDEN / f"v2.{suffix}").read_bytes()
    start = (Parquet if suffix == "parquet" else Ipc)(content).footer_start
    patch = patched(content, start, b"\xff" * 22)
    cut = "its end is missing"
    for damaged, why in ((content[:-1], cut), (content[:100], cut), (patch, "not a table"), (b"", "is empty")):
        found = judged(tmp_path / f"m.{suffix}", damaged)
        (problem,) = found.problems
        assert (found.good, found.bad, found.rows) == ((), (), 0)
        assert why in problem.problem
        assert problem.problem.endswith("; nothing of it can be read")


def test_each_file_of_a_folder_is_judged(tmp_path: Path) -> None:
    for name, source in (("a.parquet", "v1.parquet"), ("b.arrow", "rotated.arrow"), ("c.parquet", "v2.parquet")):
        (tmp_path / name).write_bytes((GOLDEN / source).read_bytes())
    (tmp_path / "b.arrow").write_bytes((tmp_path / "b.arrow").read_bytes()[:-9])
    content = (tmp_path / "c.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(patched(content, content.index(ROWS[11].data.tobytes()), b"\xff"))
    found = verify_table(tmp_path)
    with open_table(GOLDEN / "v1.parquet") as table:
        first = [name for name in table.names if name != "embed.weight"]  # which is in c too
    assert found.good == (*first, *but("embed.weight", NAMES[11]))
    assert [Path(problem.file).name for problem in found.problems] == ["b.arrow", "c.parquet", "c.parquet"]


def test_a_file_of_another_writer_has_rows_that_cannot_be_checked() -> None:
    found = verify_table(GOLDEN / "existing" / "v1.parquet")
    assert found.problems == ()
    assert found.unchecked == found.rows > 0


def test_what_is_not_there_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        verify_table(tmp_path / "m.parquet")
