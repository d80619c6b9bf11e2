"""Read one file of a table: its Arrow values are checked and turned into `Row`s."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from aq_jax.errors import FormatError
from aq_jax.store.columns import all_views, to_python
from aq_jax.store.container import Container, open_container
from aq_jax.store.limits import translate_errors
from aq_jax.store.metadata import Metadata, parse, verify
from aq_jax.store.row_rules import check, check_arrays
from aq_jax.store.rows import Row, RowInfo, row_bytes, row_location
from aq_jax.store.schema import LARGE_COLUMNS, parse_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    Groups = Sequence[tuple[int, int]] | None
    """Ranges (start, stop) of the groups of a row; None for all."""


Views = dict[str, list[np.ndarray | None]]
_SMALL = tuple(field.name for field in fields(Row) if field.name not in LARGE_COLUMNS)


class Shard:
    """One file of a table; `start` is the position of its first row. Not thread-safe: the reader has the lock."""

    _cached: tuple[int, bool, Views] | None = None
    _mapped: tuple[int, list[np.ndarray] | None, Views] | None = None

    def __init__(self, path: Path, start: int) -> None:
        self.where = str(path)
        self.start = start
        with translate_errors(self.where):
            self._container = open_container(path, self.where)
        try:
            for doubt in self._container.doubts:
                raise FormatError(f"{self.where}: {doubt}")
            self.is_v2 = self._container.is_v2
            self.metadata = read_metadata(self._container, self.where)
            self._locations = [
                (group, index) for group, rows in enumerate(self._container.group_rows) for index in range(rows)
            ]
            with translate_errors(self.where):
                self.infos = self._read_infos()
        except BaseException:
            self.close()
            raise
        self._has_digests = all(info.digest is not None for info in self.infos)

    def verify(self) -> None:
        """Compare the metadata, if there is any, with the rows."""
        if self.metadata is not None:
            verify(self.metadata, self.infos, self.where)

    def read(self, index: int, verify: bool) -> Row:
        """Read one row; `verify` checks the container's checksums where rows have no digests."""
        with translate_errors(self.where):
            columns = self._load(self._locations[index][0], checksums=verify and not self._has_digests)
        return self._row(index, columns)

    @property
    def maps_grids(self) -> bool:
        """Tell whether scales and zero points, too, are views of the mapped file."""
        return self._container.maps_grids

    def mapped(self, index: int, groups: Groups = None) -> Row | None:
        """Read one row with `data` as an unread view; None if the file does not hold those bytes as they are.

        Scales and zero points are read, with the container's checksums. If they are views of the file, only those of
        `groups` are checked, and the others must not be used.
        """
        group, index_in_group = self._locations[index]
        with translate_errors(self.where):
            data, grids = self._map(group)
        return None if data is None else self._row(index, grids, groups, data[index_in_group])

    def grids(self, index: int, groups: Groups = None) -> Row:
        """Read one row without `data`, which is zeros that take no memory."""
        with translate_errors(self.where):
            _, grids = self._map(self._locations[index][0])
        nothing = np.broadcast_to(np.zeros((), np.uint8), (row_bytes(self.infos[index])["data"],))
        return self._row(index, grids, groups, nothing)

    def _row(self, index: int, columns: Views, groups: Groups = None, data: np.ndarray | None = None) -> Row:
        info, index_in_group = self.infos[index], self._locations[index][1]
        found = {name: views[index_in_group] for name, views in columns.items()}
        if data is not None:
            found["data"] = data
        looked_at = groups if self.maps_grids else None
        return make_row(info, found, row_location(self.where, index, info.layer_name), looked_at)

    def close(self) -> None:
        self._cached = self._mapped = None
        self._container.close()

    def _read_infos(self) -> list[RowInfo]:
        columns = {name: to_python(arrays) for name, arrays in self._container.read_small().items()}
        if len(columns.get("layer_name", ())) != len(self._locations):
            raise FormatError(f"{self.where}: its columns do not hold {len(self._locations)} rows")
        infos: list[RowInfo] = []
        for index, values in enumerate(zip(*columns.values(), strict=True)):
            cell = dict(zip(columns, values, strict=True))
            here = row_location(self.where, index, str(cell["layer_name"]))
            infos.append(parse_row_info(cell, self.start + index, self.is_v2, here))
            check(infos[-1], here)
        return self._measured(infos)

    def _measured(self, infos: list[RowInfo]) -> list[RowInfo]:
        """Add up the bytes that each group must hold, and distribute its bytes on disk over its rows."""
        names = LARGE_COLUMNS if self.is_v2 else LARGE_COLUMNS[:1]
        needs = [row_bytes(info) for info in infos]
        self._needs = [dict.fromkeys(names, 0) for _ in self._container.group_rows]
        for need, (group, _) in zip(needs, self._locations, strict=True):
            for name in names:
                self._needs[group][name] += need[name]
        self._container.check_capacity({name: sum(need[name] for need in self._needs) for name in names})
        measured: list[RowInfo] = []
        for info, need, (group, _) in zip(infos, needs, self._locations, strict=True):
            size = 0
            for name in names:
                stored, whole = self._container.disk_bytes(group, name), self._needs[group][name]
                size += need[name] if stored is None else stored * need[name] // max(whole, 1)
            measured.append(replace(info, disk_bytes=size))
        return measured

    def _load(self, group: int, checksums: bool) -> Views:
        # Rows are mostly read in order: only the last group is worth caching.
        if self._cached is not None and self._cached[0] == group and self._cached[1] >= checksums:
            return self._cached[2]
        self._cached = None
        views = self._views(group, self._needs[group], checksums)
        self._cached = (group, checksums, views)
        return views

    def _map(self, group: int) -> tuple[list[np.ndarray] | None, Views]:
        if self._mapped is None or self._mapped[0] != group:
            self._mapped = None
            needs = {name: need for name, need in self._needs[group].items() if name != "data"}
            # Checksums are on, since rows that are read in part have no digest to compare.
            self._mapped = group, self._container.mapped(group), self._views(group, needs, True) if needs else {}
        return self._mapped[1:]

    def _views(self, group: int, needs: dict[str, int], checksums: bool) -> Views:
        return {name: all_views(arrays) for name, arrays in self._container.read_large(group, needs, checksums).items()}


