"""List what a folder on this machine holds, and which links in it are to be read."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_BLOBS, _SNAPSHOTS = "blobs", "snapshots"
"""The folders of a model in the cache of Hugging Face's hub: its files, and folders of links to them."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a folder: a file and its size, a folder, or something that is not to be read.

    A link counts as the file that it leads to, if that is in the folder or belongs to it in the hub's cache; as
    "outside" if it leads elsewhere, to a folder or nowhere. "other" is anything else, or not readable.
    """

    name: str
    kind: Literal["file", "folder", "outside", "other"]
    size: int = 0


def local_entries(root: Path, name: str) -> list[Entry]:
    """List the entries of a folder, or of one in it, by name; links may lead anywhere in the first."""
    with os.scandir(root / name) as found:
        return sorted((_entry(root, item) for item in found), key=lambda entry: entry.name)


def _entry(root: Path, item: os.DirEntry[str]) -> Entry:
    readable = os.access(item.path, os.R_OK)
    if item.is_symlink():
        size = _linked_size(root, Path(item.path))
        return Entry(item.name, "outside") if size is None else Entry(item.name, "file" if readable else "other", size)
    if item.is_dir():
        return Entry(item.name, "folder")
    return Entry(item.name, "file", item.stat().st_size) if item.is_file() and readable else Entry(item.name, "other")


def _linked_size(folder: Path, link: Path) -> int | None:
    """Return the size of the file that a link in a folder leads to; None unless the file belongs to the folder.

    The files in a folder belong to it and, to a folder MODEL/snapshots/REVISION of the hub's cache, those in
    MODEL/blobs, unless that is a link itself.
    """
    try:
        root, target = folder.resolve(strict=True), link.resolve(strict=True)
        found = target.stat()
    except (OSError, RuntimeError):  # the link leads nowhere, or to itself
        return None
    stored = root.parent.name == _SNAPSHOTS and target.parent == root.parent.parent / _BLOBS  # both without links
    own = stored or target.is_relative_to(root)
    return found.st_size if own and stat.S_ISREG(found.st_mode) else None
