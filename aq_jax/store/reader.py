"""Reads tables: what they hold when they are opened, a row's bytes when they are asked for, and nothing on trust."""

from __future__ import annotations

import bisect
import difflib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

from aq_jax.errors import FormatError, IntegrityError
from aq_jax.store.digest import row_digest
from aq_jax.store.manifest import check_entry, files_of
from aq_jax.store.metadata import Metadata, check_aliases
from aq_jax.store.rows import Row, RowInfo, RowOrder, at, row_bytes, span
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
        path: of the table.
        verify: compare each row that is read with its digest, or, where it has none, with Parquet's page checksums.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: it is not a table of this format, or a row breaks one of its rules.
        IntegrityError: rows or metadata are not those that were written.
    """
    return TableReader(Path(path), verify)


class TableReader:
    """An open table: its rows by position, its tensors by name. Threads may share it. See `open_table`."""

    def __init__(self, path: Path, verify: bool = True) -> None:
        self.path = path
        self._verify = verify
        self.bytes_read = 0
        """Of data, scales and zero points, uncompressed; what is read twice counts twice."""
        self._partly_read: set[str] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._shards: list[Shard] = []
        infos: list[RowInfo] = []
        order = RowOrder()
        try:
            files, entries = files_of(path) if path.is_dir() else ([path], None)
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
        """What the table says of how it was made; nothing for tables of other writers."""
        return self.metadata.config if self.metadata else {}

    def pieces(self, name: str) -> list[RowInfo]:
        """List what is known of the rows of one tensor, in order.

        Raises:
            KeyError: there is no tensor of that name, and no alias; the nearest name is said.
        """
        self.opened()
        try:
            return list(self._pieces[self.aliases.get(name, name)])
        except KeyError:
            near = difflib.get_close_matches(str(name), [*self.names, *self.aliases], 1, cutoff=0.0)
            hint = f"; the nearest is {near[0]!r}" if near else "; the table is empty"
            raise KeyError(f"{self.path}: no layer {name!r}{hint}") from None

    def read_tensor(self, name: str) -> list[Row]:
        """Read all rows of one tensor, in order.

        Raises:
            KeyError: as `pieces`.
            FormatError, IntegrityError: as `read`.
        """
        return [self.read(info.position) for info in self.pieces(name)]

    def read(self, position: int) -> Row:
        """Read one row; its arrays are read-only views of the file's memory where that is possible.

        Args:
            position: index into `infos`.

        Raises:
            FormatError: the row breaks a rule of the format.
            IntegrityError: the row is not the one that was written.
        """
        shard = self._shard(position)
        with self._lock:
            self.opened()
            row = shard.read(position - shard.start, self._verify)
            self.bytes_read += row.data.nbytes + row.scales.nbytes + row.zero_points.nbytes
        if self._verify:
            _compare_digest(row, shard, position)
        return row

    def read_part(
        self,
        position: int,
        ranges: Sequence[tuple[int, int]],
        groups: Sequence[tuple[int, int]] | None = None,
    ) -> Row:
        """Read one row, of whose elements only those in `ranges` may be looked at: no other bytes of `data` are read.

        The row is read whole, as `read` does, if the ranges are all of it, or if the file does not hold the bytes as
        they are: compressed, for example. Otherwise it can be compared with no digest, and its name is in `partly_read`
        from then on; the rules of scales and zero points are checked. Those are read whole from Parquet, where they are
        compressed; of Arrow IPC none but those of `groups` are, or may be looked at.

        Args:
            position: index into `infos`.
            ranges: of the row's elements, (start, stop); ascending, none touches another.
            groups: of the row's groups, those whose scales and zero points are asked for, as `ranges`; None for all.

        Raises:
            FormatError, IntegrityError: as `read`.
        """
        shard, info = self._shard(position), self.infos[position]
        wanted = sum(last - first for first, last in (span(info, *each) for each in ranges))
        whole = wanted == row_bytes(info)["data"]
        if whole and self._verify and info.digest is None:
            return self.read(position)  # with the container's checksums
        with self._lock:
            self.opened()
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
        """Tensors of which rows were read in part, so that their digests could not be compared."""
        with self._lock:
            return frozenset(self._partly_read)

    def _shard(self, position: int) -> Shard:
        if not 0 <= position < len(self.infos):
            raise IndexError(f"{self.path}: has {len(self.infos)} rows, there is no row {position}")
        return self._shards[bisect.bisect_right(self._starts, position) - 1]

    def rows(self) -> Iterator[Row]:
        """Read all rows in order."""
        for info in self.infos:
            yield self.read(info.position)

    def verify_table(self) -> None:
        """Compare each file's metadata with its rows; reads no tensor data, so that opening does it too.

        Raises:
            IntegrityError: rows, their statistics or the metadata are not those that were written.
        """
        self.opened()
        for shard in self._shards:
            shard.verify()

    def close(self) -> None:
        """Close the files; arrays that were read stay valid."""
        with self._lock:
            self._closed = True
            for shard in self._shards:
                shard.close()

    def opened(self) -> Self:
        """Give the table itself, as long as it is open.

        Raises:
            ValueError: it is closed.
        """
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        return self

    def __enter__(self) -> Self:
        return self.opened()

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
                        f"{shard.where}: alias {name!r} leads to {target!r}, elsewhere to {merged[name]!r}"
                    )
        check_aliases(merged, self.names, str(self.path))
        return merged


def _compare_digest(row: Row, shard: Shard, position: int) -> None:
    """Refuses a row whose bytes are not those that were written."""
    found = row_digest(row)
    if row.digest is not None and found != row.digest:
        here = at(shard.where, position - shard.start, row.layer_name)
        raise IntegrityError(
            f"{here}: its bytes have digest {found.hex()}, written was {row.digest.hex()}: "
            "the file was damaged or changed; fetch or write it again"
        )
