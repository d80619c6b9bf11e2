"""Cross two lists of parameters: in the default tests each value occurs, in `make test-all` each pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def crossed(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """List all pairs; those off the diagonals of the shorter list are slow."""
    shorter = min(len(first), len(second))
    return [
        pytest.param(*_flat(a), *_flat(b), marks=() if i % shorter == j % shorter else pytest.mark.slow)
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]


def _flat(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
