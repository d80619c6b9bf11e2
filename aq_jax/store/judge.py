"""What is still good in one file of a table that may be damaged, row by row.

Nothing of what is read here is handed out but names and complaints, so that no damaged tensor can be loaded by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aq_jax.errors import AqError, FormatError, IntegrityError
from aq_jax.store.columns import all_views, cells
from aq_jax.store.digest import row_digest
from aq_jax.store.limits import translated
from aq_jax.store.manifest import ShardEntry, check_entry
from aq_jax.store.metadata import Metadata, complaints
from aq_jax.store.rows import RowInfo, at, check, row_bytes
from aq_jax.store.schema import GROUP_BYTES, HEAVY, V2
from aq_jax.store.shard import make_row, read_metadata, row_info

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from aq_jax.store.container import Container

_ADDED = ("digest", "solver", "cosine", "rel_mse")


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is wrong: a row that is not what was written, a tensor that is not there, a file.

    Args:
        file: that holds it, or should.
        row: its number in that file, from 0; None where it is about no row: of a file that is not there, say.
        name: of its tensor, as far as it is known.
        problem: what was found and what was wanted, where included.
    """

    file: str
    row: int | None
    name: str | None
    problem: str


@dataclass(slots=True)
class Found:
    """A row whose small cells keep the rules."""

    file: str
    row: int
    info: RowInfo
    good: bool = False


@dataclass(slots=True)
class Findings:
    """What is known of a table's files so far."""

    problems: list[Damage] = field(default_factory=list)
    rows: list[Found] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    whole: bool = True
    """Whether all rows of all files are known by name."""

    def add(self, file: object, problem: str, row: int | None = None, name: str | None = None) -> None:
        """Note that something is wrong."""
        self.problems.append(Damage(str(file), row, name, problem))


class FileJudge:
    """One file of a table.

    Args:
        findings: so far, to which those of this file are added.
        container: the file, open.
        where: its name.
        entry: what the manifest says of it, if there is one.
    """

    def __init__(self, findings: Findings, container: Container, where: str, entry: ShardEntry | None) -> None:
        self._findings, self._container, self._where, self._entry = findings, container, where, entry
        self._start = len(findings.rows)
        self._names = HEAVY if container.is_v2 else HEAVY[:1]

    def read(self) -> None:
        """Read all of it, a group of rows after the other."""
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
            for complaint in complaints(metadata, rows, self._where):
                self._findings.add(self._where, str(complaint))
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

    def _read_cells(self, group: int, first: int, count: int) -> tuple[list[Found], int]:
        """The rows of a group whose small cells keep the rules, and how many do not."""
        columns: dict[str, list[Any]] = {}
        unreadable: list[str] = []
        for name in V2.names:
            if name in HEAVY or name not in self._container.names:
                continue
            try:
                values = cells(self._part(self._container.small_of, group, name))
                if values and len(values) != count:
                    raise FormatError(f"{self._at(group, name)}: holds {len(values)} values for {count} rows")
            except AqError as error:
                self._findings.add(self._where, str(error))
                unreadable.append(name)
            else:
                if values:
                    columns[name] = values
        # Statistics are no part of a tensor; without its digest nobody knows what a row should be.
        missing = [name for name in unreadable if name not in _ADDED or name == "digest"]
        found: list[Found] = []
        for index in range(count):
            cell = {name: values[index] for name, values in columns.items()}
            row, name = first + index, cell.get("layer_name")
            here = at(self._where, row, str(name))
            try:
                if missing:
                    raise FormatError(f"{here}: cannot be judged without its {', '.join(missing)}")
                info = row_info(cell, len(self._findings.rows), self._container.is_v2, here)
                check(info, here)
                self._container.check_capacity({key: row_bytes(info)[key] for key in self._names})
            except (AqError, KeyError) as error:
                text = str(error) if isinstance(error, AqError) else f"{here}: has no {error}"
                self._findings.add(self._where, text if here in text else f"{here}: {text}", row, name)
            else:
                found.append(Found(self._where, row, info))
                self._findings.rows.append(found[-1])
        return found, count - len(found)

    def _part(self, read: Any, group: int, column: str, *arguments: Any) -> Any:
        """A column of a group; what is wrong with it is said with its place."""
        try:
            with translated(self._at(group, column)):
                return read(group, *(arguments or (column,)))
        except FormatError as error:
            here = self._at(group, column)
            raise FormatError(str(error) if here in str(error) else f"{here}: {error}") from None

    def _at(self, group: int, column: str) -> str:
        start, stop = self._container.place(group, column)
        return f"{self._where}: column {column} of row group {group}, bytes {start} to {stop}"

    def _read_group(self, group: int, rows: list[Found], lost: int) -> None:
        if not rows:
            return
        heavy: dict[str, list[np.ndarray | None]] = {}
        needs: dict[str, int] = {}
        digests = all(found.info.digest is not None for found in rows)
        for name in self._names:
            # What rows need of which nothing is known is no more than what makes a group.
            needs[name] = sum(row_bytes(found.info)[name] for found in rows) + (GROUP_BYTES if lost else 0)
            try:
                arrays = self._part(self._container.heavy, group, name, {name: needs[name]}, not digests)[name]
                heavy[name] = all_views(arrays)
            except AqError as error:
                for found in rows:
                    self._findings.add(found.file, str(error), found.row, found.info.layer_name)
        if len(heavy) == len(self._names):
            first = sum(self._container.group_rows[:group])
            for found in rows:
                self._judge(found, group, {name: views[found.row - first] for name, views in heavy.items()}, needs)

    def _judge(
        self, found: Found, group: int, columns: Mapping[str, np.ndarray | None], needs: Mapping[str, int]
    ) -> None:
        here = at(found.file, found.row, found.info.layer_name)
        try:
            row = make_row(found.info, columns, here)
            if row.digest is not None and (digest := row_digest(row)) != row.digest:
                raise IntegrityError(
                    f"{here}: its bytes have digest {digest.hex()}, written was {row.digest.hex()}: "
                    f"{self._cause(group, needs)}"
                )
        except AqError as error:
            self._findings.add(found.file, str(error), found.row, found.info.layer_name)
        else:
            found.good = True

    def _cause(self, group: int, needs: Mapping[str, int]) -> str:
        """Which column's own checksum fails too, if the container has any; the digest covers all of a row."""
        places = [self._container.place(group, name) for name in self._names]
        for name, (start, stop) in zip(self._names, places, strict=True):
            try:
                self._part(self._container.heavy, group, name, {name: needs[name]}, True)
            except AqError:
                return f"column {name} is damaged, within bytes {start} to {stop} of the file"
        start, stop = min(start for start, _ in places), max(stop for _, stop in places)
        return f"something in bytes {start} to {stop} of the file was damaged or changed"
