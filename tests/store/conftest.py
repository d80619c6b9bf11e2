"""Shared by the tests of the store: sample tables, and the reader that shares no code with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import ModuleType

    from aq_jax.store import Row

TESTS = Path(__file__).parent.parent


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden() -> Path:
    return TESTS / "golden"


@pytest.fixture(scope="session")
def independent() -> ModuleType:
    """tests/independent_reader.py, which imports nothing of aq_jax."""
    return _load(TESTS / "independent_reader.py")


@pytest.fixture(scope="session")
def make() -> ModuleType:
    """tests/golden/make.py."""
    return _load(TESTS / "golden" / "make.py")


@pytest.fixture(scope="session")
def v1_rows(make: ModuleType) -> list[Row]:
    return make.v1_rows()


@pytest.fixture(scope="session")
def v2_rows(make: ModuleType) -> list[Row]:
    return make.v2_rows()


@pytest.fixture(params=["parquet", "arrow"])
def suffix(request: pytest.FixtureRequest) -> str:
    """Either container."""
    return request.param
