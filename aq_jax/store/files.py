"""Files that appear whole or not at all, and folders that one process has."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aq_jax.errors import ConfigError

LOCK = "lock"
_open: set[str] = set()
"""Temporary names that this process is writing to."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder; what was written there takes the place of `path` if the block succeeds.

    The file is on disk before it is renamed, and the folder after. Whatever stops the block, the temporary file is
    removed, and what a killed process left behind is removed by the next writer of the same file.

    Raises:
        OSError: with the name of `path`, also where what went wrong did so under the temporary one: a full disk, say.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with replacing(path) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> path.read_text(), len(list(path.parent.iterdir()))
    ('whole', 1)
    """
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
        # pyarrow and `write` name no file, `open` and `shutil` one that nobody has asked for.
        if error.errno is None or str(temporary) not in (str(error.filename or temporary), str(error.filename2)):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
        _open.discard(temporary.name)


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Have a folder to oneself: its file `lock` is held, and goes with the process that holds it.

    Args:
        folder: is made.
        busy: what the error says if another process has it.

    Raises:
        ConfigError: if another process has it.
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
    """Refuse the name of a file that cannot be made; of a folder that is not there, the nearest above it is tried.

    Permissions do not tell: disks may be mounted for reading only, and some users may do anything. So a file is made,
    without a name where the system has such, and goes at once.

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
            if error.errno not in (errno.EISDIR, errno.EOPNOTSUPP):  # what a kernel or a disk says that has no such
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
    if process == os.getpid():  # in a container, each run may have the number of the one before it, which was killed
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
    return state not in "ZX"  # killed, and only waiting for its parent to take note
