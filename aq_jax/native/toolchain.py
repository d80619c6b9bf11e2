"""Choose what is built, for which machine, and by which compiler."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from aq_jax.native.recipe import FLAGS, Target, other_machine, this_machine

WANTED = "AQ_JAX_NATIVE"
"""The variable that says whether a library is built: no, yes (or fail), or where it can be."""
TARGET = "AQ_JAX_TARGET"
"""The variable that names another machine to build for, such as aarch64-linux."""
ZIG = (sys.executable, "-m", "ziglang", "c++")


class BuildError(Exception):
    """The library cannot be built; the message says why, and what to do."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the words of its command, and whether it is ziglang's."""

    command: tuple[str, ...]
    zig: bool = False

    def __str__(self) -> str:
        return "ziglang" if self.zig else shlex.join(self.command)


def wanted() -> str:
    """Read AQ_JAX_NATIVE: "no", "yes", or "" for where it can be.

    Raises:
        BuildError: if it is anything else.
    """
    found = os.environ.get(WANTED, "")
    if found not in ("", "no", "yes"):
        raise BuildError(f"{WANTED} = {found!r}: wanted yes or no")
    return found


def chosen_target() -> Target:
    """Find the target that is asked for: this machine, unless AQ_JAX_TARGET names another.

    Raises:
        BuildError: if there are no native kernels for the one that it names.
    """
    name = os.environ.get(TARGET)
    try:
        return other_machine(name) if name else this_machine()
    except ValueError as error:
        raise BuildError(f"{TARGET}: {error}") from None


def needs_ziglang(target: Target) -> bool:
    """Tell whether building for a target takes the package `ziglang`, installed or not."""
    if target.refusal or wanted() == "no":
        return False
    return bool(target.triple) or (not os.environ.get("CXX") and _own_compiler(target) is None)


def find_compiler(target: Target) -> Compiler:
    """Find a compiler that knows all instruction sets of a target.

    Raises:
        BuildError: if there is none, and if $CXX is set and is none.
    """
    if not target.triple:
        if words := os.environ.get("CXX"):
            compiler = Compiler(tuple(shlex.split(words)))
            if why := _fails(compiler, target):
                raise BuildError(f"CXX = {words!r} does not compile C++17 for {', '.join(target.sets)}: {why}")
            return compiler
        if (compiler := _own_compiler(target)) is not None:
            return compiler
    if find_ziglang() is None:
        raise BuildError("no C++17 compiler works here; install g++ or clang++, or the package ziglang")
    return Compiler((*ZIG, "-target", target.zig_triple), zig=True)


def find_ziglang() -> Path | None:
    """Find the folder of the package ziglang."""
    spec = importlib.util.find_spec("ziglang")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _own_compiler(target: Target) -> Compiler | None:
    """Find the first of the usual compilers that works; macOS has a c++ that only offers to install one."""
    found = (Compiler((name,)) for name in ("c++", "g++", "clang++") if shutil.which(name))
    return next((compiler for compiler in found if not _fails(compiler, target)), None)


def _fails(compiler: Compiler, target: Target) -> str:
    """Compile an empty program with all flags; return what was wrong, in a line, or ""."""
    for flags in target.sets.values():
        command = [*compiler.command, *FLAGS, *target.flags, *flags, "-fsyntax-only", "-x", "c++", "-"]
        try:
            done = subprocess.run(command, input="#include <vector>\n", capture_output=True, text=True, timeout=60)  # noqa: S603
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode:
            return next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
    return ""
