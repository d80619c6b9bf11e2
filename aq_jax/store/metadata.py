"""The JSON metadata of a table under the key `aq_jax`: its writer, its config, and digests over all of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aq_jax._version import __version__
from aq_jax.errors import FormatError, IntegrityError
from aq_jax.store.digest import canonical_json, statistics_digest, table_digest
from aq_jax.store.rows import row_location
from aq_jax.store.schema import VERSIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from aq_jax.store.rows import RowInfo, Sealed


@dataclass(frozen=True, slots=True)
class Metadata:
    """The metadata of a table."""

    version: str
    """The format's version, such as "2.0"; the major number is the table's."""
    writer: str
    config: dict[str, Any]
    """The resolved configuration that made the table."""
    aliases: dict[str, str]
    """Tied tensors: name -> the stored name."""
    rows: int
    statistics: str
    """Digest over solver, cosine and rel_mse of all rows, hexadecimal."""
    digest: str
    """Digest over the other entries and all row digests, hexadecimal."""
    raw: dict[str, Any]
    """All entries as read, also those of later minor versions: the digest is over them."""

    @property
    def major(self) -> int:
        """The major version."""
        return int(self.version.split(".")[0])


_TYPES = {
    "version": str,
    "writer": str,
    "config": dict,
    "aliases": dict,
    "rows": int,
    "statistics": str,
    "digest": str,
}


def compose_metadata(
    version: int, config: Mapping[str, object], aliases: Mapping[str, str], rows: Sequence[Sealed]
) -> bytes:
    """Write the metadata JSON of a table whose rows have digests.

    Raises:
        FormatError: if the config is not plain JSON.
    """
    entries: dict[str, object] = {
        "version": VERSIONS[version],
        "writer": f"aq_jax {__version__}",
        "config": dict(config),
        "aliases": dict(aliases),
        "rows": len(rows),
        "statistics": statistics_digest(rows).hex(),
    }
    try:
        entries["digest"] = table_digest(entries, [row.digest or b"" for row in rows]).hex()
        text = canonical_json(entries)
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"the config cannot be written as JSON: {error}") from error
    return text


def parse(text: bytes, where: str) -> Metadata:
    """Parse the metadata JSON.

    Raises:
        FormatError: if it is not JSON, lacks an entry, or is of an unknown major version.
    """
    try:
        raw = json.loads(text.decode(), parse_constant=_refuse_constant)
        canonical_json(raw)  # the digest covers it: lone surrogates and numbers beyond all floats have none
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: the aq_jax metadata is not valid JSON: {error}") from error
    if not isinstance(raw, dict) or not isinstance(version := raw.get("version"), str):
        raise FormatError(f"{where}: the aq_jax metadata has no version")
    if version.split(".")[0] not in {str(major) for major in VERSIONS}:
        raise FormatError(
            f"{where}: format version {version[:20]!r} is unknown; this release reads major versions "
            f"{' and '.join(map(str, VERSIONS))}: use a newer aq_jax"
        )
    for key, kind in _TYPES.items():
        if not isinstance(raw.get(key), kind) or isinstance(raw[key], bool):
            raise FormatError(f"{where}: the aq_jax metadata must have {key!r}, a JSON {kind.__name__}")
    if not all(isinstance(target, str) for target in raw["aliases"].values()):
        raise FormatError(f"{where}: the aq_jax metadata has an alias that is not a string")
    return Metadata(**{key: raw[key] for key in _TYPES}, raw=raw)


def verify(metadata: Metadata, rows: Sequence[RowInfo], where: str) -> None:
    """Compare the metadata with the rows of a table; no tensor data is read.

    Raises:
        IntegrityError: if rows were removed, added, reordered or edited, or the metadata was.
    """
    for mismatch in find_mismatches(metadata, rows, where):  # later ones may follow from the first
        raise mismatch


def find_mismatches(metadata: Metadata, rows: Sequence[RowInfo], where: str) -> Iterator[IntegrityError]:
    """Find where metadata and rows do not agree; see `verify`."""
    if metadata.rows != len(rows):
        yield IntegrityError(
            f"{where}: holds {len(rows)} rows, but its metadata says {str(metadata.rows)[:20]}: rows were lost or added"
        )
        return
    digests: list[bytes] = []
    for index, row in enumerate(rows):
        if row.digest is None:
            here = row_location(where, index, row.layer_name)
            yield IntegrityError(f"{here}: has no digest, but the table's metadata is a digest over all of them")
            return
        digests.append(row.digest)
    for what, found, wanted in (
        ("statistics of its rows", statistics_digest(rows).hex(), metadata.statistics),
        ("metadata and row digests", table_digest(metadata.raw, digests).hex(), metadata.digest),
    ):
        if found != wanted:
            yield IntegrityError(
                f"{where}: the {what} have digest {found}; wanted {wanted[:64]}: the file was changed; "
                "fetch or write it again"
            )


def check_aliases(aliases: Mapping[str, str], names: Sequence[str], where: str) -> None:
    """Refuse aliases that hide a stored tensor or lead nowhere."""
    stored = set(names)
    for name, target in aliases.items():
        if not name or name in stored:
            raise FormatError(f"{where}: alias {name[:60]!r} is also the name of a stored tensor")
        if target not in stored:
            raise FormatError(f"{where}: alias {name[:60]!r} leads to {target[:60]!r}, which is not stored")


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
