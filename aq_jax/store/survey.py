"""What is still good in tables that may be damaged, row by row. Loaders have `open_table`, which refuses them whole.

Nothing of what is read here is handed out but names and complaints, so that no damaged tensor can be loaded by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aq_jax.errors import AqError, FormatError, IntegrityError
from aq_jax.store.columns import byte_views, cells
from aq_jax.store.containers import Container, open_container, translated
from aq_jax.store.digest import row_digest
from aq_jax.store.manifest import ShardEntry, check_entry, entries_of, files_of
from aq_jax.store.metadata import Metadata, check_aliases, complaints
from aq_jax.store.rows import RowInfo, RowOrder, at, check, row_bytes
from aq_jax.store.schema import GROUP_BYTES, HEAVY, V2
from aq_jax.store.shard import make_row, read_metadata, row_info

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    import numpy as np

_ADDED = ("digest", "solver", "cosine", "rel_mse")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong.

    Args:
        file: in which.
        row: of the file; None where it is not about one, but about the file, or what should be in it.
        name: of the row's tensor, as far as it is known.
        text: what was found and what was wanted, where included.
    """

    file: str
    row: int | None
    name: str | None
    text: str


@dataclass(frozen=True, slots=True)
class Survey:
    """What is good in a table, or in a folder of them.

    Args:
        good: tensors all of whose rows are there and whole, in order.
        rows: how many rows are whole.
        unchecked: how many of them have no digest to say so (files of other writers).
        problems: all else.
    """

    good: tuple[str, ...]
    rows: int
    unchecked: int
    problems: tuple[Problem, ...]


def survey(path: str | os.PathLike[str]) -> Survey:
    """Reads all of a table, however damaged, and says what is wrong, where, and which tensors are still good.

    >>> import tempfile
    >>> from aq_jax.store import write_table
    >>> write_table(path := tempfile.mkdtemp() + "/m.parquet", [], version=1)
    >>> survey(path)
    Survey(good=(), rows=0, unchecked=0, problems=())

    Raises:
        FileNotFoundError: there is no such file.
        PermissionError: it may not be read.
    """
    surveyor = _Surveyor()
    surveyor.read(Path(path))
    return surveyor.result(str(path))


@dataclass(slots=True)
class _Found:
    """A row whose small cells keep the rules."""

    file: str
    row: int
    info: RowInfo
    good: bool = False


@dataclass(slots=True)
class _Surveyor:
    problems: list[Problem] = field(default_factory=list)
    rows: list[_Found] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    whole: bool = True
    """Whether all rows of all files are known by name."""

    def read(self, path: Path) -> None:
        files, entries = [path], None
        if path.is_dir():
            try:
                entries = self.present(path, entries_of(path))
                files = files_of(path)[0] if entries is None else [path / entry.file for entry in entries]
            except AqError as error:
                self.add(path, str(error))
                self.whole = False
                files = sorted(f for f in path.iterdir() if f.suffix in (".parquet", ".arrow") and f.is_file())
                files = [file for file in files if not file.name.startswith(".")]
        for file, entry in zip(files, entries or [None] * len(files), strict=True):
            self.read_file(file, entry)

    def present(self, folder: Path, entries: tuple[ShardEntry, ...] | None) -> tuple[ShardEntry, ...] | None:
        """Those files of a manifest that are there; what is lost with the others is said."""
        if entries is None:
            return None
        found = []
        for entry in entries:
            if (folder / entry.file).is_file():
                found.append(entry)
                continue
            self.whole = False
            for name in entry.tensors:
                text = f"{folder / entry.file}: is not there, though the manifest names it; fetch it, or write it again"
                self.add(folder / entry.file, text, None, name)
        return tuple(found)

    def add(self, file: object, text: str, row: int | None = None, name: str | None = None) -> None:
        self.problems.append(Problem(str(file), row, name, text))

    def read_file(self, path: Path, entry: ShardEntry | None) -> None:
        where = str(path)
        try:
            with translated(where):
                container = open_container(path, where)
        except AqError as error:
            self.add(path, f"{error}; nothing of it can be read")
            self.whole = False
            return
        try:
            with translated(where):
                _File(self, container, where, entry).read()
        except AqError as error:
            self.add(path, str(error))
            self.whole = False
        finally:
            container.close()

    def result(self, path: str) -> Survey:
        names = list(dict.fromkeys(found.info.layer_name for found in self.rows))
        rows: dict[str, list[_Found]] = {name: [] for name in names}
        for found in self.rows:
            rows[found.info.layer_name].append(found)
        broken = {problem.name for problem in self.problems if problem.name is not None}
        good = [name for name in names if name not in broken and self.joined(rows[name], path)]
        if self.whole:
            try:
                check_aliases(self.aliases, names, path)
            except AqError as error:
                self.add(path, str(error))
        whole = [found for found in self.rows if found.good]
        unchecked = sum(found.info.digest is None for found in whole)
        return Survey(tuple(good), len(whole), unchecked, tuple(self.problems))

    def joined(self, rows: list[_Found], path: str) -> bool:
        """Whether the rows of one name are one tensor: all of its pieces, adjacent and alike."""
        order, last = RowOrder(), rows[0]
        for found in rows:
            here = at(found.file, found.row, found.info.layer_name)
            try:
                if found is not last and found.info.position != last.info.position + 1:
                    raise FormatError(f"{here}: the name is there already, in row {last.row} of {last.file}")
                order.add(found.info, found.file, found.row)
            except AqError as error:
                self.add(found.file, str(error), found.row, found.info.layer_name)
                return False
            last = found
        try:
            order.finish(last.file)
        except AqError as error:
            self.add(last.file, str(error), last.row, last.info.layer_name)
            return False
        return all(found.good for found in rows)


