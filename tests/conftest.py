"""Shared by all tests: shapes and types are checked while the tests run, and dtypes never widen by themselves."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import jaxtyping
import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from killing import Server

# `make test TORCH=no`: as if torch were not installed, whether or not it is.
if os.environ.get("AQ_JAX_TEST_TORCH") == "no":
    sys.modules["torch"] = None  # type: ignore[assignment]

# Before anything imports these modules: their signatures are then checked at every call and every trace.
# (The quantizers themselves take a protocol, which cannot be checked, and arrays without a shape.)
CHECKED = [
    "aq_jax.core",
    "aq_jax.codes",
    *(f"aq_jax.ops.{name}" for name in ("attention", "preparing", "product", "rows", "values", "xla", "xla_attention")),
    *(f"aq_jax.quantizers.{name}" for name in ("apply", "stream", "tiles")),
    *(f"aq_jax.nn.{name}" for name in ("layers", "swap")),
]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

# What one test has compiled is not compiled again by another, in this process or any that it starts.
CACHE = "JAX_COMPILATION_CACHE_DIR"
if "PYTEST_XDIST_WORKER" not in os.environ:
    _folder = tempfile.TemporaryDirectory(prefix="aq_jax_xla")
    os.environ |= {CACHE: _folder.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}

# `import oracle` works in every folder of tests.
sys.path.insert(0, str(Path(__file__).parent))
# Libraries that `make peers` fetches, with which slow tests compare.
sys.path.append(str(Path(__file__).parent.parent / "build" / "peers"))

# The same examples every time, so that a failure is everybody's failure; compiling takes as long as it takes.
hypothesis.settings.register_profile(
    "aq_jax", derandomize=True, deadline=None, max_examples=15, database=None, print_blob=False
)
hypothesis.settings.load_profile("aq_jax")

STRICT_FOLDERS = ("codes", "core", "ops", "quantizers")
# Small models and tensors, compared with oracles: most of their time is XLA's optimizing what runs once or twice.
# Floats that must equal NumPy's bit for bit (test_grid.py, test_absmax_minmax.py, test_tiles.py, test_ops.py) are
# computed by programs as users have them.
SMALL = {
    *("calibration", "cli", "conversion", "converters", "io", "nn", "shards", "validate"),
    *(f"test_{name}.py" for name in ("apply", "bits_jax", "corpus", "eight_devices", "export", "gptq", "kernels")),
    *(f"test_{name}.py" for name in ("llama", "mse", "open_table", "qtensor", "rotation", "treatment", "trellis")),
    *(f"test_native{name}.py" for name in ("", "_cache", "_codes")),
    *("apply.py", "convert.py", "gptq.py"),  # examples
}
QUICKLY = "jax_disable_most_optimizations"
# Each fusion is compiled by a pipeline of MLIR that is set up anew: half of the time of a small program.
EMITTERS = "xla_cpu_use_fusion_emitters"
_quick: list[str] = []  # modules whose programs were not optimized, and may still be there


@pytest.fixture(scope="module", autouse=True)
def strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the tests of the mathematics, an int32 never meets a float32 by accident."""
    if request.path.parent.name not in STRICT_FOLDERS:
        yield
        return
    import jax

    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile small models without optimizing, here and in child processes; `make test-all` optimizes all of them."""
    if request.config.option.markexpr != "not slow" or not SMALL & {request.path.parent.name, request.path.name}:
        if _quick:
            sys.modules["jax"].clear_caches()
            _quick.clear()
        yield
        return
    import jax
    from jax._src import compiler  # XLA_FLAGS are read once in a process, and these hold for some of its modules

    as_usual = compiler.get_compile_options

    def without_emitters(*args: Any, **options: Any) -> Any:
        found = as_usual(*args, **options)
        found.env_option_overrides = [*found.env_option_overrides, (EMITTERS, False)]
        return found

    _quick.append(str(request.path))
    known = jax.__version_info__ < (0, 11)  # later ones have no such setting, and end a process that is given it
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name != "cli":  # which says which of JAX's variables are set
            patch.setenv(QUICKLY.upper(), "1")
        if known:
            patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --{EMITTERS}=false")
            patch.setattr(compiler, "get_compile_options", without_emitters)
        jax.config.update(QUICKLY, True)
        yield
        jax.config.update(QUICKLY, False)


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of garbage collections: looking through it took a twentieth of all time."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240611)


@pytest.fixture
def weight(rng: np.random.Generator) -> np.ndarray:
    """What a layer looks like: [out, in], rows of different sizes, groups of 32 divide a row."""
    return (rng.normal(size=(6, 64)) * np.geomspace(0.01, 2, 6)[:, None]).astype(np.float32)


@pytest.fixture
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels be chosen: all of the tests may run with one forced."""
    from aq_jax.ops.kernels import VARIABLE

    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A process that runs the jobs of killing.py."""
    from killing import Server

    with Server(tmp_path_factory.mktemp("cache")) as found:
        yield found


@pytest.fixture
def _no_traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`main` is meant to have a process of its own: it sets a signal's handler, and variables unless told not to."""
    monkeypatch.setenv("AQ_JAX_CACHE", "off")
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def run(_no_traces: None, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Calls `main`; gives exit status, standard output and standard error. Any other exception is a traceback."""

    from aq_jax import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = cli.main([str(a) for a in arguments])
        except SystemExit as stop:  # how argparse ends
            status = stop.code if isinstance(stop.code, int) else 1
        return status, *capsys.readouterr()

    return call
