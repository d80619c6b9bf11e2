"""The recipe of the native library: sources, instruction sets, flags, targets, and the digest that names them all.

`build` and the build of a wheel (`hatch_build.py`) compile by it, and `aq_jax.native` knows by it whether a library is
that of the sources beside it. Only the standard library is used: a wheel is built before anything is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import re
import struct
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = FOLDER / "src"
WHY_NOT = "not_built.txt"
"""The file beside that says why there is no library: a build that fails or is not wanted leaves it there."""
LICENSES = "licenses"
"""The folder beside the library with the licenses of what ziglang links into it."""

SUFFIXES = (".cc", ".h", ".linux", ".macos")
"""The files of the folder that a library is made of."""
PLAIN = ("ffi", "dispatch")
"""The beginnings of the names of files that are compiled once; others are compiled once an instruction set."""
SETS = {
    "x86_64": {
        "avx2": ("-mavx2", "-mfma"),
        "avx512vnni": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma"),
    },
    "aarch64": {"neon": ("-march=armv8.2-a+dotprod",)},
}
"""Processor -> instruction set -> flags. The later ones are linked later: see `build`."""
ZIG_SPELLS = {"-march=armv8.2-a+dotprod": "-mcpu=generic+v8_2a+dotprod"}
"""Flags that ziglang has under another name."""
# Without contraction a product and a sum are two roundings, as they are in XLA.
# Sums of integers may wrap on the way to one that does not.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fwrapv", "-fPIC", "-fvisibility=hidden")
_MACHINES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}
_MACOS = "11.0"
_GLIBC = "2.17"


@dataclass(frozen=True)
class Target:
    """A kind of machine to compile for.

    Attributes:
        machine: the processor, as Linux names it.
        system: "linux", "macos", or another, for which there is no library.
        triple: what `ziglang` is to compile for; "" for this machine, by its own compiler.
    """

    machine: str
    system: str
    triple: str = ""

    @property
    def sets(self) -> dict[str, tuple[str, ...]]:
        """The instruction sets that kernels are compiled for; none where there are no native kernels."""
        return SETS.get(self.machine, {}) if self.system in ("linux", "macos") else {}

    @property
    def refusal(self) -> str:
        """The reason why there are no native kernels for this target; "" if there are."""
        return "" if self.sets else f"there are no native kernels for {self.system} on {self.machine}"

    @property
    def library(self) -> str:
        """The library's file name, which must not end as that of a Python module does: tools import all of them."""
        return f"libaq_jax_native.{'dylib' if self.system == 'macos' else 'so.1'}"

    @property
    def wheel_tag(self) -> str:
        """The tag of a wheel that holds the library: any Python 3, no ABI of Python, this platform."""
        machine = {"aarch64": "arm64"}.get(self.machine, self.machine) if self.system == "macos" else self.machine
        if self.system == "macos":
            return f"py3-none-macosx_{_MACOS.replace('.', '_')}_{machine}"
        libc = f"manylinux_{_GLIBC.replace('.', '_')}" if self.triple else "linux"
        return f"py3-none-{libc}_{machine}"

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags that only this system wants."""
        return (f"-mmacosx-version-min={_MACOS}",) if self.system == "macos" and not self.triple else ()

    @property
    def zig_triple(self) -> str:
        """The target to name to `ziglang`: left to itself, it compiles for the processor that it runs on."""
        system = {"linux": f"linux-gnu.{_GLIBC}", "macos": f"macos.{_MACOS}"}[self.system]
        return self.triple or f"{self.machine}-{system}"


def this_machine() -> Target:
    """Find the target that programs of this Python run on."""
    machine = platform.machine().lower()
    machine = _MACHINES.get(machine, machine) if struct.calcsize("P") == 8 else f"32 bits of {machine}"
    system = platform.system()
    return Target(machine, {"Darwin": "macos"}.get(system, system.lower()))


def other_machine(name: str) -> Target:
    """Read the name of a target, such as "aarch64-linux".

    Raises:
        ValueError: if there are no native kernels for it.
    """
    machine, _, system = name.partition("-")
    target = Target(_MACHINES.get(machine, machine), system)
    if target.refusal:
        known = [f"{m}-{s}" for m in SETS for s in ("linux", "macos")]
        raise ValueError(f"target {name!r}: wanted one of {', '.join(known)}")
    return Target(target.machine, target.system, target.zig_triple)


def plain_files() -> list[Path]:
    """List the files that are compiled once."""
    return [path for path in sorted(SOURCES.glob("*.cc")) if path.name.startswith(PLAIN)]


def set_files(target: Target) -> list[tuple[Path, str, tuple[str, ...]]]:
    """List what is compiled once an instruction set: (file, set, its flags), the newest set last."""
    files = [path for path in sorted(SOURCES.glob("*.cc")) if not path.name.startswith(PLAIN)]
    return [(path, isa, flags) for isa, flags in target.sets.items() for path in files]


def headers() -> Path | None:
    """Find the folder of jaxlib's C++ headers, without importing jaxlib."""
    spec = importlib.util.find_spec("jaxlib")
    folders = (spec and spec.submodule_search_locations) or []
    return next(
        (Path(f, "include") for f in folders if Path(f, "include", "xla", "ffi", "api", "ffi.h").is_file()), None
    )


def ffi_version(include: Path) -> tuple[int, int]:
    """Read the version of XLA's foreign function interface from its headers."""
    text = (include / "xla" / "ffi" / "api" / "c_api.h").read_text()
    major, minor = (
        re.search(rf"^#define XLA_FFI_API_{part} (\d+)$", text, re.MULTILINE) for part in ("MAJOR", "MINOR")
    )
    if major is None or minor is None:
        raise ValueError(f"{include}: c_api.h does not say its version")
    return int(major[1]), int(minor[1])


def digest(ffi: tuple[int, int]) -> str:
    """Name the sources, the flags and the interface that a library is made of, by a hash of their content."""
    found = hashlib.sha256(repr((SETS, FLAGS, PLAIN, tuple(ffi))).encode())
    for path in sorted(path for path in SOURCES.iterdir() if path.suffix in SUFFIXES):
        data = path.read_bytes()
        found.update(f"\n{path.name} {len(data)}\n".encode() + data)
    return found.hexdigest()[:32]
