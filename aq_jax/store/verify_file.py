"""Verify one file of a table that may be damaged, row by row.

Only names and problems leave this module, so that no damaged tensor can be loaded through it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aq_jax.errors import AqError, FormatError, IntegrityError
from aq_jax.store.columns import all_views, to_python
from aq_jax.store.decode import check_values
from aq_jax.store.digest import row_digest
from aq_jax.store.limits import translate_errors
from aq_jax.store.manifest import ShardEntry, check_entry
from aq_jax.store.metadata import Metadata, find_mismatches
from aq_jax.store.row_rules import check
from aq_jax.store.rows import RowInfo, row_bytes, row_location
from aq_jax.store.schema import GROUP_BYTES, LARGE_COLUMNS, V2
from aq_jax.store.shard import make_row, parse_row_info, read_metadata

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from aq_jax.store.container import Container

_ADDED = ("digest", "solver", "cosine", "rel_mse")


@dataclass(frozen=True, slots=True)
class Damage:
    """A problem of a table: a row that was changed, a missing tensor, a damaged file.

    Args:
        file: The file that holds it, or should.
        row: The row's number in that file, from 0; None if no row is concerned, but a missing file, say.
        name: The tensor's name, if it is known.
        problem: The text of the problem: where, what was found and what was wanted.
    """

    file: str
    row: int | None
    name: str | None
    problem: str


@dataclass(slots=True)
class ReadableRow:
    """A row whose small cells follow the rules."""

    file: str
    row: int
    info: RowInfo
    good: bool = False


@dataclass(slots=True)
class Findings:
    """The findings about a table's files so far."""

    problems: list[Damage] = field(default_factory=list)
    rows: list[ReadableRow] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    whole: bool = True
    """Whether all rows of all files are known by name."""

    def add(self, file: object, problem: str, row: int | None = None, name: str | None = None) -> None:
        """Note a problem."""
        self.problems.append(Damage(str(file), row, name, problem))


