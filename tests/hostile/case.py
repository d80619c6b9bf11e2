"""One hostile file or folder, and what may come of it."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Kind = Literal["table", "checkpoint", "quantized", "config", "verify", "gguf"]
Expect = Literal["refused", "either", "same", "any"]


@dataclass(frozen=True)
class Case:
    """Files to read.

    Args:
        name: for the report.
        files: content by path.
        expect: "refused"; "either" that or the same result as the good file's; "same" as that; "any", which still
            must be no crash, no other error, and no waste of time and memory: where there are no digests.
        kind: of reader.
        opens: which of the files, or "." for the folder.
        good: the file or folder that it was made of.
        links: symbolic links: path -> target.
        sparse: files of this many bytes that take no room on the disk, their first bytes as `files` says.
    """

    name: str
    files: dict[str, bytes]
    expect: Expect = "refused"
    kind: Kind = "table"
    opens: str = ""
    good: str = ""
    links: dict[str, str] = field(default_factory=dict)
    sparse: dict[str, int] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """The files, in an empty folder; the path to open."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            if name in self.sparse:
                with path.open("rb+") as file:
                    file.truncate(self.sparse[name])
        for name, target in self.links.items():
            (folder / name).symlink_to(target)
        return folder / (self.opens or next(iter([*self.files, *self.links])))


def write_pack(path: Path, cases: Iterable[Case]) -> list[tuple[str, Expect]]:
    """All cases one after the other in one file; their names, and what may come of them."""
    told: list[tuple[str, Expect]] = []
    with path.open("wb") as file:
        for case in cases:
            pickle.dump(case, file)
            told.append((case.name, case.expect))
    return told


def read_pack(path: Path) -> Iterator[Case]:
    with path.open("rb") as file:
        while True:
            try:
                yield pickle.load(file)
            except EOFError:
                return
