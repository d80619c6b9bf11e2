"""Verify a table: find what was changed, and what is still whole. Loaders refuse a damaged table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aq_jax.errors import AqError, FormatError
from aq_jax.store.container import open_container
from aq_jax.store.limits import translate_errors
from aq_jax.store.manifest import ShardEntry, list_tables, read_manifest, table_files
from aq_jax.store.metadata import check_aliases
from aq_jax.store.row_rules import RowOrder
from aq_jax.store.rows import row_location
from aq_jax.store.verify_file import Damage, FileVerifier, Findings, ReadableRow

if TYPE_CHECKING:
    import os


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of verifying a table.

    Args:
        path: The file or folder.
        rows: The number of rows that are whole.
        unchecked: The number of them that have no digest to compare (in files of other writers).
        good: The names of tensors all of whose rows are whole, in order.
        problems: All that is wrong.
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
        """The texts of all problems."""
        return tuple(dict.fromkeys(each.problem for each in self.problems))

    @property
    def bad(self) -> tuple[Damage, ...]:
        """The rows and tensors that are not whole."""
        return tuple(each for each in self.problems if not each.row is each.name is None)

    @property
    def damaged(self) -> tuple[str, ...]:
        """The names of tensors that are not whole, as far as they are known."""
        good = set(self.good)
        return tuple(dict.fromkeys(row.name for row in self.bad if row.name is not None and row.name not in good))

    def record(self) -> dict[str, Any]:
        """Convert the result to plain JSON values."""
        said = {name: getattr(self, name) for name in ("path", "rows", "unchecked", "errors", "good", "ok")}
        return said | {"bad": [dataclasses.asdict(each) for each in self.bad]}


def verify_table(path: str | os.PathLike[str]) -> Verdict:
    """Read every row and compare it with its digest, and all rows with the table's digest.

    Each file of a folder is verified, whatever is wrong with the others.

    Args:
        path: The path of a table, or of a folder of them.

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
            entries = _present(findings, path, read_manifest(path))
            files = table_files(path)[0] if entries is None else [path / entry.file for entry in entries]
        except AqError as error:
            findings.add(path, str(error))
            findings.whole = False
            files = [file for file in list_tables(path) if file.is_file()]
    for file, entry in zip(files, entries or [None] * len(files), strict=True):
        _read_file(findings, file, entry)


def _present(findings: Findings, folder: Path, entries: tuple[ShardEntry, ...] | None) -> tuple[ShardEntry, ...] | None:
    """Keep those files of a manifest that are there, and note the tensors that are lost with the others."""
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
                file, f"{file}: is missing, though the manifest names it; fetch it, or write it again", None, name
            )
    return tuple(found)


def _read_file(findings: Findings, path: Path, entry: ShardEntry | None) -> None:
    where = str(path)
    try:
        with translate_errors(where):
            container = open_container(path, where)
    except AqError as error:
        findings.add(path, f"{error}; nothing of it can be read")
        findings.whole = False
        return
    try:
        with translate_errors(where):
            FileVerifier(findings, container, where, entry).read()
    except AqError as error:
        findings.add(path, str(error))
        findings.whole = False
    finally:
        container.close()


def _good(findings: Findings, path: str) -> tuple[str, ...]:
    """Name the tensors that are whole, after all files are read."""
    rows: dict[str, list[ReadableRow]] = {}
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


def _joined(findings: Findings, rows: list[ReadableRow]) -> bool:
    """Tell whether the rows of one name are one whole tensor: all of its pieces, adjacent and alike."""
    order, last = RowOrder(), rows[0]
    try:
        for found in rows:
            here = row_location(found.file, found.row, found.info.layer_name)
            if found is not last and found.info.position != last.info.position + 1:
                before, last = last, found
                raise FormatError(f"{here}: the name already exists in row {before.row} of {before.file}")
            last = found
            order.add(found.info, found.file, found.row)
        order.finish(last.file)
    except AqError as error:
        findings.add(last.file, str(error), last.row, last.info.layer_name)
        return False
    return all(found.good for found in rows)
