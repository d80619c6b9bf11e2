"""Manifests: what they name is what is read, or the folder is refused."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aq_jax.errors import FormatError, IntegrityError
from aq_jax.store import Row, decode, open_table, write_table
from aq_jax.store.manifest import MANIFEST, ShardEntry, compose_manifest, parse_manifest, shard_name
from aq_jax.store.verify import verify_table


def rows(*names: str) -> list[Row]:
    values = np.arange(6, dtype=np.float32)
    return [Row(name, (2, 3), "float32", (values + len(name)).view(np.uint8), 6) for name in names]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A table of three files, and beside it another table."""
    write(tmp_path, "a b", "c", "d e")
    write_table(tmp_path / "other.parquet", rows("other"), version=1)
    return tmp_path


def write(folder: Path, *parts: str) -> None:
    entries = []
    for index, part in enumerate(parts):
        path = folder / shard_name(index, len(parts))
        write_table(path, rows(*part.split()), version=1)
        with open_table(path) as table:
            assert table.metadata is not None
            entries.append(ShardEntry(path.name, path.stat().st_size, table.metadata.digest, table.names))
    (folder / MANIFEST).write_bytes(compose_manifest(entries, {"made": "here"}))


def test_a_folder_is_what_its_manifest_names(folder: Path) -> None:
    with open_table(folder) as table:
        assert table.names == ("a", "b", "c", "d", "e")
        assert decode([table.read(3)]).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_the_same_files_give_the_same_manifest(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    write(tmp_path / "again", "a b", "c", "d e")
    assert (tmp_path / "again" / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """The manifest with a change, and a digest that fits it: somebody meant it."""

    def apply(folder: Path) -> None:
        found = json.loads((folder / MANIFEST).read_bytes())
        change(found)
        from blake3 import blake3

        from aq_jax.store.digest import canonical_json

        rest = {key: value for key, value in found.items() if key != "digest"}
        found["digest"] = blake3(canonical_json(rest)).hexdigest()
        (folder / MANIFEST).write_text(json.dumps(found))

    return apply


def named(file: Any) -> Callable[[Path], None]:
    return rewritten(lambda found: found["shards"][1].update(file=file))


def swap(folder: Path) -> None:
    first, second = (folder / shard_name(i, 3) for i in (0, 2))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def link_out(folder: Path) -> None:
    file = folder / shard_name(1, 3)
    outside = folder.parent / f"{folder.name}-outside.parquet"
    write_table(outside, rows("x"), version=1)
    file.unlink()
    file.symlink_to(outside)


def loop(folder: Path) -> None:
    file = folder / shard_name(1, 3)
    file.unlink()
    file.symlink_to(file.name)


def dangling(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).symlink_to("nowhere")


def replace_by(text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / MANIFEST).write_bytes(text) and None


def edit(old: bytes, new: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        text = (folder / MANIFEST).read_bytes()
        assert old in text
        (folder / MANIFEST).write_bytes(text.replace(old, new, 1))

    return apply


CASES: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "up and out": (named("../other.parquet"), FormatError, r"shard 2: names the file '\.\./other.parquet'; wanted"),
    "absolute": (named("/etc/passwd.parquet"), FormatError, "names the file"),
    "a folder in between": (named("sub/other.parquet"), FormatError, "names the file"),
    "backslashes": (named("..\\other.parquet"), FormatError, "names the file"),
    "hidden": (named(".other.parquet"), FormatError, "names the file"),
    "control characters": (named("a\x1b[2J.parquet"), FormatError, r"names the file 'a\\x1b"),
    "a line break": (named("a\n.parquet"), FormatError, "names the file"),
    "another kind": (named("manifest.json"), FormatError, "names the file"),
    "very long": (named("a" * 300 + ".parquet"), FormatError, "names the file"),
    "a number": (named(7), FormatError, "file is '7'; wanted a JSON str"),
    "twice": (named("weights-00001-of-00003.parquet"), FormatError, "names 'weights-00001.*' more than once"),
    "not there": (named("weights-00009.parquet"), IntegrityError, "names weights-00009.parquet, which is missing"),
    "another table": (named("other.parquet"), IntegrityError, "its manifest says|its manifest names"),
    "a size that is not": (
        rewritten(lambda found: found["shards"][0].update(bytes=7)), IntegrityError, "its manifest says 7"),
    "a size of text": (rewritten(lambda found: found["shards"][0].update(bytes="7")), FormatError, "wanted a JSON int"),
    "other tensors": (
        rewritten(lambda found: found["shards"][0].update(tensors=["a"])), IntegrityError, "names other tensors"),
    "tensors that are no names": (
        rewritten(lambda found: found["shards"][0].update(tensors=[1])), FormatError, "a tensor that is not a string"),
    "a shard less": (rewritten(lambda found: found["shards"].clear()), FormatError, "names no files"),
    "no object": (rewritten(lambda found: found.update(shards=["x"])), FormatError, "is 'x'; wanted an object"),
    "another version": (rewritten(lambda found: found.update(version="9.0")), FormatError, "version '9.0' is unknown"),
    "another kind of file": (rewritten(lambda found: found.update(kind="hub")), FormatError, "not the manifest of a"),
    "edited": (edit(b'"made": "here"', b'"made": "else"'), IntegrityError, "it was changed"),
    "a shard removed by hand": (
        lambda folder: (folder / shard_name(1, 3)).unlink(), IntegrityError, "which is missing; fetch it"),
    "two shards swapped": (swap, IntegrityError, "its manifest says"),
    "a link to another table": (link_out, IntegrityError, "its manifest says"),
    "a link to itself": (loop, IntegrityError, "which is missing"),
    "long in bytes": (named("é" * 200 + ".parquet"), FormatError, "names the file"),
    "a link to nothing": (dangling, FormatError, "is not a file, or a broken link"),
    "too long": (lambda folder: os.truncate(folder / MANIFEST, 1 << 25), FormatError, "is 33554432 bytes long"),
    "no JSON": (replace_by(b"{"), FormatError, "not a JSON file"),
    "wrong utf-8": (replace_by(b'{"kind": "\xff"}'), FormatError, "not a JSON file"),
    "nothing": (replace_by(b""), FormatError, "not a JSON file"),
    "nested": (replace_by(b"[" * 100_000), FormatError, "not a JSON file"),
    "a list": (replace_by(b"[]"), FormatError, "not the manifest"),
    "digits": (replace_by(b'{"kind": ' + b"9" * 5000 + b"}"), FormatError, "not a JSON file"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_manifest_that_lies_is_refused(folder: Path, case: str) -> None:
    change, kind, text = CASES[case]
    change(folder)
    with pytest.raises(kind, match=text) as caught:
        open_table(folder)
    assert type(caught.value) is kind


@pytest.mark.slow
def test_many_files_are_compared_at_once() -> None:
    """Each with each would take a quarter of a minute, and a hostile manifest is a small file."""
    entries = [ShardEntry(shard_name(i, 30_000), 7, "0" * 64, ("a",)) for i in range(30_000)]
    text = compose_manifest(entries, {})
    start = time.process_time()
    assert parse_manifest(text, "") == tuple(entries)
    assert time.process_time() - start < 3
    with pytest.raises(FormatError, match=r"would be .* bytes long"):
        compose_manifest(entries * 4, {})


def test_verify_does_not_praise_what_is_another_tables(folder: Path) -> None:
    first = folder / shard_name(0, 3)
    write_table(folder / "s.parquet", [replace(row, data=row.data[::-1].copy()) for row in rows("a", "b")], version=1)
    assert (folder / "s.parquet").stat().st_size == first.stat().st_size
    os.replace(folder / "s.parquet", first)
    (folder / shard_name(1, 3)).unlink()
    verdict = verify_table(folder)
    assert verdict.good == ("d", "e")
    assert verdict.rows == 2
    assert set(verdict.damaged) == {"a", "b", "c"}
    assert any("it belongs to another" in error for error in verdict.errors)
    assert any("is missing, though the manifest names it" in error for error in verdict.errors)


def test_any_flipped_bit_of_a_manifest_is_an_error(folder: Path) -> None:
    text = (folder / MANIFEST).read_bytes()
    where, wanted = str(folder), parse_manifest(text, "")
    silent = []
    for position in range(0, len(text) * 8, 3):
        changed = bytearray(text)
        changed[position // 8] ^= 1 << position % 8
        try:
            found = parse_manifest(bytes(changed), where)
        except (FormatError, IntegrityError):
            continue
        if found != wanted:  # a space that has become another
            silent.append(position)
    assert not silent


def test_links_to_the_right_files_are_followed(folder: Path) -> None:
    """As caches of downloaded files have them: what they lead to is known by its digest."""
    file = folder / shard_name(1, 3)
    outside = folder.parent / f"{folder.name}-blob"
    os.replace(file, outside)
    file.symlink_to(outside)
    with open_table(folder) as table:
        assert len(table.names) == 5


def test_numbered_files_without_a_manifest_must_all_be_there(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / "other.parquet").unlink()
    with open_table(folder) as table:
        assert len(table.names) == 5
    (folder / shard_name(2, 3)).unlink()
    with pytest.raises(FormatError, match=r"lacks weights-00003-of-00003\.parquet, and 0 others; a conversion"):
        open_table(folder)
