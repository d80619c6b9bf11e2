"""Load the native library, and compute without it where it cannot be used, with the reason."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import aq_jax as aq
from aq_jax import native
from aq_jax.native import recipe

HERE = recipe.this_machine()
pytestmark = pytest.mark.skipif(bool(HERE.refusal), reason=HERE.refusal)
ISAS = tuple(HERE.sets)


def ours() -> tuple[int, int]:
    include = recipe.headers()
    assert include is not None
    return recipe.ffi_version(include)


def library_that_says(info: object, more: str = "") -> str:
    """Write a C program of a library that gives this information about itself."""
    text = info if isinstance(info, str) else json.dumps(info)
    return f"const char *aq_native_info(void) {{ return {json.dumps(text)}; }}\n{more}"


def good(**changed: object) -> dict[str, object]:
    return {"sources": recipe.digest(ours()), "ffi": ours(), "built": ISAS, "chosen": ISAS[0]} | changed


@pytest.fixture(autouse=True)
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.ISA, raising=False)
    monkeypatch.setattr(native, "_loaded", None)


@pytest.fixture
def library() -> native.Status:
    """The library that was built; its tests are skipped where it was not."""
    status = native.probe()
    if not status.available:
        pytest.skip(status.reason)
    return status


MAJOR, MINOR = ours() if recipe.headers() else (0, 0)
LIARS = [
    ((MAJOR + 1, 0), rf"^they are for version {MAJOR + 1}\.0 of XLA's FFI, and this jaxlib has {MAJOR}\.{MINOR}; run "),
    ((MAJOR, MINOR + 1), rf"^they are for version {MAJOR}\.{MINOR + 1} of XLA's FFI, and this jaxlib has "),
    ((MAJOR - 1, 99), rf"^they are for version {MAJOR - 1}\.99 of XLA's FFI, and this jaxlib has "),
]


@pytest.mark.parametrize(("version", "reason"), LIARS)
def test_a_library_for_another_jaxlib_is_not_used(
    compile_c: Callable[[str], Path], version: tuple[int, int], reason: str
) -> None:
    status = native.probe(compile_c(library_that_says(good(ffi=version))))
    assert re.search(reason, status.reason), status.reason
    assert (status.available, status.isa, status.fault) == (False, "", True)


def test_a_library_for_an_older_jaxlib_of_the_same_major_version_is(compile_c: Callable[[str], Path]) -> None:
    older = (MAJOR, MINOR - 1)
    status = native.probe(compile_c(library_that_says(good(ffi=older))))
    assert "of other sources" in status.reason  # its version passed
    handlers = "".join(
        f"void {name}(void) {{}}\n" for name in (*native.HANDLERS, *native.FUNCTIONS, "aq_native_choose")
    )
    available = f"const char *aq_native_available(void) {{ return {json.dumps(json.dumps(ISAS))}; }}\n"
    text = library_that_says(good(ffi=older, sources=recipe.digest(older)), handlers + available)
    assert native.probe(compile_c(text)) == native.Status(ISAS[0], ISAS)


BROKEN = [
    ("", "undefined symbol: aq_native_info|aq_native_info"),
    (library_that_says("not json"), "Expecting value"),
    (library_that_says({"sources": "0"}), "'chosen'"),
    ("const char *aq_native_info(void) { return 0; }", "NoneType"),
    (library_that_says(good()), "aq_quantize_rows"),
]


@pytest.mark.parametrize(("text", "reason"), BROKEN)
def test_a_broken_library_is_not_used(compile_c: Callable[[str], Path], text: str, reason: str) -> None:
    path = compile_c(text)
    status = native.probe(path)
    assert status.reason.startswith(f"{path} is broken (")
    assert re.search(reason, status.reason), status.reason
    assert status.reason.endswith("; run python -m aq_jax.native.build")
    assert status.fault


@pytest.mark.parametrize("data", [b"", b"not a library", b"\x7fELF" + bytes(60)])
def test_a_file_that_is_no_library_is_not_used(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "made.so"
    path.write_bytes(data)
    status = native.probe(path)
    assert (status.available, status.fault) == (False, True)
    assert status.reason.startswith(f"{path} is broken (")


def test_a_library_of_other_sources_is_not_used(compile_c: Callable[[str], Path]) -> None:
    status = native.probe(compile_c(library_that_says(good(sources="0" * 32))))
    assert status.reason == (
        f"they were built of other sources than those in {recipe.SOURCES}; run python -m aq_jax.native.build"
    )
    assert status.fault


def test_a_processor_without_them_is_no_fault(compile_c: Callable[[str], Path]) -> None:
    status = native.probe(compile_c(library_that_says(good(chosen=""))))
    assert status == native.Status(reason=f"this processor has none of {', '.join(ISAS)}", fault=False)


def test_a_missing_library_says_why_it_is_missing(tmp_path: Path) -> None:
    path, note = tmp_path / "made.so", tmp_path / recipe.WHY_NOT
    assert native.probe(path) == native.Status(
        reason="they were never built; run python -m aq_jax.native.build", fault=True
    )
    note.write_text("c++ failed on kernels.cc\n")
    assert native.probe(path) == native.Status(reason="c++ failed on kernels.cc", fault=True)
    note.write_text("c++ failed on kernels.cc:\nline 1: error\nline 2: error\n")
    assert native.probe(path).reason == f"c++ failed on kernels.cc: see {note}"
    note.write_text("they were left out when the package was built (AQ_JAX_NATIVE=no)\n")
    assert not native.probe(path).fault


def test_windows_has_none_and_nobody_is_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = recipe.Target("x86_64", "windows")
    monkeypatch.setattr(recipe, "this_machine", lambda: windows)
    assert native.load() == native.Status(reason="there are no native kernels for windows on x86_64")


def test_a_fault_is_warned_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", lambda: tmp_path / "made.so")
    with pytest.warns(RuntimeWarning, match="^aq_jax computes without its native kernels: they were never built; run "):
        assert not native.load().available
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not native.load().available


def test_what_xla_refuses_is_not_used(library: native.Status, monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("incompatible\nmore")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    with pytest.warns(RuntimeWarning, match=r"XLA does not take them \(incompatible\); run "):
        assert not native.load().available


def test_a_library_that_was_cut_is_not_opened(library: native.Status, tmp_path: Path) -> None:
    whole = (recipe.FOLDER / recipe.this_machine().library).read_bytes()
    path = tmp_path / "cut.so.1"
    for size in (200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "shorter than it says" in native.probe(path).reason


def test_an_instruction_set_is_forced_by_the_variable(
    library: native.Status, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for isa in library.isas:
        monkeypatch.setenv(native.ISA, isa)
        monkeypatch.setattr(native, "_loaded", None)
        before = library.isas[0] if isa != library.isas[0] else library.isas[-1]
        native.choose_isa(before)
        assert native.probe() == native.Status(isa, library.isas)
        monkeypatch.delenv(native.ISA)
        assert native.probe().isa == before  # which looks, and changes nothing
        monkeypatch.setenv(native.ISA, isa)
        assert native.load().isa == isa
        monkeypatch.delenv(native.ISA)
        assert native.probe().isa == isa
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setenv(native.ISA, "sse9")
    wanted = f"^AQ_JAX_ISA = 'sse9': wanted one of {', '.join(library.isas)}$"
    for ask in (native.probe, native.load):
        with pytest.raises(aq.ConfigError, match=wanted):
            ask()
    with pytest.raises(
        aq.ConfigError, match=r"^AQ_JAX_ISA = 'sse9': the native kernels cannot be used: they were never"
    ):
        native.probe(tmp_path / "made.so")
    monkeypatch.delenv(native.ISA)
    with pytest.raises(aq.ConfigError, match=r"^isa = 'sse9': wanted one of "):
        native.choose_isa("sse9")
    native.choose_isa(library.isas[0])
    assert native.load() == library


def test_the_version_names_the_kernels(run: Callable[..., tuple[int, str, str]], library: native.Status,
                                       monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # fmt: skip
    assert run("--version") == (0, f"aq-jax {aq.__version__}\nnative kernels: {library.isa}\n", "")
    found = json.loads(run("--version", "--json")[1])["native"]
    assert found == {"available": True, "isa": library.isa, "isas": list(library.isas), "reason": "", "fault": False}
    monkeypatch.setenv(native.ISA, "sse9")
    status, out, err = run("--version")
    assert (status, out) == (2, "")
    assert "AQ_JAX_ISA = 'sse9': wanted one of" in err
    monkeypatch.delenv(native.ISA)
    monkeypatch.setattr(native, "_library", lambda: tmp_path / "made.so")
    assert run("--version")[1].splitlines()[1].startswith("native kernels: none: they were never built; run ")


def test_a_broken_library_stops_nothing(compile_c: Callable[[str], Path]) -> None:
    liar = compile_c(library_that_says(good(ffi=(MAJOR + 1, 0))))
    code = f"""
import warnings, pathlib
warnings.simplefilter("ignore")
from aq_jax import native
native._library = lambda: pathlib.Path({str(liar)!r})
import jax.numpy as jnp, aq_jax as aq
y = aq.qdot(jnp.ones((2, 64)), aq.quantize(jnp.ones((4, 64)), "int8"), activations="int8")
print(native.load().available, y[0, 0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["False", "64.0"]), done.stderr
