"""Compile the native library: by which compiler, when, and what is said where it cannot be."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from aq_jax.native import build, recipe, toolchain

HERE = recipe.this_machine()
pytestmark = pytest.mark.skipif(bool(HERE.refusal), reason=HERE.refusal)

KERNELS = """
#include "which.h"
__attribute__((weak)) const char* set() { return TEXT(AQ_ISA); }
const char* JOIN(all_, AQ_ISA)() { return which(); }
const char* JOIN(sets_, AQ_ISA)() { return set(); }
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources that compile in no time: every file has a `which` of its own, kernels `set` too."""
    for name in ("CXX", toolchain.WANTED, toolchain.TARGET):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "which.h").write_text("""
        #ifndef AQ_ISA
        #define AQ_ISA plain
        #endif
        #define TEXT_(x) #x
        #define TEXT(x) TEXT_(x)
        #define JOIN_(a, b) a##b
        #define JOIN(a, b) JOIN_(a, b)
        __attribute__((weak)) const char* which() { return TEXT(AQ_ISA); }
        """)
    of = [f"{what}_{isa}" for what in ("all", "sets") for isa in HERE.sets]
    (folder / "kernels.cc").write_text(KERNELS)
    (folder / "ffi.cc").write_text(
        '#include "which.h"\n#include "xla/ffi/api/c_api.h"\n'
        '#define EXPORT extern "C" __attribute__((visibility("default")))\n'
        + "".join(f"const char* {name}();\n" for name in of)
        + "EXPORT const char* aq_sources() { return AQ_SOURCES; }\nEXPORT void not_ours() {}\n"
        "EXPORT const char* aq_plain() { return which(); }\n"
        + "".join(f"EXPORT const char* aq_{name}() {{ return {name}(); }}\n" for name in of)
    )
    for system in ("linux", "macos"):
        name = f"exports.{system}"
        (folder / name).write_bytes((recipe.SOURCES / name).read_bytes())
    for module in (recipe, build):
        monkeypatch.setattr(module, "SOURCES", folder)
    return folder


@pytest.fixture
def compiler(tiny: Path) -> toolchain.Compiler:
    try:
        return toolchain.find_compiler(HERE)
    except toolchain.BuildError as error:
        pytest.skip(str(error))


def said(library: Path, name: str) -> str:
    function = getattr(ctypes.CDLL(str(library)), name)
    function.restype = ctypes.c_char_p
    return function().decode()


def test_a_library_exports_ours_alone_and_takes_the_plainest_of_equal_functions(
    tiny: Path, compiler: toolchain.Compiler, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = build.build(HERE, tmp_path)
    include = recipe.headers()
    assert include is not None
    assert said(library, "aq_sources") == recipe.digest(recipe.ffi_version(include))
    # Linked in another order, a processor without AVX-512 would run into its instructions.
    assert {said(library, f"aq_all_{isa}") for isa in HERE.sets} == {"plain"}
    assert {said(library, f"aq_sets_{isa}") for isa in HERE.sets} == {next(iter(HERE.sets))}
    assert not hasattr(ctypes.CDLL(str(library)), "not_ours")
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".tmp") == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(HERE.sets) + 3
    assert all(line.startswith("native kernels: ") for line in lines)


def test_it_is_built_again_by_content_and_not_by_time(
    tiny: Path, compiler: toolchain.Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = build.build(HERE, tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")  # nothing may be compiled
    os.utime(tiny / "ffi.cc")
    assert build.build(HERE, tmp_path) == library
    old = library.read_bytes()
    os.utime(library, (2e9, 2e9))
    (tiny / "which.h").write_text((tiny / "which.h").read_text() + "// more\n")
    with pytest.raises(toolchain.BuildError, match=r"^CXX = 'no-such-compiler' does not compile C\+\+17 for "):
        build.build(HERE, tmp_path)
    assert library.read_bytes() == old
    monkeypatch.delenv("CXX")
    build.build(HERE, tmp_path)
    assert library.read_bytes() != old


def test_the_digest_is_that_of_sources_flags_and_interface(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {recipe.digest((0, 3)), recipe.digest((0, 4)), recipe.digest((1, 3))}
    monkeypatch.setattr(recipe, "FLAGS", (*recipe.FLAGS, "-g"))
    found.add(recipe.digest((0, 3)))
    (tiny / "which.h").rename(tiny / "that.h")
    found.add(recipe.digest((0, 3)))
    assert len(found) == 5


def test_a_build_that_fails_says_why_and_leaves_a_note(
    tiny: Path, compiler: toolchain.Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    library = build.build(HERE, tmp_path)
    (tiny / "kernels.cc").write_text("#error not today\n")
    assert build.build_or_note(HERE, tmp_path) is None
    assert not library.exists()  # it is that of other sources
    note = (tmp_path / recipe.WHY_NOT).read_text()
    assert f"failed on kernels.cc for {next(iter(HERE.sets))}:" in note
    assert "not today" in note
    assert "native kernels: aq_jax is installed without its native kernels, and computes by XLA: " in (
        capsys.readouterr().err
    )
    monkeypatch.setenv(toolchain.WANTED, "yes")
    with pytest.raises(toolchain.BuildError, match="not today"):
        build.build_or_note(HERE, tmp_path)
    monkeypatch.setenv(toolchain.WANTED, "perhaps")
    with pytest.raises(toolchain.BuildError, match=r"^AQ_JAX_NATIVE = 'perhaps': wanted yes or no$"):
        build.build_or_note(HERE, tmp_path)
    monkeypatch.delenv(toolchain.WANTED)
    (tiny / "kernels.cc").write_text(KERNELS)
    assert build.build_or_note(HERE, tmp_path) == library
    assert not (tmp_path / recipe.WHY_NOT).exists()


def test_ziglang_is_asked_for_only_where_no_compiler_works(
    tiny: Path, compiler: toolchain.Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert toolchain.needs_ziglang(HERE) == compiler.zig
    fake = tmp_path / "c++"  # as on a Mac without its command line tools
    fake.write_text("#!/bin/sh\necho 'error: install the tools' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.needs_ziglang(HERE)
    monkeypatch.setattr(toolchain, "find_ziglang", lambda: None)
    with pytest.raises(toolchain.BuildError, match=r"^no C\+\+17 compiler works here; install g\+\+"):
        toolchain.find_compiler(HERE)
    monkeypatch.setattr(toolchain, "find_ziglang", lambda: tmp_path)
    assert toolchain.find_compiler(HERE).command[-2:] == ("-target", HERE.zig_triple)
    monkeypatch.setenv("CXX", str(fake))
    assert not toolchain.needs_ziglang(HERE)
    with pytest.raises(toolchain.BuildError, match="error: install the tools"):
        toolchain.find_compiler(HERE)
    monkeypatch.setenv(toolchain.WANTED, "no")
    monkeypatch.delenv("CXX")
    assert not toolchain.needs_ziglang(HERE)


TARGETS = [
    ("x86_64-linux", "x86_64-linux-gnu.2.17", "libaq_jax_native.so.1", "py3-none-manylinux_2_17_x86_64"),
    ("aarch64-linux", "aarch64-linux-gnu.2.17", "libaq_jax_native.so.1", "py3-none-manylinux_2_17_aarch64"),
    ("arm64-macos", "aarch64-macos.11.0", "libaq_jax_native.dylib", "py3-none-macosx_11_0_arm64"),
]


@pytest.mark.parametrize(("name", "triple", "library", "tag"), TARGETS)
def test_targets(monkeypatch: pytest.MonkeyPatch, name: str, triple: str, library: str, tag: str) -> None:
    monkeypatch.setenv(toolchain.TARGET, name)
    target = toolchain.chosen_target()
    assert (target.triple, target.library, target.wheel_tag) == (triple, library, tag)
    assert toolchain.needs_ziglang(target)


def test_targets_without_kernels_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(toolchain.TARGET, "riscv64-linux")
    with pytest.raises(
        toolchain.BuildError, match=r"^AQ_JAX_TARGET: target 'riscv64-linux': wanted one of x86_64-linux, "
    ):
        toolchain.chosen_target()
    windows = recipe.Target("x86_64", "windows")
    assert not toolchain.needs_ziglang(windows)
    with pytest.raises(toolchain.BuildError, match=r"^there are no native kernels for windows on x86_64$"):
        build.build(windows)
