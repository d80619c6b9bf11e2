"""What children of the benchmarks run in tests: nothing that takes long to import."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

from benchmarks.peers import MissingLibrary
from benchmarks.timing import Line, Result, Skipped


def trivial() -> dict[str, object]:
    """A child's contenders."""

    def noisy() -> list[int]:
        print("what libraries print is no answer")
        return [1, 2]

    def broken() -> None:
        raise ValueError("no such thing")

    return {"noisy": noisy, "slow": lambda: time.sleep(0.05), "add": lambda a, b: a + b, "object": object,
            "broken": broken, "exit": lambda: sys.exit("the end")}  # fmt: skip


def absent(module: str) -> dict[str, object]:
    """A child without its library, but for one."""
    if module == "there":
        return {"a": lambda: None}
    raise MissingLibrary(f"{module} is not installed")


def broken(_: int) -> dict[str, object]:
    """A child that fails before it has contenders."""
    raise ValueError("no such thing")


def remembering(module: str) -> dict[str, object]:
    """A child whose answers depend on how often it was asked."""
    count: list[int] = []

    def call() -> float:
        count.append(1)
        return float(len(count))

    return {f"{module}|8": call}


def toy(full: bool) -> Iterator[Line]:
    """A suite."""
    assert os.environ["MALLOC_TRIM_THRESHOLD_"]
    yield Result("toy", 2.0 if full else 1.0, "x speed", peer="other", low=0.5, high=3.0)
    yield Skipped("gone", "not installed")