def read_metadata(container: Container, where: str) -> Metadata | None:
    """Read a file's metadata; None if it has none.

    Raises:
        FormatError: if it is damaged, or of another version than the columns.
    """
    if container.metadata is None:
        return None
    metadata, version = parse(container.metadata, where), 2 if container.is_v2 else 1
    if metadata.major != version:
        raise FormatError(f"{where}: its metadata says version {metadata.version[:20]}, but its columns are V{version}")
    return metadata


def parse_row_info(cell: Mapping[str, Any], position: int, is_v2: bool, here: str) -> RowInfo:
    """Make a row of its small cells; `check` still has to check the rules.

    Raises:
        FormatError: if a required cell is null, or the dtype is unknown.
    """
    required = ["layer_name", "shape", "dtype", "num_params"]
    required += ["quant_type", "quant_axis", "group_size"] if is_v2 else []
    for name in required:
        if cell[name] is None:
            raise FormatError(f"{here}: {name} is null")
    if None in cell["shape"]:
        raise FormatError(f"{here}: shape has a null")
    try:
        dtype = parse_dtype(cell["dtype"])
    except FormatError as error:
        raise FormatError(f"{here}: {error}") from None
    shared = {"layer_name": cell["layer_name"], "shape": tuple(cell["shape"]), "dtype": dtype}
    shared |= {"num_params": cell["num_params"], "digest": cell.get("digest")}
    if is_v2:
        shared |= {name: cell[name] for name in ("quant_type", "quant_axis", "group_size")}
        shared |= {name: cell.get(name) for name in ("solver", "cosine", "rel_mse")}
        shared["rotation"] = cell.get("rotation") or 0
    return RowInfo(**shared, position=position, disk_bytes=0)


def make_row(info: RowInfo, columns: Mapping[str, np.ndarray | None], here: str, groups: Groups = None) -> Row:
    """Make a row of its small and large cells, and check them together; of scales and zero points those of `groups`.

    Raises:
        FormatError: if a large cell is null, or does not fit the small ones.
    """
    values: dict[str, Any] = {name: getattr(info, name) for name in _SMALL}
    if "data" not in columns:  # a damaged footer may name a column, and call its chunk by another name
        raise FormatError(f"{here}: its row group has no data")
    for name, view in columns.items():
        if view is None:
            raise FormatError(f"{here}: {name} is null")
        if name != "data":
            kind = info.column_dtype(name)
            if view.nbytes % kind.itemsize:
                raise FormatError(
                    f"{here}: {name} holds {view.nbytes} bytes, which is not a whole number of {kind.name}"
                )
            view = view.view(kind)
        values[name] = view
    row = Row(**values)
    check_arrays(row, here, groups)
    return row
