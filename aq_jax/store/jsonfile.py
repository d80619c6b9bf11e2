"""Read JSON files of other writers: of limited size, and of the expected kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from aq_jax.errors import FormatError
from aq_jax.store.folders import Folder

J = TypeVar("J")
_NAMES: dict[type, str] = {dict: "object", list: "array"}
_MAX_BYTES = 16 << 20
"""The most bytes of a file: each becomes up to fifteen of memory."""


def parse_json(text: bytes, where: str, kind: type[J], *, distinct: bool = False) -> J:
    """Parse the text of a JSON file that holds an object (dict) or an array (list), or anything (object).

    Args:
        text: The file's text.
        where: The file's name, for errors.
        kind: The expected type.
        distinct: Whether a repeated key is refused; otherwise the last one counts.

    Raises:
        FormatError: for text that is not JSON, or nested too deep; for another type, and for a repeated key.

    >>> parse_json(b'{"a": [1]}', "a.json", dict)
    {'a': [1]}
    """

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise FormatError(f"{where}: the header repeats a name; fetch the file again")
        return found

    try:
        found = json.loads(text, object_pairs_hook=checked if distinct else None)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not a JSON file: {str(error)[:200]}") from None
    if not isinstance(found, kind):
        raise FormatError(f"{where}: holds {type(found).__name__}; wanted a JSON {_NAMES[kind]}")
    return found


def read_json(folder: Folder | Path, name: str, kind: type[J], most: int = _MAX_BYTES) -> J | None:
    """Read a JSON file of a folder, here or at a URL; None if there is no such file.

    Args:
        folder: The folder that holds the file.
        name: The file's name.
        kind: The expected type, see `parse_json`.
        most: The most bytes that it may have.

    Raises:
        FormatError: as for `parse_json`, and for a file that is too large, or not a file.
        OSError: if it cannot be read.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.json").write_text("[1, 2]")
    >>> read_json(folder, "a.json", list), read_json(folder, "b.json", list)
    ([1, 2], None)
    """
    folder = Folder(folder) if isinstance(folder, Path) else folder
    state, where = folder.state(name), folder.join(name)
    if state is None:
        if folder.holds(name):
            raise FormatError(f"{where}: is not a file; wanted a JSON {_NAMES[kind]}")
        return None
    if state.size > most:
        raise FormatError(f"{where}: is {state.size} bytes long; wanted a JSON {_NAMES[kind]} of at most {most}")
    return parse_json(folder.read(name), where, kind)
