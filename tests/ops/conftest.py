from collections.abc import Iterator

import pytest

from aq_jax import native
from aq_jax.ops.kernels import VARIABLE

STATUS = native.load()


@pytest.fixture
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels be chosen: all of the tests may run with one forced."""
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture(params=STATUS.isas)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Use each instruction set of this machine in turn."""
    native.choose_isa(request.param)
    yield request.param
    native.choose_isa(STATUS.isa)
