"""Whether a table is what was written, and if not, what of it still is. Loaders refuse a damaged table whole."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aq_jax.errors import AqError, FormatError
from aq_jax.store.container import open_container
from aq_jax.store.judge import Damage, FileJudge, Findings, Found
from aq_jax.store.limits import translated
from aq_jax.store.manifest import ShardEntry, entries_of, files_of, tables_in
from aq_jax.store.metadata import check_aliases
from aq_jax.store.rows import RowOrder, at

if TYPE_CHECKING:
    import os


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a table is what was written.

    Args:
        path: the file or folder.
        rows: how many rows are whole.
        unchecked: how many of them have no digest to say so (files of other writers).
        good: tensors all of whose rows are there and whole, in order.
        problems: all else.
    """

    path: str
    rows: int
    unchecked: int
    good: tuple[str, ...] = ()
    problems: tuple[Damage, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def errors(self) -> tuple[str, ...]:
        """What is wrong, one text each."""
        return tuple(dict.fromkeys(each.problem for each in self.problems))

    @property
    def bad(self) -> tuple[Damage, ...]:
        """Rows and tensors that are not whole."""
        return tuple(each for each in self.problems if not each.row is each.name is None)

    @property
    def damaged(self) -> tuple[str, ...]:
        """Names of the tensors that are not whole, as far as they are known."""
        good = set(self.good)
        return tuple(dict.fromkeys(row.name for row in self.bad if row.name is not None and row.name not in good))

    def record(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        said = {name: getattr(self, name) for name in ("path", "rows", "unchecked", "errors", "good", "ok")}
        return said | {"bad": [dataclasses.asdict(each) for each in self.bad]}


def verify_table(path: str | os.PathLike[str]) -> Verdict:
    """Read every row, compare it with its digest, and the rows with the table's; say what is wrong and what is good.

    Each file of a folder is judged, whatever the others are.

    Args:
        path: a table, or a folder of them.

    Raises:
        FileNotFoundError: if there is no such file.
        PermissionError: if it may not be read.

    >>> import tempfile
    >>> from aq_jax.store import write_table
    >>> write_table(path := tempfile.mkdtemp() + "/m.parquet", [], version=1)
    >>> verify_table(path).ok, verify_table(path).rows
    (True, 0)
    """
    findings = Findings()
    _read(findings, Path(path))
    good = _good(findings, str(path))
    whole = [row for row in findings.rows if row.good]
    unchecked = sum(row.info.digest is None for row in whole)
    return Verdict(str(path), len(whole), unchecked, good, tuple(findings.problems))


def _read(findings: Findings, path: Path) -> None:
    files, entries = [path], None
    if path.is_dir():
        try:
            entries = _present(findings, path, entries_of(path))
            files = files_of(path)[0] if entries is None else [path / entry.file for entry in entries]
        except AqError as error:
            findings.add(path, str(error))
            findings.whole = False
            files = [file for file in tables_in(path) if file.is_file()]
    for file, entry in zip(files, entries or [None] * len(files), strict=True):
        _read_file(findings, file, entry)


def _present(findings: Findings, folder: Path, entries: tuple[ShardEntry, ...] | None) -> tuple[ShardEntry, ...] | None:
    """Take those files of a manifest that are there; what is lost with the others is said."""
    if entries is None:
        return None
    found = []
    for entry in entries:
        file = folder / entry.file
        if file.is_file():
            found.append(entry)
            continue
        findings.whole = False
        for name in entry.tensors:
            findings.add(
                file, f"{file}: is not there, though the manifest names it; fetch it, or write it again", None, name
            )
    return tuple(found)


def _read_file(findings: Findings, path: Path, entry: ShardEntry | None) -> None:
    where = str(path)
    try:
        with translated(where):
            container = open_container(path, where)
    except AqError as error:
        findings.add(path, f"{error}; nothing of it can be read")
        findings.whole = False
        return
    try:
        with translated(where):
            FileJudge(findings, container, where, entry).read()
    except AqError as error:
        findings.add(path, str(error))
        findings.whole = False
    finally:
        container.close()


def _good(findings: Findings, path: str) -> tuple[str, ...]:
    """Name the tensors that are whole, now that all files are read."""
    rows: dict[str, list[Found]] = {}
    for found in findings.rows:
        rows.setdefault(found.info.layer_name, []).append(found)
    broken = {problem.name for problem in findings.problems if problem.name is not None}
    good = tuple(name for name in rows if name not in broken and _joined(findings, rows[name]))
    if findings.whole:
        try:
            check_aliases(findings.aliases, list(rows), path)
        except AqError as error:
            findings.add(path, str(error))
    return good


def _joined(findings: Findings, rows: list[Found]) -> bool:
    """Whether the rows of one name are one tensor: all of its pieces, adjacent and alike."""
    order, last = RowOrder(), rows[0]
    try:
        for found in rows:
            here = at(found.file, found.row, found.info.layer_name)
            if found is not last and found.info.position != last.info.position + 1:
                before, last = last, found
                raise FormatError(f"{here}: the name is there already, in row {before.row} of {before.file}")
            last = found
            order.add(found.info, found.file, found.row)
        order.finish(last.file)
    except AqError as error:
        findings.add(last.file, str(error), last.row, last.info.layer_name)
        return False
    return all(found.good for found in rows)