class _File:
    """One file, opened."""

    def __init__(self, survey: _Surveyor, container: Container, where: str, entry: ShardEntry | None) -> None:
        self._survey, self._container, self._where, self._entry = survey, container, where, entry
        self._start = len(survey.rows)
        self._names = ("data", "scales", "zero_points") if container.is_v2 else ("data",)

    def read(self) -> None:
        for doubt in self._container.doubts:
            self._survey.add(self._where, f"{self._where}: {doubt}")
        metadata = self._metadata()
        first, known = 0, True
        for group, count in enumerate(self._container.group_rows):
            found, lost = self._read_cells(group, first, count)
            known &= not lost
            self._read_group(group, found, lost)
            first += count
        self._survey.whole &= known
        rows = [found.info for found in self._survey.rows[self._start :]]
        if metadata is not None and known:
            for complaint in complaints(metadata, rows, self._where):
                self._survey.add(self._where, str(complaint))
        if self._entry is not None:
            try:
                check_entry(self._entry, metadata and metadata.digest, [info.layer_name for info in rows], self._where)
            except AqError as error:
                # Rows that are whole may be another table's.
                strangers = self._survey.rows[self._start :] if metadata is not None else []
                lost = () if metadata is None else (*self._entry.tensors, *(row.info.layer_name for row in strangers))
                for found in strangers:
                    found.good = False
                for name in dict.fromkeys(lost) or (None,):
                    self._survey.add(self._where, str(error), None, name)

    def _metadata(self) -> Metadata | None:
        try:
            metadata = read_metadata(self._container, self._where)
        except AqError as error:
            self._survey.add(self._where, str(error))
            return None
        if metadata is not None:
            self._survey.aliases |= metadata.aliases
        return metadata

    def _read_cells(self, group: int, first: int, count: int) -> tuple[list[_Found], int]:
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
                self._survey.add(self._where, str(error))
                unreadable.append(name)
            else:
                if values:
                    columns[name] = values
        # Statistics are no part of a tensor; without its digest nobody knows what a row should be.
        missing = [name for name in unreadable if name not in _ADDED or name == "digest"]
        found: list[_Found] = []
        for index in range(count):
            cell = {name: values[index] for name, values in columns.items()}
            row, name = first + index, cell.get("layer_name")
            here = at(self._where, row, str(name))
            try:
                if missing:
                    raise FormatError(f"{here}: cannot be judged without its {', '.join(missing)}")
                info = row_info(cell, len(self._survey.rows), self._container.is_v2, here)
                check(info, here)
                self._container.check_capacity({key: row_bytes(info)[key] for key in self._names})
            except (AqError, KeyError) as error:
                text = str(error) if isinstance(error, AqError) else f"{here}: has no {error}"
                self._survey.add(self._where, text if here in text else f"{here}: {text}", row, name)
            else:
                found.append(_Found(self._where, row, info))
                self._survey.rows.append(found[-1])
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

    def _read_group(self, group: int, rows: list[_Found], lost: int) -> None:
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
                heavy[name] = [view for array in arrays for view in byte_views(array)]
            except AqError as error:
                for found in rows:
                    self._survey.add(found.file, str(error), found.row, found.info.layer_name)
        if len(heavy) == len(self._names):
            first = sum(self._container.group_rows[:group])
            for found in rows:
                self._judge(found, group, {name: views[found.row - first] for name, views in heavy.items()}, needs)

    def _judge(
        self, found: _Found, group: int, columns: Mapping[str, np.ndarray | None], needs: Mapping[str, int]
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
            self._survey.add(found.file, str(error), found.row, found.info.layer_name)
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
