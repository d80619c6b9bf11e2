"""The house itself: what is public, who imports whom, and the wheel that is built of it."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import aq_jax
from aq_jax.native import recipe, toolchain

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "aq_jax"

# Imports go down only: to a lower floor, or within one's own folder. Lazy ones too.
ORDER = (
    "_version", "__init__", "errors", "cores", "progress", "worker", "native", "codes", "config", "store", "core",
    "ops", "quantizers", "io", "nn", "calibration", "conversion", "converters", "validate", "cli",
)  # fmt: skip
FLOORS = {name: floor for floor, name in enumerate(ORDER)}
# Whose business it is to know a library.
ALLOWED = {
    "pyarrow": {"store"},
    "flax": {"nn", "calibration", "validate", "converters"},
    "orbax": {"converters", "calibration"},
    "optax": {"calibration"},
    "transformers": {"converters", "nn"},
    "tokenizers": {"converters", "nn", "calibration"},
    "rich": {"cli"},
    "jax": set(ORDER[ORDER.index("core") :]) | {"codes", "native"} - {"cli"},
}


def sources() -> Iterator[tuple[str, Path]]:
    """Every module's floor and file."""
    for path in sorted(PACKAGE.rglob("*.py")) + sorted((PACKAGE / "converters").rglob("*.py")):
        yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path


def imports(path: Path, floor: str) -> Iterator[tuple[str, bool, int]]:
    """(module, whether it is imported when the file is, line), without what is only imported for types."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool, int]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, at_import, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            # `from aq_jax import ops` names a module, `from aq_jax.config import QuantSpec` does not.
            for alias in node.names:
                yield (f"aq_jax.{alias.name}" if module == "aq_jax" else module), at_import, node.lineno
        inside = at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text()), True)


def test_every_module_has_a_floor() -> None:
    assert {floor for floor, _ in sources()} <= set(FLOORS)
    assert {"converters", "store", "core", "quantizers"} <= {floor for floor, _ in sources()}


def test_imports_go_down_only() -> None:
    wrong = []
    for floor, path in sources():
        for module, _, line in imports(path, floor):
            top, _, rest = module.partition(".")
            here = f"{path.relative_to(ROOT)}:{line}: {module}"
            if top == "converters":
                wrong.append(f"{here}: wanted aq_jax.converters")
            if top != "aq_jax":
                continue
            target = rest.partition(".")[0]
            if target not in FLOORS:  # a public name, such as aq_jax.__version__
                if target and target not in aq_jax.__all__:
                    wrong.append(f"{here}: unknown")
            elif FLOORS[target] > FLOORS[floor]:
                wrong.append(f"{here}: from floor {FLOORS[floor]} up to {FLOORS[target]}")
    assert not wrong, "\n".join(wrong)


def test_libraries_are_imported_where_they_belong() -> None:
    wrong = []
    for floor, path in sources():
        for module, at_import, line in imports(path, floor):
            top = module.partition(".")[0]
            here = f"{path.relative_to(ROOT)}:{line}: {module}"
            if top == "torch" and at_import:
                wrong.append(f"{here}: torch is imported only where a torch tensor is made or read")
            if top in ALLOWED and floor not in ALLOWED[top]:
                wrong.append(here)
            if module.startswith("jax._src"):
                wrong.append(f"{here}: is private")
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_the_bare_converters() -> None:
    files = [f for folder in ("tests", "benchmarks") for f in (ROOT / folder).rglob("*.py")]
    for path in files:
        for module, _, line in imports(path, ""):
            assert module.partition(".")[0] != "converters", f"{path}:{line}"


# ------------------------------------------------------------------------------------------------ public names


@pytest.mark.parametrize("name", [name for name in aq_jax.__all__ if not name.startswith("__")])
def test_public_names_are_documented_and_point_where_they_are_defined(name: str) -> None:
    value = getattr(aq_jax, name)
    if not isinstance(value, type | type(inspect)) and not callable(value):
        return  # a table of quantizers: its module says what it is
    text = inspect.getdoc(value)
    assert text, f"{name} has no docstring"
    assert len(text.splitlines()[0]) > 20
    # A dataclass without one is given its signature.
    assert not text.startswith(f"{name}("), f"{name} has no docstring of its own"


def test_all_names_are_there_and_no_others() -> None:
    assert len(set(aq_jax.__all__)) == len(aq_jax.__all__)
    assert set(dir(aq_jax)) == set(aq_jax.__all__)
    with pytest.raises(AttributeError, match="module 'aq_jax' has no attribute 'nonsense'"):
        aq_jax.nonsense  # noqa: B018
    # What type checkers see is what is there.
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(aq_jax.__all__) - {"__version__"}


def test_names_are_resolved_when_they_are_used() -> None:
    code = """
