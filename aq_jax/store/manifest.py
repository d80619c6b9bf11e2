"""The manifest of a table that is a folder of files: it lists them with their digests.

It is written last, after all files, so that a folder that has one is whole.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from aq_jax._version import __version__
from aq_jax.errors import FormatError, IntegrityError
from aq_jax.store.container import KINDS
from aq_jax.store.digest import table_digest
from aq_jax.store.jsonfile import parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

MANIFEST = "manifest.json"
KIND = "aq_jax table"
VERSION = "1.0"
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.parquet|\.arrow)")
_MAX_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One file of a table.

    Args:
        file: The file's name, in the same folder.
        bytes: The file's size.
        digest: The digest in its metadata, hexadecimal: over its rows' digests and the metadata itself.
        tensors: The names of its tensors, in order.
    """

    file: str
    bytes: int
    digest: str
    tensors: tuple[str, ...]


def shard_name(index: int, count: int) -> str:
    """Name a shard; the first has index 0.

    >>> shard_name(0, 12)
    'weights-00001-of-00012.parquet'
    """
    return f"weights-{index + 1:05}-of-{count:05}.parquet"


def compose_manifest(shards: Sequence[ShardEntry], config: Mapping[str, object]) -> bytes:
    """Write the JSON text of a manifest; its `digest` covers everything else.

    Raises:
        FormatError: if it would be too long to be read.
    """
    entries: dict[str, Any] = {
        "kind": KIND,
        "version": VERSION,
        "writer": f"aq_jax {__version__}",
        "config": dict(config),
        "bytes": sum(shard.bytes for shard in shards),
        "shards": [asdict(shard) | {"tensors": list(shard.tensors)} for shard in shards],
    }
    entries["digest"] = table_digest(entries).hex()
    text = json.dumps(entries, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    if len(text) > _MAX_BYTES:
        raise FormatError(
            f"the manifest of {len(shards)} files would be {len(text)} bytes long; at most {_MAX_BYTES} are read"
        )
    return text


def parse_manifest(text: bytes, where: str) -> tuple[ShardEntry, ...]:
    """Parse the files that a manifest names.

    Raises:
        FormatError: if it is not JSON, of another version, or an entry is missing or wrong.
        IntegrityError: if it was changed.
    """
    found = parse_json(text, where, object)
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise FormatError(f"{where}: not the manifest of a table; wanted kind {KIND!r}")
    if str(found.get("version")).partition(".")[0] != VERSION.partition(".")[0]:
        version = str(found.get("version"))[:20]
        raise FormatError(f"{where}: version {version!r} is unknown; this release reads {VERSION}: use a newer aq_jax")
    try:
        digest = table_digest(found).hex()
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: {error}") from None
    shards = found.get("shards")
    if not isinstance(shards, list) or not shards:
        raise FormatError(f"{where}: names no files; wanted a list, shards")
    parsed = tuple(_entry(entry, f"{where}: shard {index + 1}") for index, entry in enumerate(shards))
    files = [shard.file for shard in parsed]
    if doubled := [file for file, times in Counter(files).items() if times > 1]:
        raise FormatError(f"{where}: names {doubled[0]!r} more than once; wanted each file once")
    if digest != found.get("digest"):
        written = str(found.get("digest"))[:64]
        raise IntegrityError(
            f"{where}: has digest {digest}; wanted {written}: it was changed; fetch or write all files again"
        )
    return parsed


def _entry(entry: object, where: str) -> ShardEntry:
    kinds = {"file": str, "bytes": int, "digest": str, "tensors": list}
    if not isinstance(entry, dict):
        raise FormatError(f"{where}: is {str(entry)[:60]!r}; wanted an object")
    for key, kind in kinds.items():
        if type(entry.get(key)) is not kind:
            raise FormatError(f"{where}: {key} is {str(entry.get(key))[:60]!r}; wanted a JSON {kind.__name__}")
    file, tensors = entry["file"], entry["tensors"]
    if not _is_plain(file):
        raise FormatError(f"{where}: names the file {file[:80]!r}; wanted a .parquet or .arrow of the same folder")
    if not all(isinstance(name, str) for name in tensors):
        raise FormatError(f"{where}: names a tensor that is not a string")
    return ShardEntry(file, entry["bytes"], entry["digest"], tuple(tensors))


def _is_plain(file: str) -> bool:
    plain = file.isprintable() and not file.startswith(".") and not set(file) & set('/\\:"')
    return plain and file.endswith(tuple(KINDS)) and len(file.encode()) <= 255


def table_files(folder: Path) -> tuple[list[Path], tuple[ShardEntry, ...] | None]:
    """List the files of a table that is a folder, and their entries in its manifest, if it has one.

    Without a manifest these are all tables in it, by name; hidden files are ignored.

    Raises:
        FormatError: if there is no file, or some of `NAME-00001-of-00003` are missing.
        IntegrityError: if a file of the manifest is missing, or has another size.
    """
    manifest = folder / MANIFEST
    entries = read_manifest(folder)
    if entries is not None:
        for entry in entries:
            file = folder / entry.file
            if not file.is_file():
                raise IntegrityError(f"{manifest}: names {entry.file}, which is missing; fetch it, or write it again")
            if (size := file.stat().st_size) != entry.bytes:
                raise IntegrityError(f"{file}: has {size} bytes, but its manifest says {entry.bytes}; fetch it again")
        return [folder / entry.file for entry in entries], entries
    files = list_tables(folder)
    for file in files:
        if file.is_symlink() and not file.exists():
            raise FormatError(f"{file}: is a link to a file that is not there; fetch it, or remove the link")
    files = [file for file in files if file.is_file()]
    if not files:
        raise FormatError(f"{folder}: the folder holds no .parquet or .arrow file")
    _refuse_gaps(folder, [file.name for file in files])
    return files, None


def list_tables(folder: Path) -> list[Path]:
    """List the entries of a folder whose names are those of tables, sorted; hidden files are ignored."""
    return sorted(file for file in folder.iterdir() if file.suffix in KINDS and not file.name.startswith("."))


def read_manifest(folder: Path) -> tuple[ShardEntry, ...] | None:
    """Read a folder's manifest; None if there is none.

    Raises:
        FormatError, IntegrityError: as for `parse_manifest`; and if it is not a file, or too long.
    """
    manifest = folder / MANIFEST
    if not os.path.lexists(manifest):
        return None
    if not manifest.is_file():
        raise FormatError(f"{manifest}: is not a file, or a broken link; fetch it, or remove it")
    if (size := manifest.stat().st_size) > _MAX_BYTES:
        raise FormatError(f"{manifest}: is {size} bytes long; a manifest is read up to {_MAX_BYTES}")
    return parse_manifest(manifest.read_bytes(), str(manifest))


def check_entry(entry: ShardEntry, digest: str | None, rows: Sequence[str], where: str) -> None:
    """Refuse a file whose digest or names are not those in the manifest."""
    if digest != entry.digest:
        raise IntegrityError(
            f"{where}: has digest {digest or 'none'}, but its manifest says {entry.digest[:64]}: it belongs to another "
            "table or conversion; fetch or write all files again"
        )
    names = tuple(dict.fromkeys(rows))
    if names != entry.tensors:
        raise IntegrityError(
            f"{where}: its manifest names other tensors than the {len(names)} that it holds; "
            "fetch or write all files again"
        )


def _refuse_gaps(folder: Path, names: Sequence[str]) -> None:
    found: dict[tuple[str, str, str], set[int]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            stem, index, count, suffix = match.groups()
            found.setdefault((stem, count, suffix), set()).add(int(index))
    for (stem, count, suffix), there in found.items():
        missing = [i for i in range(1, int(count) + 1) if i not in there]
        if missing:
            raise FormatError(
                f"{folder}: lacks {stem}-{missing[0]:05}-of-{count}{suffix}, and {len(missing) - 1} others; a "
                "conversion that was interrupted goes on when it is run again"
            )
