"""Shared by the tests of the store: sample tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from golden import make

if TYPE_CHECKING:
    from aq_jax.store import Row

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    return TESTS / "golden"


@pytest.fixture(scope="session")
def v1_rows() -> list[Row]:
    return make.v1_rows()


@pytest.fixture(scope="session")
def v2_rows() -> list[Row]:
    return make.v2_rows()


@pytest.fixture(params=["parquet", "arrow"])
def suffix(request: pytest.FixtureRequest) -> str:
    """Either container."""
    return request.param
