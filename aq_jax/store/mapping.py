"""Map files into memory without keeping descriptors: a table may have more files than a process may open."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import cache
from typing import IO, Any


def map_file(file: IO[bytes]) -> memoryview:
    """Map an open file, which may be closed afterwards; only pages that are accessed are read.

    `mmap.mmap` keeps a descriptor of its own while the mapping lives, and a process has 1,024 of them.

    Args:
        file: The file, which must not be truncated while it is mapped.

    Returns:
        Its bytes, read-only; the mapping ends with the last view of them.

    Raises:
        OSError: if the system cannot map it.

    >>> import tempfile
    >>> with tempfile.TemporaryFile() as file:
    ...     _ = file.write(b"abc")
    ...     file.flush()
    ...     view = map_file(file)
    >>> bytes(view), view.readonly
    (b'abc', True)
    """
    size = os.fstat(file.fileno()).st_size
    if not size:  # no system maps an empty file
        return memoryview(b"")
    if os.name != "posix":
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    system = _system()
    address = system.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    owner = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(owner, system.munmap, address, size).atexit = False  # views may live until the very end
    return memoryview(owner).cast("B").toreadonly()


def release_pages(view: memoryview) -> None:
    """Give back the memory of a mapped file: pages that are accessed again are mapped again.

    Args:
        view: The view that `map_file` returned.
    """
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if isinstance(view.obj, ctypes.Array) and advice is not None:
        _system().madvise(ctypes.addressof(view.obj), view.nbytes, advice)


@cache
def _system() -> Any:
    system = ctypes.CDLL(None, use_errno=True)
    system.mmap.restype = ctypes.c_void_p
    system.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    )  # fmt: skip
    system.munmap.argtypes = ctypes.c_void_p, ctypes.c_size_t
    system.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return system
