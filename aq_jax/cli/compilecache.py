"""Keep JAX's compiled programs between runs, and remove those that are half-written.

JAX writes an entry in place and never replaces one: what a killed run left of one would cost every later run a warning
and the time to compile.
"""

from __future__ import annotations

import os
import time
import zlib
from contextlib import suppress
from pathlib import Path

FOLDER_VARIABLE = "AQ_JAX_CACHE"
_VARIABLES = {
    "JAX_COMPILATION_CACHE_DIR": "",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
_ENTRY, _STAMP = "-cache", ".aq_jax_checked"
_SETTLED = 10.0
"""Seconds after the last byte, when nobody is writing an entry any more."""
_BLOCK = 1 << 20


def use_compile_cache() -> Path | None:
    """Tell JAX to keep compiled programs in the user's cache folder, unless AQ_JAX_CACHE is "off".

    JAX reads these variables when it is imported; the user's own settings go before ours.

    Returns:
        The folder, if it is ours and not one that the user gave to JAX.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        try:
            folder = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "aq_jax", "xla"))
        except RuntimeError:  # a user without a home
            folder = "off"
    if folder == "off":
        return None
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value or folder)
    return Path(folder) if os.environ["JAX_COMPILATION_CACHE_DIR"] == folder else None


def remove_truncated(folder: Path) -> None:
    """Remove truncated entries of a cache; those that are older than the last check are whole.

    Entries that cannot be read or removed stay: a cache is no reason to fail.

    Args:
        folder: The folder of the cache, which need not exist.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name, data in (("a-cache", zlib.compress(b"program")), ("b-cache", zlib.compress(b"program")[:-1])):
    ...     _ = (folder / name).write_bytes(data)
    ...     os.utime(folder / name, (0, 0))
    >>> remove_truncated(folder)
    >>> [path.name for path in folder.glob("*-cache")]
    ['a-cache']
    """
    stamp, settled = folder / _STAMP, time.time() - _SETTLED
    with suppress(OSError):
        checked = stamp.stat().st_mtime if stamp.exists() else -1.0
        for entry in list(os.scandir(folder)):
            with suppress(OSError):
                if (
                    entry.name.endswith(_ENTRY)
                    and checked <= entry.stat().st_mtime <= settled
                    and _is_truncated(entry.path)
                ):
                    os.unlink(entry.path)
        stamp.touch()
        os.utime(stamp, (settled, settled))


def _is_truncated(path: str) -> bool:
    """Return whether a file holds only the beginning of a zlib stream or of a zstd frame."""
    with open(path, "rb") as file:
        head = file.read(18)
        size = os.fstat(file.fileno()).st_size
        if len(head) < 5:
            return True  # shorter than anything that JAX writes
        if head[:4] == b"\x28\xb5\x2f\xfd":
            flags = head[4]
            single = flags >> 5 & 1
            at = 5 + (not single) + (0, 1, 2, 4)[flags & 3] + ((1 if single else 0), 2, 4, 8)[flags >> 6]
            last = False
            while not last:
                file.seek(at)
                block = int.from_bytes(header := file.read(3), "little")
                last, kind = bool(block & 1), block >> 1 & 3
                at += 3 + (1 if kind == 1 else block >> 3)
                if len(header) < 3 or at > size:
                    return True
            return at + 4 * (flags >> 2 & 1) > size
        if head[0] != 0x78:
            return False  # another format, of a later JAX
        stream, data = zlib.decompressobj(), head
        while data and not stream.eof:
            try:
                stream.decompress(data)
            except zlib.error:
                return True  # something overwrote it, and nobody can read it
            data = file.read(_BLOCK)
        return not stream.eof
