"""Load the native kernels: a library of C++ that `build` compiles, which XLA calls on CPUs.

`probe` tells what there is, and imports no jax; `load` registers it with JAX, once a process. Where it cannot be used,
the status says why, and XLA computes the same. AQ_JAX_ISA forces an instruction set.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aq_jax.errors import ConfigError
from aq_jax.native import recipe

ISA = "AQ_JAX_ISA"
"""The variable that forces an instruction set."""
HANDLERS = (
    "aq_quantize_rows",
    "aq_rotate_rows",
    "aq_product",
    "aq_product_of_codes",
    "aq_rows",
    "aq_attention",
    "aq_cached_attention",
    "aq_dequantize",
    "aq_quantize",
    "aq_dequantize_tiles",
)
"""The functions of the library that XLA calls, by the names of their targets."""
FUNCTIONS = ("aq_to_panels", "aq_decode", "aq_decode_tiles", "aq_quantize_groups", "aq_encode_trellis")
"""The functions of the library that are called without JAX."""


@dataclass(frozen=True)
class Status:
    """The state of the native kernels, and the instruction set that they use.

    Attributes:
        isa: the instruction set that they use; "" if they cannot be used.
        isas: those that the library and this processor have, the best first.
        reason: why they cannot be used; "" if they can.
        fault: whether the reason is something that a user can mend.
    """

    isa: str = ""
    isas: tuple[str, ...] = ()
    reason: str = ""
    fault: bool = False

    @property
    def available(self) -> bool:
        """Tell whether the kernels can be used."""
        return not self.reason


class _UnusableError(Exception):
    """The library cannot be used; `fault` says whether a user can mend it."""

    def __init__(self, reason: str, fault: bool = True) -> None:
        super().__init__(reason)
        self.fault = fault


_lock = threading.Lock()
_loaded: Status | None = None


def load() -> Status:
    """Register the native kernels with JAX, when it is called first; return what there is.

    What a user can mend, such as a library for another jaxlib, is warned of.

    Raises:
        ConfigError: if AQ_JAX_ISA asks for what is not there.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            status, library = _open(_library(), apply=True)
            if library is not None:
                status = _register(library, status)
            _loaded = status
            if status.fault:
                text = f"aq_jax computes without its native kernels: {status.reason}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
    return _loaded


def probe(path: Path | None = None) -> Status:
    """Tell whether there are native kernels, without importing jax.

    Args:
        path: the library; by default that of this package.

    Raises:
        ConfigError: if AQ_JAX_ISA asks for what is not there.
    """
    with _lock:
        return _open(path or _library())[0]


def open_library() -> ctypes.CDLL | None:
    """Open the library for calls without JAX; return None where it cannot be used.

    Raises:
        ConfigError: if AQ_JAX_ISA asks for what is not there.
    """
    with _lock:
        return _open(_library(), apply=_loaded is None)[1]


def choose_isa(isa: str) -> None:
    """Make the kernels use an instruction set from now on.

    Raises:
        ConfigError: if the processor or the library does not have it.
    """
    global _loaded
    with _lock:
        status, library = _open(_library())
        status = _choose(library, status, isa, "isa", apply=True)
        _loaded = status if _loaded is not None and _loaded.available else _loaded


def _library() -> Path:
    return recipe.FOLDER / recipe.this_machine().library


def _open(path: Path, apply: bool = False) -> tuple[Status, ctypes.CDLL | None]:
    """Open and check the library at a path, and perhaps apply AQ_JAX_ISA; give none where it cannot be used."""
    library = None
    try:
        library, status = _check(path)
    except _UnusableError as error:
        status = Status(reason=str(error), fault=error.fault)
    if isa := os.environ.get(ISA):
        status = _choose(library, status, isa, ISA, apply)
    return status, library


