"""Time contenders in turn, round by round, so that a machine that slows down slows all of them.

Each round has another order: whoever comes after a contender finds the caches as that one left them, which made a
product with 45 MB up to a tenth faster than itself.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHORT = 0.01  # seconds


@dataclass(frozen=True, slots=True)
class Timing:
    """The seconds of one contender.

    Args:
        times: The seconds of its rounds.
        first: The seconds by which the first call, before any round, exceeded the median: mostly compilation.
    """

    times: tuple[float, ...]
    first: float

    @property
    def median(self) -> float:
        return float(np.median(self.times))


@dataclass(frozen=True, slots=True)
class Ratio:
    """The ratio of two contenders: the median of the rounds' ratios, and their quartiles."""

    value: float
    low: float
    high: float


def ratio(over: Timing, under: Timing) -> Ratio:
    """Compute over / under round by round, so that a slow round slows both."""
    found = [a / b for a, b in zip(over.times, under.times, strict=False)]  # one may have run fewer rounds
    low, value, high = np.quantile(found, (0.25, 0.5, 0.75))
    return Ratio(float(value), float(low), float(high))


def race(
    contenders: Mapping[str, Callable[[], object]], rounds: int = 9, patience: float = math.inf
) -> dict[str, Timing]:
    """Time each contender once a round; a call must not return before its work is done.

    Args:
        contenders: The contenders by name. One with a method `seconds`, in another process, is timed by that.
        rounds: The largest number of rounds.
        patience: The seconds of a first call after which a contender runs in one round only.
    """
    first, rest = {}, {name: [] for name in contenders}
    for name, call in contenders.items():
        first[name] = _seconds(call)
    for number in range(rounds):
        for name, call in random.Random(number).sample(list(contenders.items()), len(contenders)):
            if number == 0 or first[name] <= patience:
                rest[name].append(_seconds(call))
    return {name: Timing(tuple(times), max(first[name] - float(np.median(times)), 0.0)) for name, times in rest.items()}


def _seconds(call: Callable[[], object]) -> float:
    timed = getattr(call, "seconds", None)
    return seconds_of(call) if timed is None else timed()


def seconds_of(call: Callable[[], object]) -> float:
    """Time one call; if it is short, the mean of several that follow the first, which finds the caches cold."""
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
    """One line of the report: a ratio or a figure, and its goal.

    Args:
        case: The name of the measurement.
        value: The figure.
        unit: The unit; "x ..." marks a ratio, which may be compared from day to day.
        least: The limit that the figure must keep, as text.
        goal: The value that it should reach, as text.
        note: A note for readers.
        peer: The peer of a ratio.
        low, high: The quartiles over the rounds.
        figures: Further figures by name.
        made: The origin of the measured table, by name: digests, texts, the tables that it is compared with.
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
    """A measurement that was skipped, and the reason."""

    case: str
    reason: str


Line = Result | Skipped


def compare(
    case: str,
    peer: str,
    theirs: Timing,
    ours: Timing,
    least: str = "",
    goal: str = "",
    note: str = "",
    figures: Mapping[str, float] | None = None,
) -> Result:
    """Compare our speed with a peer's: the ratio, and both medians in milliseconds if no other figures are given."""
    found = ratio(theirs, ours)
    if figures is None:
        figures = {"ms": 1e3 * ours.median, "their ms": 1e3 * theirs.median}
    return Result(case, found.value, "x speed", least, goal, note, peer, found.low, found.high, figures)
