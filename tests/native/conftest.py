"""Libraries and programs that are compiled for a test."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from aq_jax import native
from aq_jax.native import build, recipe, toolchain

DRIVER = Path(__file__).with_name("driver.cc")
WIDE = Path(__file__).with_name("avx512_by_avx2.h")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="session")
def compiler() -> toolchain.Compiler:
    try:
        return toolchain.find_compiler(recipe.this_machine())
    except toolchain.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def driver() -> Path:
    """The program that calls every kernel, and checks what it gives."""
    return DRIVER


@pytest.fixture
def compile_c(tmp_path: Path, compiler: toolchain.Compiler) -> Callable[[str], Path]:
    """Make a shared library of the text of a C program."""

    def make(text: str) -> Path:
        number = len(list(tmp_path.glob("*.so")))  # a process opens the library of one name only once
        source, library = tmp_path / "made.c", tmp_path / f"made_{number}.so"
        source.write_text(text)
        words = ["-shared", "-fPIC", "-x", "c", str(source), "-o", str(library)]
        subprocess.run([*compiler.command, *words], check=True, capture_output=True, timeout=120)
        return library

    return make


def make_driver(compiler: toolchain.Compiler, target: recipe.Target, flags: tuple[str, ...], link: tuple[str, ...],
                program: Path, files: list[tuple[Path, str, tuple[str, ...]]] | None = None) -> Path:  # fmt: skip
    """Link the driver with all kernels, or with some files, but without what only XLA calls."""
    include = recipe.headers()
    assert include is not None
    if files is None:
        plain = (path for path in recipe.plain_files() if not path.name.startswith("ffi"))
        files = [*((path, "", ()) for path in plain), *recipe.set_files(target)]
    files = [(DRIVER, "", ()), *files]
    kept = tuple(flag for flag in recipe.FLAGS if flag != "-O3")
    build.compile_and_link(compiler, target, files, program, (*kept, *flags), include, link)
    return program


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory, compiler: toolchain.Compiler) -> Path:
    """The driver, every access and every operation of which is checked: it stops at the first bad one."""
    flags = ("-O1", "-g", "-fno-omit-frame-pointer", *SANITIZE)
    program = tmp_path_factory.mktemp("sanitized") / "driver"
    return make_driver(compiler, recipe.this_machine(), flags, (*SANITIZE, "-pthread"), program)


SELECTED = """
#include "kernels.h"

namespace aq {
namespace avx512vnni {
extern const Kernels kernels;
}
const Kernels* const* available() {
  static const Kernels* const selected[] = {&avx512vnni::kernels, nullptr};
  return selected;
}
}  // namespace aq
"""


@pytest.fixture(scope="session")
def widened(tmp_path_factory: pytest.TempPathFactory, compiler: toolchain.Compiler) -> Path:
    """The driver with the kernels for AVX-512 made of AVX2's instructions, and checked as `sanitized` is."""
    target, folder = recipe.this_machine(), tmp_path_factory.mktemp("widened")
    if target.machine != "x86_64" or not native.probe().isas:
        pytest.skip("needs AVX2")
    selected = folder / "selected.cc"
    selected.write_text(SELECTED)
    made_of = ("-mavx2", "-mfma", "-mf16c", "-Wno-psabi", "-include", str(WIDE))
    files = [(path, isa, made_of) for path, isa, _ in recipe.set_files(target) if isa == "avx512vnni"]
    flags = ("-O1", "-g", "-fno-omit-frame-pointer", *SANITIZE)
    return make_driver(
        compiler, target, flags, (*SANITIZE, "-pthread"), folder / "driver", [(selected, "", ()), *files]
    )


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs the driver with the kernels for ARM on this machine."""
    emulator = next(filter(None, map(shutil.which, ("qemu-aarch64", "qemu-aarch64-static"))), None)
    if emulator is None:
        pytest.skip("needs qemu-aarch64: apt install qemu-user")
    target = recipe.Target("aarch64", "linux", "aarch64-linux-musl")
    try:
        compiler = toolchain.find_compiler(target)
    except toolchain.BuildError as error:
        pytest.skip(str(error))
    program = tmp_path_factory.mktemp("emulated") / "driver"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZIG_GLOBAL_CACHE_DIR", str(recipe.FOLDER.parent.parent / "build" / "zig"))  # as make wheels does
        return [emulator, str(make_driver(compiler, target, ("-O2",), ("-static", "-s"), program))]