def _choose(library: ctypes.CDLL | None, status: Status, isa: str, where: str, apply: bool) -> Status:
    if library is None:
        raise ConfigError(f"{where} = {isa!r}: the native kernels cannot be used: {status.reason}")
    if isa not in status.isas or (apply and not library.aq_native_choose(isa.encode())):
        raise ConfigError(f"{where} = {isa!r}: wanted one of {', '.join(status.isas)}")
    return Status(isa, status.isas)


def _check(path: Path) -> tuple[ctypes.CDLL, Status]:
    """Open the library at a path.

    Raises:
        _UnusableError: if it cannot be used here.
    """
    if refusal := recipe.this_machine().refusal:
        raise _UnusableError(refusal, fault=False)
    again = "python -m aq_jax.native.build"
    note = path.with_name(recipe.WHY_NOT)
    if not path.exists():
        if note.exists():
            why, *more = note.read_text().strip().splitlines() or ["they could not be built"]
            raise _UnusableError(f"{why} see {note}" if more else why, fault="AQ_JAX_NATIVE=no" not in why)
        raise _UnusableError(f"they were never built; run {again}")
    broken = f"{path} is broken"
    if not _is_whole(path):
        raise _UnusableError(f"{broken} (it is shorter than it says); run {again}")
    try:
        library = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW)  # nothing else in the process binds to it
        library.aq_native_info.restype = ctypes.c_char_p
        info = json.loads(library.aq_native_info())
        sources, isa, built = info["sources"], info["chosen"], info["built"]
        ffi = (int(info["ffi"][0]), int(info["ffi"][1]))
    except (OSError, AttributeError, TypeError, LookupError, ValueError) as error:
        raise _UnusableError(f"{broken} ({error}); run {again}") from None
    include = recipe.headers()
    if include is None:
        raise _UnusableError(
            "jaxlib has no FFI headers here, which say what it is compatible with; install jaxlib again"
        )
    try:
        here = recipe.ffi_version(include)
    except (OSError, ValueError) as error:
        raise _UnusableError(f"jaxlib's FFI headers cannot be read ({error}); install jaxlib again") from None
    if ffi[:1] != here[:1] or ffi > here:
        text = f"they are for version {_dots(ffi)} of XLA's FFI, and this jaxlib has {_dots(here)}; run {again}"
        raise _UnusableError(text)
    if recipe.SOURCES.is_dir() and sources != recipe.digest(ffi):
        raise _UnusableError(f"they were built of other sources than those in {recipe.SOURCES}; run {again}")
    if not isa:
        raise _UnusableError(f"this processor has none of {', '.join(built)}", fault=False)
    try:
        for name in (*HANDLERS, *FUNCTIONS, "aq_native_choose"):
            getattr(library, name)
        library.aq_native_choose.argtypes = (ctypes.c_char_p,)
        library.aq_native_available.restype = ctypes.c_char_p
        return library, Status(isa, tuple(json.loads(library.aq_native_available())))
    except (AttributeError, TypeError, ValueError) as error:
        raise _UnusableError(f"{broken} ({error}); run {again}") from None


def _is_whole(path: Path) -> bool:
    """Tell whether a file has the size that its ELF header says; others are checked when they are opened.

    To open a file that was cut kills the process.
    """
    with path.open("rb") as file:
        header = file.read(64)
        size = file.seek(0, os.SEEK_END)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return True
    (table,), (entry, count) = struct.unpack_from("<Q", header, 0x28), struct.unpack_from("<HH", header, 0x3A)
    return size >= table + entry * count


def _register(library: ctypes.CDLL, status: Status) -> Status:
    import jax

    try:
        for name in HANDLERS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except Exception as error:  # XLA has no class of its own for it
        first = (str(error).splitlines() or [""])[0]
        return Status(reason=f"XLA does not take them ({first}); run python -m aq_jax.native.build", fault=True)
    return status


def _dots(version: tuple[Any, ...]) -> str:
    return ".".join(map(str, version))
