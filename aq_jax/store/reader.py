"""Read tables: small columns when they are opened, a row's bytes on request, and nothing unchecked."""

from __future__ import annotations

import bisect
import difflib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

from aq_jax.errors import FormatError, IntegrityError
from aq_jax.store.digest import row_digest
from aq_jax.store.manifest import check_entry, table_files
from aq_jax.store.metadata import Metadata, check_aliases
from aq_jax.store.row_rules import RowOrder
from aq_jax.store.rows import Row, RowInfo, data_span, row_bytes, row_location
from aq_jax.store.shard import Shard

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence
    from types import TracebackType
    from typing import Any

    from aq_jax.store.schema import Version


def open_table(path: str | os.PathLike[str], verify: bool = True) -> TableReader:
    """Open a table, or a folder of `.parquet` and `.arrow` tables that together are one model.

    Only the small columns are read. Files are told apart by their first bytes, not by their names.

    >>> with open_table("m.parquet") as table:  # doctest: +SKIP
    ...     rows = table.read_tensor("encoder.weight")

    Args:
        path: The table's path.
        verify: Whether to compare each row that is read with its digest, or, if it has none, Parquet's page checksums.

    Raises:
        FileNotFoundError: if there is no such file.
        FormatError: if it is not a table of this format, or a row breaks one of its rules.
        IntegrityError: if rows or metadata were changed.
    """
    return TableReader(Path(path), verify)


