from collections.abc import Callable, Iterator

import jax
import pytest

from aq_jax import native

STATUS = native.load()


@pytest.fixture(scope="module", autouse=True)
def on_a_processor(request: pytest.FixtureRequest) -> None:
    """Leave native kernels out where programs are for an accelerator, which has none."""
    if request.path.name.startswith("test_native") and jax.default_backend() != "cpu":
        pytest.skip("JAX computes on an accelerator; JAX_PLATFORMS=cpu tests native kernels")


@pytest.fixture
def isas() -> Iterator[Callable[[], Iterator[str]]]:
    """Use each instruction set of this machine in turn, in a test that compiles its programs once for all of them."""

    def each() -> Iterator[str]:
        for name in STATUS.isas:
            native.choose_isa(name)
            yield name

    yield each
    native.choose_isa(STATUS.isa)


@pytest.fixture(params=STATUS.isas)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Use each instruction set of this machine in turn."""
    native.choose_isa(request.param)
    yield request.param
    native.choose_isa(STATUS.isa)
