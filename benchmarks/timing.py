"""Time contenders in turn, round by round, so that a machine that slows down slows all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHORT = 0.01  # seconds


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one contender.

    Args:
        times: of its rounds.
        first: what the first call, before any round, took longer than the median: compilation, mostly.
    """

    times: tuple[float, ...]
    first: float

    @property
    def median(self) -> float:
        return float(np.median(self.times))


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of two contenders: the median of the rounds' ratios, and their quartiles."""

    value: float
    low: float
    high: float


def ratio(over: Timing, under: Timing) -> Ratio:
    """over / under, round by round: what slowed a whole round is in neither."""
    found = [a / b for a, b in zip(over.times, under.times, strict=False)]  # one may have left early
    low, value, high = np.quantile(found, (0.25, 0.5, 0.75))
    return Ratio(float(value), float(low), float(high))


def race(
    contenders: Mapping[str, Callable[[], object]], rounds: int = 9, patience: float = math.inf
) -> dict[str, Timing]:
    """Time each contender once a round; a call must not return before its work is done.

    Args:
        contenders: by name. One with a method `seconds` is timed by that: it runs in another process.
        rounds: at most.
        patience: seconds; a contender whose first call took longer runs in one round only.
    """
    first, rest = {}, {name: [] for name in contenders}
    for name, call in contenders.items():
        first[name] = _seconds(call)
    for number in range(rounds):
        for name, call in contenders.items():
            if number == 0 or first[name] <= patience:
                rest[name].append(_seconds(call))
    return {name: Timing(tuple(times), max(first[name] - float(np.median(times)), 0.0)) for name, times in rest.items()}


def _seconds(call: Callable[[], object]) -> float:
    timed = getattr(call, "seconds", None)
    return seconds_of(call) if timed is None else timed()


def seconds_of(call: Callable[[], object]) -> float:
    """Time a call; of short ones, the mean of several that follow the first, which finds the caches cold."""
    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    if once >= SHORT:
        return once
    count = int(SHORT / max(once, SHORT / 1000)) + 1
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the report: a ratio or a figure, and what it should be.

    Args:
        case: what was measured.
        value: the figure.
        unit: of it; those that begin with "x " are ratios, which may be compared from day to day.
        least: what it must be, as text.
        goal: what it should be.
        note: for readers.
        peer: beside what, if it is a ratio.
        low, high: quartiles over the rounds.
        figures: what else was measured, by name.
        made: of what it was made, by name: digests, texts, what it stands beside.
    """

    case: str
    value: float
    unit: str
    least: str = ""
    goal: str = ""
    note: str = ""
    peer: str = ""
    low: float | None = None
    high: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Skipped:
    """What was not measured, and why."""

    case: str
    reason: str


Line = Result | Skipped


def beside(
    case: str, peer: str, theirs: Timing, ours: Timing, least: str = "", goal: str = "", note: str = ""
) -> Result:
    """Tell how many times as fast as a peer we are, with both medians in milliseconds."""
    found = ratio(theirs, ours)
    figures = {"ms": 1e3 * ours.median, "their ms": 1e3 * theirs.median}
    return Result(case, found.value, "x speed", least, goal, note, peer, found.low, found.high, figures)