class TableReader:
    """An open table: its rows by position, its tensors by name. Threads may share it. See `open_table`."""

    def __init__(self, path: Path, verify: bool = True) -> None:
        self.path = path
        self._verify = verify
        self.bytes_read = 0
        """The bytes of data, scales and zero points read so far, uncompressed; bytes read twice count twice."""
        self._partly_read: set[str] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._shards: list[Shard] = []
        infos: list[RowInfo] = []
        order = RowOrder()
        try:
            files, entries = table_files(path) if path.is_dir() else ([path], None)
            for file, entry in zip(files, entries or [None] * len(files), strict=True):
                shard = Shard(file, len(infos))
                self._shards.append(shard)
                if entry is not None:
                    digest = shard.metadata.digest if shard.metadata else None
                    check_entry(entry, digest, [info.layer_name for info in shard.infos], shard.where)
                for info in shard.infos:
                    order.add(info, shard.where, info.position - shard.start)
                infos.extend(shard.infos)
            order.finish(str(path))
            self.infos: tuple[RowInfo, ...] = tuple(infos)
            self.files: tuple[str, ...] = tuple(file.name for file in files)
            self._starts = [shard.start for shard in self._shards]
            self.names: tuple[str, ...] = tuple(order.names)
            self.version: Version = 2 if any(shard.is_v2 for shard in self._shards) else 1
            self.aliases: dict[str, str] = self._merge_aliases()
            self.metadata: Metadata | None = self._shards[0].metadata
            self.verify_table()
        except BaseException:
            self.close()
            raise
        self._pieces: dict[str, list[RowInfo]] = {}
        for info in self.infos:
            self._pieces.setdefault(info.layer_name, []).append(info)

    @property
    def config(self) -> dict[str, Any]:
        """The config that made the table; empty for tables of other writers."""
        return self.metadata.config if self.metadata else {}

    def pieces(self, name: str) -> list[RowInfo]:
        """List the rows of one tensor, in order, without their arrays.

        Raises:
            KeyError: if there is no tensor and no alias of that name, naming the nearest.
        """
        self.ensure_open()
        try:
            return list(self._pieces[self.aliases.get(name, name)])
        except KeyError:
            near = difflib.get_close_matches(str(name), [*self.names, *self.aliases], 1, cutoff=0.0)
            hint = f"; the nearest is {near[0]!r}" if near else "; the table is empty"
            raise KeyError(f"{self.path}: no layer {name!r}{hint}") from None

    def read_tensor(self, name: str) -> list[Row]:
        """Read all rows of one tensor, in order.

        Raises:
            KeyError: as for `pieces`.
            FormatError, IntegrityError: as for `read`.
        """
        return [self.read(info.position) for info in self.pieces(name)]

    def read(self, position: int) -> Row:
        """Read one row; its arrays are read-only views of the mapped file where possible.

        Args:
            position: The index into `infos`.

        Raises:
            FormatError: if the row breaks a rule of the format.
            IntegrityError: if the row was changed.
        """
        shard = self._shard(position)
        with self._lock:
            self.ensure_open()
            row = shard.read(position - shard.start, self._verify)
            self.bytes_read += row.data.nbytes + row.scales.nbytes + row.zero_points.nbytes
        if self._verify:
            _compare_digest(row, shard, position)
        return row

    def read_part(
        self, position: int, ranges: Sequence[tuple[int, int]], groups: Sequence[tuple[int, int]] | None
    ) -> Row:
        """Read the elements of one row that are in `ranges`; other bytes of `data` are not read, and not valid.

        The row is read whole, by `read`, if the ranges are all of it, or if the file does not hold the bytes as they
        are, because they are compressed, for example. Otherwise no digest can be compared, and the tensor's name is in
        `partly_read` from then on; the rules of scales and zero points are checked. Those are read whole from Parquet,
        where they are compressed; from Arrow IPC only those of `groups` are read, and only they are valid.

        Args:
            position: The index into `infos`.
            ranges: Ranges (start, stop) of the row's elements, ascending, none of which touches another.
            groups: Ranges of the row's groups whose scales and zero points are requested; None for all.

        Raises:
            FormatError, IntegrityError: as for `read`.
        """
        shard, info = self._shard(position), self.infos[position]
        wanted = sum(last - first for first, last in (data_span(info, *each) for each in ranges))
        whole = wanted == row_bytes(info)["data"]
        if whole and self._verify and info.digest is None:
            return self.read(position)  # with the container's checksums
        with self._lock:
            self.ensure_open()
            groups = None if whole else groups
            row = (shard.mapped if ranges else shard.grids)(position - shard.start, groups)
            if row is not None:
                asked = row.scales.size if groups is None or not shard.maps_grids else sum(b - a for a, b in groups)
                share = min(asked, row.scales.size) / max(row.scales.size, 1)
                self.bytes_read += wanted + int(share * (row.scales.nbytes + row.zero_points.nbytes))
                if not whole:
                    self._partly_read.add(info.layer_name)
        if row is None:
            return self.read(position)
        if whole and self._verify:
            _compare_digest(row, shard, position)
        return row

    @property
    def partly_read(self) -> frozenset[str]:
        """The tensors of which rows were read in part, so that their digests could not be compared."""
        with self._lock:
            return frozenset(self._partly_read)

    def _shard(self, position: int) -> Shard:
        if not 0 <= position < len(self.infos):
            raise IndexError(f"{self.path}: has {len(self.infos)} rows, and no row {position}")
        return self._shards[bisect.bisect_right(self._starts, position) - 1]

    def rows(self) -> Iterator[Row]:
        """Read all rows in order."""
        for info in self.infos:
            yield self.read(info.position)

    def verify_table(self) -> None:
        """Compare each file's metadata with its rows; opening does it too, since no tensor data is read.

        Raises:
            IntegrityError: if rows, their statistics or the metadata were changed.
        """
        self.ensure_open()
        for shard in self._shards:
            shard.verify()

    def close(self) -> None:
        """Close the files; arrays that were read stay valid."""
        with self._lock:
            self._closed = True
            for shard in self._shards:
                shard.close()

    def ensure_open(self) -> Self:
        """Return the table itself if it is open.

        Raises:
            ValueError: if it is closed.
        """
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        return self

    def __enter__(self) -> Self:
        return self.ensure_open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _merge_aliases(self) -> dict[str, str]:
        merged: dict[str, str] = {}
        for shard in self._shards:
            for name, target in (shard.metadata.aliases if shard.metadata else {}).items():
                if merged.setdefault(name, target) != target:
                    raise FormatError(
                        f"{shard.where}: alias {name!r} leads to {target!r}, but elsewhere to {merged[name]!r}"
                    )
        check_aliases(merged, self.names, str(self.path))
        return merged


def _compare_digest(row: Row, shard: Shard, position: int) -> None:
    """Refuse a row whose bytes were changed."""
    found = row_digest(row)
    if row.digest is not None and found != row.digest:
        here = row_location(shard.where, position - shard.start, row.layer_name)
        raise IntegrityError(
            f"{here}: its bytes have digest {found.hex()}; wanted {row.digest.hex()}: "
            "the file was damaged or changed; fetch or write it again"
        )
