"""Contenders side by side: in turn, round by round, so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one contender.

    Args:
        median: over the rounds.
        first: what the first call, before any round, took longer than the median: compilation, mostly.
    """

    median: float
    first: float


def race(contenders: Mapping[str, Callable[[], object]], rounds: int = 9) -> dict[str, Timing]:
    """Time each contender once a round; a call must not return before its work is done."""
    first, rest = {}, {name: [] for name in contenders}
    for name, call in contenders.items():
        first[name] = _seconds(call)
    for _ in range(rounds):
        for name, call in contenders.items():
            rest[name].append(_seconds(call))
    return {name: Timing(m := statistics.median(times), max(first[name] - m, 0.0)) for name, times in rest.items()}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the report: a ratio or a figure, and what it should be."""

    what: str
    value: float
    unit: str
    least: str
    goal: str
    note: str = ""
