"""List what is measured: name -> function of `full` that yields results. A name that ends in "@2" has two cores.

A suite imports what it measures when it runs, in a process of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping

from benchmarks.timing import Line

Suite = Callable[[bool], Iterator[Line]]

PLACES: Mapping[str, str] = {
    "memory": "memory:memory",
    "quantize": "quantize:quantize",
    "pack": "pack:pack",
    "road": "road:road",
    "load": "load:load",
    "qdot": "qdot:qdot",
    "encode": "encode:encode",
    "encode@2": "encode:encode",
    "accuracy@2": "accuracy:accuracy",
    "quality": "quality:quality",
    "size": "size:size",
    "gaussian": "size:gaussian",
    "start": "start:start",
    "stories": "stories:stories",
    "train@2": "training:train",
    "scale": "scale:scale",
}
QUICK = ("quantize", "pack", "road", "load", "qdot", "encode", "accuracy@2", "size", "gaussian")


def suite_at(place: str) -> Suite:
    """Import the function at module:function."""
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(f"benchmarks.suites.{module}"), function)


def _late(place: str) -> Suite:
    return lambda full: suite_at(place)(full)


SUITES: Mapping[str, Suite] = {name: _late(place) for name, place in PLACES.items()}