class FileVerifier:
    """A verifier of one file of a table.

    Args:
        findings: The findings so far, to which those of this file are added.
        container: The open file.
        where: The file's name.
        entry: The file's entry in the manifest, if there is one.
    """

    def __init__(self, findings: Findings, container: Container, where: str, entry: ShardEntry | None) -> None:
        self._findings, self._container, self._where, self._entry = findings, container, where, entry
        self._start = len(findings.rows)
        self._names = LARGE_COLUMNS if container.is_v2 else LARGE_COLUMNS[:1]

    def read(self) -> None:
        """Read the whole file, group by group."""
        for doubt in self._container.doubts:
            self._findings.add(self._where, f"{self._where}: {doubt}")
        metadata = self._metadata()
        first, known = 0, True
        for group, count in enumerate(self._container.group_rows):
            found, lost = self._read_cells(group, first, count)
            known &= not lost
            self._read_group(group, found, lost)
            first += count
        self._findings.whole &= known
        rows = [found.info for found in self._findings.rows[self._start :]]
        if metadata is not None and known:
            for mismatch in find_mismatches(metadata, rows, self._where):
                self._findings.add(self._where, str(mismatch))
        if self._entry is not None:
            try:
                check_entry(self._entry, metadata and metadata.digest, [info.layer_name for info in rows], self._where)
            except AqError as error:
                # Rows that are whole may be another table's.
                strangers = self._findings.rows[self._start :] if metadata is not None else []
                lost = () if metadata is None else (*self._entry.tensors, *(row.info.layer_name for row in strangers))
                for found in strangers:
                    found.good = False
                for name in dict.fromkeys(lost) or (None,):
                    self._findings.add(self._where, str(error), None, name)

    def _metadata(self) -> Metadata | None:
        try:
            metadata = read_metadata(self._container, self._where)
        except AqError as error:
            self._findings.add(self._where, str(error))
            return None
        if metadata is not None:
            self._findings.aliases |= metadata.aliases
        return metadata

    def _read_cells(self, group: int, first: int, count: int) -> tuple[list[ReadableRow], int]:
        """Read the small cells of a group; return the rows that follow the rules, and count those that do not."""
        columns: dict[str, list[Any]] = {}
        unreadable: list[str] = []
        for name in V2.names:
            if name in LARGE_COLUMNS or name not in self._container.names:
                continue
            try:
                values = to_python(self._part(self._container.read_small_column, group, name))
                if values and len(values) != count:
                    raise FormatError(f"{self._at(group, name)}: holds {len(values)} values for {count} rows")
            except AqError as error:
                self._findings.add(self._where, str(error))
                unreadable.append(name)
            else:
                if values:
                    columns[name] = values
        # Statistics are not part of a tensor; but without its digest a row cannot be checked.
        missing = [name for name in unreadable if name not in _ADDED or name == "digest"]
        found: list[ReadableRow] = []
        for index in range(count):
            cell = {name: values[index] for name, values in columns.items()}
            row, name = first + index, cell.get("layer_name")
            here = row_location(self._where, row, str(name))
            try:
                if missing:
                    raise FormatError(f"{here}: cannot be verified without its {', '.join(missing)}")
                info = parse_row_info(cell, len(self._findings.rows), self._container.is_v2, here)
                check(info, here)
                self._container.check_capacity({key: row_bytes(info)[key] for key in self._names})
            except (AqError, KeyError) as error:
                text = str(error) if isinstance(error, AqError) else f"{here}: has no {error}"
                self._findings.add(self._where, text if here in text else f"{here}: {text}", row, name)
            else:
                found.append(ReadableRow(self._where, row, info))
                self._findings.rows.append(found[-1])
        return found, count - len(found)

    def _part(self, read: Any, group: int, column: str, *arguments: Any) -> Any:
        """Read a column of a group; errors name its extent."""
        try:
            with translate_errors(self._at(group, column)):
                return read(group, *(arguments or (column,)))
        except FormatError as error:
            here = self._at(group, column)
            raise FormatError(str(error) if here in str(error) else f"{here}: {error}") from None

    def _at(self, group: int, column: str) -> str:
        start, stop = self._container.extent(group, column)
        return f"{self._where}: column {column} of row group {group}, bytes {start} to {stop}"

    def _read_group(self, group: int, rows: list[ReadableRow], lost: int) -> None:
        if not rows:
            return
        large: dict[str, list[np.ndarray | None]] = {}
        needs: dict[str, int] = {}
        digests = all(found.info.digest is not None for found in rows)
        for name in self._names:
            # Rows of which nothing is known need no more than a whole group.
            needs[name] = sum(row_bytes(found.info)[name] for found in rows) + (GROUP_BYTES if lost else 0)
            try:
                arrays = self._part(self._container.read_large, group, name, {name: needs[name]}, not digests)[name]
                large[name] = all_views(arrays)
            except AqError as error:
                for found in rows:
                    self._findings.add(found.file, str(error), found.row, found.info.layer_name)
        if len(large) == len(self._names):
            first = sum(self._container.group_rows[:group])
            for found in rows:
                self._check_row(found, group, {name: views[found.row - first] for name, views in large.items()}, needs)

    def _check_row(
        self, found: ReadableRow, group: int, columns: Mapping[str, np.ndarray | None], needs: Mapping[str, int]
    ) -> None:
        here = row_location(found.file, found.row, found.info.layer_name)
        try:
            row = make_row(found.info, columns, here)
            if row.digest is not None and (digest := row_digest(row)) != row.digest:
                raise IntegrityError(
                    f"{here}: its bytes have digest {digest.hex()}; wanted {row.digest.hex()}: "
                    f"{self._cause(group, needs)}"
                )
            check_values(row, here)
        except AqError as error:
            self._findings.add(found.file, str(error), found.row, found.info.layer_name)
        else:
            found.good = True

    def _cause(self, group: int, needs: Mapping[str, int]) -> str:
        """Name the column whose own checksum fails, too, if the container has any; the digest covers all of a row."""
        extents = [self._container.extent(group, name) for name in self._names]
        for name, (start, stop) in zip(self._names, extents, strict=True):
            try:
                self._part(self._container.read_large, group, name, {name: needs[name]}, True)
            except AqError:
                return f"column {name} is damaged, within bytes {start} to {stop} of the file"
        start, stop = min(start for start, _ in extents), max(stop for _, stop in extents)
        return f"something in bytes {start} to {stop} of the file was damaged or changed"
