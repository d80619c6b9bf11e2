"""Write files atomically, and lock folders for one process."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from aq_jax.errors import ConfigError

LOCK = "lock"
_open: set[str] = set()
"""The temporary names that this process is writing to."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the same folder; the file there replaces `path` if the block succeeds.

    The file is synced to disk before it is renamed, and the folder after. Whatever stops the block, the temporary file
    is removed, with the folders that were made for it; the next writer of the same file removes those that killed
    processes left behind.

    Raises:
        OSError: naming `path`, also for errors on the temporary file, such as a full disk.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with atomic_write(path) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> path.read_text(), len(list(path.parent.iterdir()))
    ('whole', 1)
    """
    missing = [folder for folder in path.parents if not os.path.lexists(folder)]
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    temporary = path.with_name(_hidden(path.name))
    _open.add(temporary.name)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        if os.name == "posix":  # elsewhere a folder cannot be opened, and a rename needs no such care
            _sync(path.parent)
    except OSError as error:
        # pyarrow and `write` name no file, `open` and `shutil` name the temporary one.
        if error.errno is None or str(temporary) not in (str(error.filename or temporary), str(error.filename2)):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
        _open.discard(temporary.name)
        with suppress(OSError):  # as soon as one is not empty
            for folder in missing:
                folder.rmdir()


class EarlySync:
    """A thread that syncs a file's data to disk while it is written, so that the last sync waits for the last part.

    Args:
        path: The file, which exists.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        self._thread = ThreadPoolExecutor(1, "aq_jax sync")
        self._syncs: list[Future[None]] = []  # under way, and waiting for that: at most one each

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._thread.shutdown()
        os.close(self._descriptor)
        if kind is None:
            self._drop_done()

    def start(self) -> None:
        """Sync what is written so far; if a sync is under way, which may have passed some of it, do so after that.

        Raises:
            OSError: if an earlier one failed: the system may report an error once only.
        """
        self._drop_done()
        if all(sync.running() or sync.done() for sync in self._syncs):  # one that waits will see what is written now
            self._syncs.append(self._thread.submit(getattr(os, "fdatasync", os.fsync), self._descriptor))

    def _drop_done(self) -> None:
        for sync in [sync for sync in self._syncs if sync.done()]:
            self._syncs.remove(sync)
            sync.result()


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Lock a folder: its file `lock` is held until the block or the process ends.

    Args:
        folder: The folder, which is made if it is not there.
        busy: The text of the error if another process holds the lock.

    Raises:
        ConfigError: if another process holds the lock.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{folder}: {busy}") from None
        yield


def check_writable(path: Path) -> None:
    """Refuse a path where no file can be made; if its folder is missing, the nearest one above is tried.

    Permissions do not tell: disks may be mounted read-only, and some users may do anything. So a file is made, without
    a name where the system allows, and removed at once.

    Raises:
        OSError: naming the file, or its folder where that cannot be made.

    >>> import tempfile
    >>> check_writable(Path(tempfile.mkdtemp()) / "not" / "yet.txt")
    """
    folder = nearest = path.absolute().parent
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    try:
        _make_file(nearest, _hidden(path.name))
    except OSError as error:
        named = path if nearest == folder else path.parent
        raise OSError(error.errno, os.strerror(error.errno or 0), str(named)) from None


def _make_file(folder: Path, name: str) -> None:
    nameless = getattr(os, "O_TMPFILE", None)
    if nameless is not None:
        try:
            os.close(os.open(folder, os.O_WRONLY | nameless, 0o600))
            return
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.EOPNOTSUPP):  # the kernel or the disk does not have it
                raise
    os.close(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    os.unlink(folder / name)


def _hidden(name: str) -> str:
    return f".{name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
    if os.name != "posix":  # elsewhere `os.kill` cannot ask whether a process lives
        return
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.[0-9a-f]{{8}}\.tmp")
    for other in path.parent.iterdir():
        match = pattern.fullmatch(other.name)
        if match and other.name not in _open and not _lives(int(match[1])):
            with suppress(PermissionError):  # another user's, in a folder of all users
                other.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    if process == os.getpid():  # in a container, the process may have the number of a killed one before it
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):  # no Linux, or just gone
        return True
    return state not in "ZX"  # a zombie, or dead
