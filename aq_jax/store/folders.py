"""Read and write folders of files, on this machine or at a URL of any filesystem that pyarrow knows."""

from __future__ import annotations

import fnmatch
import os
import secrets
import urllib.parse
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import pyarrow as pa
from pyarrow import fs

from aq_jax.errors import ConfigError, FormatError
from aq_jax.store.entries import Entry, local_entries
from aq_jax.store.files import atomic_write, check_writable
from aq_jax.store.urls import is_fsspec, is_url, quoted

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK = 8 << 20


@dataclass(frozen=True, slots=True)
class FileState:
    """The state by which a file is recognized: its size, and its time in nanoseconds since 1970 (None if unknown)."""

    size: int
    modified: int | None


class Folder:
    """A folder whose files are read and written by names relative to it, with `/` between parts.

    Args:
        location: A path, or a URL such as `s3://bucket/model` or `file:///data/model`.

    Raises:
        ConfigError: for a URL of a filesystem that pyarrow does not know; by all methods but those that list, for a
            path that is not UTF-8, which pyarrow does not open.

    >>> import tempfile
    >>> folder = Folder(tempfile.mkdtemp())
    >>> folder.write("notes/a.json", b"{}")
    >>> folder.glob("notes/*.json"), folder.read("notes/a.json"), folder.state("b")
    (['notes/a.json'], b'{}', None)
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self.location = os.fspath(location)
        self.local: Path | None = None
        """Its path on this machine; None if it is elsewhere."""
        if is_url(self.location):
            try:
                self._system, self._base = fs.FileSystem.from_uri(quoted(self.location))
            except (pa.ArrowException, ValueError, OSError, ImportError) as error:
                what = "cannot be reached" if isinstance(error, OSError) else "no such filesystem"
                raise ConfigError(
                    f"{self.location}: {what}: {error}; wanted a path, or a URL such as s3://bucket/folder"
                ) from None
            if isinstance(self._system, fs.LocalFileSystem):
                self.local = Path(self._base)
        else:
            self._system, self._base = fs.LocalFileSystem(), os.path.abspath(self.location)
            self.local = Path(self.location)

    def __str__(self) -> str:
        return self.location

    @property
    def absolute(self) -> str:
        """The location in a form that other processes understand."""
        return str(self.local.absolute()) if self.local is not None else self.location

    def join(self, name: str) -> str:
        """Join a name to the folder's path or URL."""
        return str(self.local / name) if self.local is not None else f"{self.location.rstrip('/')}/{name}"

    def exists(self) -> bool:
        """Tell whether the folder exists; a bucket has only folders that hold files."""
        return self._info("").type == fs.FileType.Directory

    def holds(self, name: str) -> bool:
        """Tell whether there is a file or a folder of that name."""
        return self._info(name).type != fs.FileType.NotFound

    def state(self, name: str) -> FileState | None:
        """Return the state of a file; None if there is no such file."""
        info = self._info(name)
        if info.type != fs.FileType.File:
            return None
        return FileState(int(info.size), None if info.mtime is None else info.mtime_ns)

    def names(self) -> list[str]:
        """List the names of files and folders in it, sorted."""
        return sorted(name for name, _ in self._list(""))

    def entries(self, name: str = "") -> list[Entry]:
        """List its entries, or those of a folder in it, by name; `Entry` says which links are followed."""
        if self.local is not None:
            return local_entries(self.local, name)
        infos = self._infos(name)
        kinds: dict[fs.FileType, Literal["file", "folder"]] = {
            fs.FileType.File: "file", fs.FileType.Directory: "folder",
        }  # fmt: skip
        entries = (Entry(info.base_name, kinds.get(info.type, "other"), int(info.size or 0)) for info in infos)
        return sorted(entries, key=lambda entry: entry.name)

    def check_writable(self, name: str) -> None:
        """Refuse a name that cannot be written on this machine; nothing is left behind.

        Raises:
            ConfigError: for a path that is not UTF-8.
            OSError: naming the file, or its folder where that cannot be made.
        """
        if self.local is not None:
            _check_utf8(str(self.local / name))
            check_writable(self.local / name)

    def glob(self, pattern: str) -> list[str]:
        """List the files that match, sorted; `*` stops at `/`, and the pattern may have one `/`."""
        above, _, last = pattern.rpartition("/")
        folders = [name for name, is_file in self._list("") if not is_file] if above else [""]
        found: list[str] = []
        for folder in folders:
            if fnmatch.fnmatchcase(folder, above):
                inside = [name for name, is_file in self._list(folder) if is_file and fnmatch.fnmatchcase(name, last)]
                found += [f"{folder}/{name}" if folder else name for name in inside]
        return sorted(found)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Read a file, or a range of it, which is shorter than `length` where the file ends.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        with self._translate_errors(name), self._system.open_input_file(self._path(name)) as file:
            if length is None:
                return file.read()
            return file.read_at(max(0, min(length, file.size() - offset)), offset)

    def copy_range(self, name: str, offset: int, length: int, to: BinaryIO) -> None:
        """Append a range of a file to an open one, a block at a time.

        Raises:
            FormatError: if the file ends before the range does.
        """
        with self._translate_errors(name), self._system.open_input_file(self._path(name)) as file:
            for start in range(offset, offset + length, _BLOCK):
                count = min(_BLOCK, offset + length - start)
                block = file.read_at(count, start)
                if len(block) != count:
                    raise FormatError(
                        f"{self.join(name)}: ends within bytes {start} to {start + count}; fetch it again"
                    )
                to.write(block)

    def write(self, name: str, data: bytes) -> None:
        """Write a file, which appears whole or not at all."""
        with self.atomic_write(name) as path:
            path.write_bytes(data)

    @contextmanager
    def atomic_write(self, name: str) -> Iterator[Path]:
        """Yield a path on this machine to write to; if the block succeeds, the file appears in the folder, whole."""
        if self.local is not None:
            with atomic_write(self.local / name) as temporary:
                yield temporary
            return
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name.rpartition("/")[2])
            yield path
            above, _, last = name.rpartition("/")
            target = self._path(name)
            # An upload that breaks off may leave a partial file under the name that was opened.
            hidden = f".{last}.{secrets.token_hex(4)}.tmp"
            temporary = self._path(f"{above}/{hidden}" if above else hidden)
            with self._translate_errors(name), ExitStack() as stack:
                self._system.create_dir(target.rpartition("/")[0], recursive=True)
                stack.callback(self._delete_quietly, temporary)
                fs.copy_files(
                    str(path), temporary, source_filesystem=fs.LocalFileSystem(), destination_filesystem=self._system
                )
                self._system.move(temporary, target)
                stack.pop_all()

    @contextmanager
    def place(self, name: str) -> Iterator[Path]:
        """Yield a path to write to, as `atomic_write`, for a writer whose files appear whole by themselves."""
        if self.local is not None:
            yield self.local / name
            return
        with self.atomic_write(name) as path:
            yield path

    def _delete_quietly(self, path: str) -> None:
        with suppress(pa.ArrowException, OSError):
            self._system.delete_file(path)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.state(name) is not None:
            with self._translate_errors(name):
                self._system.delete_file(self._path(name))

    def remove_folder(self, name: str) -> None:
        """Remove a folder in it, with all that it holds, if it is there."""
        if self._info(name).type == fs.FileType.Directory:
            with self._translate_errors(name):
                self._system.delete_dir(self._path(name))

    def _path(self, name: str) -> str:
        path = f"{self._base.rstrip('/')}/{name}" if name else self._base
        _check_utf8(path)
        return path

    def _info(self, name: str) -> fs.FileInfo:
        with self._translate_errors(name):
            return self._system.get_file_info(self._path(name))

    def _infos(self, name: str) -> list[fs.FileInfo]:
        with self._translate_errors(name):
            return self._system.get_file_info(fs.FileSelector(self._path(name), allow_not_found=True))

    def _list(self, name: str) -> list[tuple[str, bool]]:
        """List the names in a folder, and which are files'; what is neither a file nor a folder is left out."""
        if self.local is not None:  # pyarrow lists no folder that holds a name which is not UTF-8
            try:
                with os.scandir(self.local / name) as found:
                    return [(item.name, item.is_file()) for item in found if item.is_file() or item.is_dir()]
            except FileNotFoundError:
                return []
        kinds = (fs.FileType.File, fs.FileType.Directory)
        return [(info.base_name, info.type == kinds[0]) for info in self._infos(name) if info.type in kinds]

    @contextmanager
    def _translate_errors(self, name: str) -> Iterator[None]:
        """Turn errors of any filesystem into OSErrors that name the file."""
        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(
                2, "No such file or directory", self.join(name) if name else self.location
            ) from None
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise
            raise OSError(error.errno or 5 if isinstance(error, OSError) else 5, str(error), self.join(name)) from error


def _check_utf8(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{path}: is not UTF-8; wanted names that are, above it too: rename it, or name another"
        ) from None


def split_url(location: str | os.PathLike[str]) -> tuple[Folder, str]:
    """Split the path or URL of a file into its folder and its name.

    >>> split_url("build/m.parquet")[1], split_url("file:///build/my%20model.parquet")[1]
    ('m.parquet', 'my model.parquet')
    >>> str(split_url("file:///m.parquet")[0])
    'file:///'
    """
    text = os.fspath(location)
    if not is_url(text):
        return Folder(Path(text).parent), Path(text).name
    above, _, name = text.rpartition("/")
    above += "/" if above.endswith("//") else ""  # file:///m.parquet is in the root
    verbatim = is_fsspec(text.partition("://")[0])
    return Folder(above), name if verbatim else urllib.parse.unquote(name)
