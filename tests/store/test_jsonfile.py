"""JSON files that somebody else wrote: read, or refused by name, here and at URLs."""

from __future__ import annotations

from pathlib import Path

import pytest

from aq_jax.errors import FormatError
from aq_jax.store.folders import Folder
from aq_jax.store.jsonfile import parse_json, read_json

REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not a JSON file"),
    "cut short": (b'{"a": ', "not a JSON file"),
    "wrong utf-8": (b'{"a": "\xff"}', "not a JSON file"),
    "nested": (b"[" * 100_000, "not a JSON file"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "not a JSON file"),
    "a list": (b"[]", "holds list; wanted a JSON object"),
    "a number": (b"3", "holds int; wanted a JSON object"),
    "too long": (b'{"a": "' + b"b" * 1000 + b'"}', r"is 1009 bytes long; wanted a JSON object of at most 1000"),
}


@pytest.mark.parametrize("url", [False, True])
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_such_object_is_refused_by_name(tmp_path: Path, what: str, url: bool) -> None:
    content, message = REFUSED[what]
    (tmp_path / "c.json").write_bytes(content)
    folder = Folder(tmp_path.as_uri()) if url else tmp_path
    with pytest.raises(FormatError, match=rf"c\.json: {message}") as caught:
        read_json(folder, "c.json", dict, 1000 if what == "too long" else 200_000)
    assert len(str(caught.value)) < 500


def test_a_folder_is_no_file_and_what_is_not_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "c.json").mkdir()
    with pytest.raises(FormatError, match=r"c\.json: is not a file; wanted a JSON array"):
        read_json(tmp_path, "c.json", list)
    (tmp_path / "d.json").symlink_to(tmp_path / "nowhere")
    assert read_json(tmp_path, "d.json", list) is None
    assert read_json(tmp_path, "e.json", list) is None


def test_a_key_that_is_there_twice_is_refused_where_that_is_asked() -> None:
    text = b'{"a": {"b": 1, "b": 2}}'
    assert parse_json(text, "c.json", dict) == {"a": {"b": 2}}
    with pytest.raises(FormatError, match=r"c\.json: the header repeats a name"):
        parse_json(text, "c.json", dict, distinct=True)
