"""Compile the native library: `python -m aq_jax.native.build`.

The compiler is $CXX, or else the first of c++, g++ and clang++ that works, or else that of the package `ziglang`.
A library of the same sources, flags and FFI version that is there already is not built again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aq_jax.native.recipe import (
    FLAGS,
    FOLDER,
    LICENSES,
    SOURCES,
    WHY_NOT,
    ZIG_SPELLS,
    Target,
    digest,
    ffi_version,
    headers,
    plain_files,
    set_files,
    this_machine,
)
from aq_jax.native.toolchain import WANTED, BuildError, Compiler, find_compiler, find_ziglang, needs_ziglang, wanted

_WORKERS = 2


def is_built(library: Path, ffi: tuple[int, int]) -> bool:
    """Tell whether a library is there that was made of these sources for this FFI version, by its content."""
    return library.is_file() and digest(ffi).encode() in library.read_bytes()


def build(target: Target, folder: Path = FOLDER) -> Path:
    """Build the library into a folder, unless it is there already; return its path.

    Raises:
        BuildError: if it cannot be built.
    """
    if target.refusal:
        raise BuildError(target.refusal)
    library = folder / target.library
    include, ffi = _interface()
    if is_built(library, ffi):
        _say(f"{library.name} is that of these sources")
    else:
        # Of functions that several objects define, as inline ones of the standard library, the linker takes the first
        # one. So plain code comes first and the newest processor's last: no function needs more than its caller has.
        files = [*((path, "", ()) for path in plain_files()), *set_files(target)]
        flags = (*FLAGS, f'-DAQ_SOURCES="{digest(ffi)}"')
        compiler = find_compiler(target)
        compile_and_link(compiler, target, files, library, flags, include, _shared(target))
        shutil.rmtree(folder / LICENSES, ignore_errors=True)
        if compiler.zig:
            _copy_licenses(folder / LICENSES)
    (folder / WHY_NOT).unlink(missing_ok=True)
    return library


def licenses(folder: Path) -> list[Path]:
    """List the licenses of what is linked into the library of a folder."""
    return sorted((folder / LICENSES).glob("*.txt"))


def _copy_licenses(folder: Path) -> None:
    """Copy the licenses of what ziglang links in: LLVM's runtimes for C++, and its own for what processors lack."""
    if (zig := find_ziglang()) is None:
        return
    folder.mkdir()
    shutil.copyfile(zig / "LICENSE", folder / "compiler_rt.txt")
    for name in ("libcxx", "libcxxabi", "libunwind"):
        shutil.copyfile(zig / "lib" / name / "LICENSE.TXT", folder / f"{name}.txt")


def compile_and_link(
    compiler: Compiler,
    target: Target,
    files: Sequence[tuple[Path, str, tuple[str, ...]]],
    output: Path,
    flags: Sequence[str],
    include: Path,
    link: Sequence[str],
) -> None:
    """Compile files, two at a time, and link them in their order into a file that appears when it is whole.

    Args:
        compiler: the compiler, as `find_compiler` gives it.
        target: the machine to compile for.
        files: (file, instruction set or "", its flags).
        output: the file to write.
        flags: the flags of every file.
        include: the folder of jaxlib's headers.
        link: the flags of the linker.

    Raises:
        BuildError: if the compiler fails, with the first of what it said.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="aq_jax_native_") as name:
        # What ziglang makes of its own libraries is 200 MB, and goes, unless somebody wants it kept.
        env = {"ZIG_GLOBAL_CACHE_DIR": f"{name}/zig", "ZIG_LOCAL_CACHE_DIR": f"{name}/zig"} | dict(os.environ)

        def run(step: int, words: Sequence[str], what: str) -> None:
            _say(f"[{step}/{len(files) + 1}] {what} ({compiler})")
            done = subprocess.run([*compiler.command, *words], env=env, capture_output=True, text=True, check=False)  # noqa: S603
            if done.returncode:
                raise BuildError(f"{compiler} failed on {what}:\n{(done.stderr or done.stdout).strip()[:4000]}")
            if done.stderr.strip():
                _say(done.stderr.strip())

        def compile_one(step: int) -> str:
            path, isa, its = files[step]
            made = f"{name}/{step}.o"
            define = (f"-DAQ_ISA={isa}",) if isa else ()
            its = tuple(ZIG_SPELLS.get(flag, flag) for flag in its) if compiler.zig else its
            words = (*flags, *target.flags, *its, *define, "-iquote", str(SOURCES), "-isystem", str(include))
            run(step + 1, (*words, "-c", str(path), "-o", made), f"{path.name}{f' for {isa}' if isa else ''}")
            return made

        with ThreadPoolExecutor(_WORKERS) as pool:
            objects = list(pool.map(compile_one, range(len(files))))
        fresh = compiler.zig and "ZIG_GLOBAL_CACHE_DIR" not in os.environ
        made_first = ", after libc++, which takes a minute" if fresh else ""
        made = output.with_name(f".{output.name}.{os.getpid()}.tmp")
        try:
            run(len(files) + 1, (*target.flags, *objects, *link, "-o", str(made)), f"linking {output.name}{made_first}")
            made.replace(output)
        finally:
            made.unlink(missing_ok=True)
    _say(f"{output.name}: {output.stat().st_size / 1e6:.1f} MB in {time.monotonic() - began:.0f} s")


def _shared(target: Target) -> tuple[str, ...]:
    """List the flags that link a shared library without symbols, which exports only ours."""
    if target.system == "macos":
        name = f"-Wl,-install_name,@rpath/{target.library}"
        return ("-shared", name, f"-Wl,-exported_symbols_list,{SOURCES / 'exports.macos'}", "-Wl,-x")
    return ("-shared", "-pthread", "-s", f"-Wl,--version-script={SOURCES / 'exports.linux'}")


def _interface() -> tuple[Path, tuple[int, int]]:
    """Find jaxlib's headers, and the FFI version that they are of."""
    include = headers()
    if include is None:
        raise BuildError("jaxlib is not installed here, whose headers the native kernels include: pip install jaxlib")
    return include, ffi_version(include)


def build_or_note(target: Target, folder: Path = FOLDER) -> Path | None:
    """Build the library into a folder, or leave a note there why not, which `aq-jax --version` shows.

    Raises:
        BuildError: with AQ_JAX_NATIVE=yes, if it cannot be built; and if the variable is something else.
    """
    if wanted() == "no":
        why = f"they were left out when the package was built ({WANTED}=no)"
    else:
        try:
            return build(target, folder)
        except BuildError as error:
            if wanted() == "yes":
                raise
            why = str(error)
    (folder / target.library).unlink(missing_ok=True)  # which may be that of other sources
    if not target.refusal:
        (folder / WHY_NOT).write_text(f"{why}\n")
    _say(f"aq_jax is installed without its native kernels, and computes by XLA: {why}")
    return None


def _say(text: str) -> None:
    print(f"native kernels: {text}", file=sys.stderr, flush=True)  # noqa: T201


def main(argv: Sequence[str] | None = None) -> int:
    """Build the library into this package, for this machine; return 0 if it is there."""
    parser = argparse.ArgumentParser(prog="python -m aq_jax.native.build", description=__doc__)
    parser.add_argument("--or-note", action="store_true", help="leave a note where it cannot be built, and go on")
    parser.add_argument("--needs", action="store_true", help="print the package that building takes, if any")
    args = parser.parse_args(argv)
    try:
        if args.needs:
            print("ziglang" if needs_ziglang(this_machine()) else "")  # noqa: T201
        elif args.or_note:
            build_or_note(this_machine())
        else:
            build(this_machine())
    except BuildError as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