import sys
import aq_jax
assert not {"jax", "numpy", "pyarrow", "torch"} & set(sys.modules), "importing the package imported too much"
aq_jax.QuantizationConfig(), aq_jax.AqError, aq_jax.load_config
assert not {"jax", "numpy", "pyarrow", "torch"} & set(sys.modules), "a config imported too much"
aq_jax.load
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["huggingface", "checkpoint", "llama2c", "orbax", "orbax.metadata"])
def test_converters_are_one_module_under_one_name(name: str) -> None:
    module = importlib.import_module(f"aq_jax.converters.{name}")
    assert module.__name__ == f"aq_jax.converters.{name}"
    assert module.__file__ is not None
    here = ROOT.joinpath("converters", *name.split("."))
    wanted = here / "__init__.py" if hasattr(module, "__path__") else here.with_suffix(".py")
    assert Path(module.__file__).resolve() == wanted


# ------------------------------------------------------------------------------------------------ the wheel


def copied(tree: Path) -> Path:
    """Copy what a distribution is built of."""
    tree.mkdir()
    for name in ("README.md", "LICENSE", "pyproject.toml", "hatch_build.py", ".gitignore"):
        shutil.copyfile(ROOT / name, tree / name)
    shutil.copytree(PACKAGE, tree / "aq_jax", ignore=shutil.ignore_patterns("__pycache__"))
    return tree


def hatchling_builds(tree: Path, folder: Path, what: str, variable: str, value: str) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", what, "-d", str(folder)]
    env = os.environ | {variable: value}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = folder.iterdir()
    return made


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package_and_works_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="building a wheel needs hatchling")
    # Built from a copy: what git does not know must not get into it, and nothing is written into the tree.
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__", ".git", "build", "dist", ".*cache", ".hypothesis", "tests", "shared")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignore)
    here = recipe.this_machine()
    try:
        toolchain.find_compiler(here)
        native = not here.refusal
    except toolchain.BuildError:
        native = False
    wheel = hatchling_builds(tree, tmp_path / "dist", "wheel", toolchain.WANTED, "yes" if native else "no")
    assert wheel.name == f"aq_jax-{aq_jax.__version__}-{here.wheel_tag if native else 'py3-none-any'}.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(archive.read(n).decode() for n in names if n.endswith(".dist-info/METADATA"))
    wanted = {str(path.relative_to(ROOT)) for _, path in sources()} | {"aq_jax/py.typed", "aq_jax/validate/page.css"}
    wanted |= {str(path.relative_to(ROOT)) for path in recipe.SOURCES.iterdir()}
    assert wanted <= names
    beside = {name for name in names if re.fullmatch(r"aq_jax/native/[^/]*(?<!\.py)", name)}
    assert beside == ({f"aq_jax/native/{here.library}", "aq_jax/native/NOTICE"} if native else {"aq_jax/native/NOTICE"})
    strangers = {name for name in names if not name.startswith(("aq_jax/", "aq_jax-"))}
    assert not strangers
    assert f"Version: {aq_jax.__version__}" in metadata
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata.count("Requires-Dist: ") >= len(project["dependencies"])

    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile",
               "--disable-pip-version-check", "--target", str(target), str(wheel)]  # fmt: skip
    done = subprocess.run(install, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import aq_jax, aq_jax.cli
from aq_jax.converters import huggingface
assert aq_jax.__file__.startswith(sys.argv[1]), aq_jax.__file__
assert huggingface.__file__.startswith(sys.argv[1]), huggingface.__file__
from aq_jax import native
assert native.probe().available or not int(sys.argv[3]), native.probe()
assert aq_jax.cli.main(["inspect", sys.argv[2]]) == 0
"""
    table = ROOT / "tests" / "golden" / "v2.parquet"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(target), str(table), str(int(native))],
        cwd=tmp_path, env={"PATH": "", "AQ_JAX_CACHE": "off"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "schema V2" in done.stdout


def test_a_source_distribution_holds_what_the_library_is_built_of(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="building a distribution needs hatchling")
    tree = copied(tmp_path / "tree")
    (tree / "aq_jax" / "native" / "libaq_jax_native.so.1").write_bytes(b"for this machine alone")
    archive = hatchling_builds(tree, tmp_path / "dist", "sdist", toolchain.WANTED, "")
    with tarfile.open(archive) as held:
        names = {name.partition("/")[2] for name in held.getnames()}
    wanted = {str(path.relative_to(ROOT)) for path in recipe.SOURCES.iterdir()} | {"aq_jax/native/build.py"}
    assert wanted | {"hatch_build.py", "pyproject.toml"} <= names
    assert not any("libaq_jax_native" in name for name in names)


def test_a_wheel_that_is_to_have_no_library_is_for_any_platform(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="building a wheel needs hatchling")
    tree = copied(tmp_path / "tree")
    before = sorted((tree / "aq_jax" / "native").iterdir())
    wheel = hatchling_builds(tree, tmp_path / "dist", "wheel", toolchain.WANTED, "no")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("aq_jax/native/not_built.txt") == (
            b"they were left out when the package was built (AQ_JAX_NATIVE=no)\n"
        )
        assert "aq_jax/native/libaq_jax_native.so.1" not in archive.namelist()
    assert sorted(path for path in (tree / "aq_jax" / "native").iterdir() if path.name != "__pycache__") == before
