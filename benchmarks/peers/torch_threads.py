"""torch, with as many threads as this process has cores, or on the GPU that JAX uses."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from benchmarks.peers import MissingLibrary, library


def load_torch() -> ModuleType:
    """Import torch, and set its number of threads.

    Raises:
        MissingLibrary: if it is missing.
    """
    torch = library("torch")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    warnings.filterwarnings("ignore")  # deprecations in the libraries that build on it
    return torch


def on_device(torch: ModuleType, platform: str) -> tuple[str, Callable[[], Any]]:
    """Return torch's name of a platform of JAX, and what waits until its work is done.

    Raises:
        MissingLibrary: if this torch cannot use it.
    """
    if platform == "cpu":
        return "cpu", lambda: None
    if platform != "gpu" or not torch.cuda.is_available():
        raise MissingLibrary(f"this torch cannot use a {platform}")
    return "cuda", torch.cuda.synchronize


def on_processor(platform: str) -> None:
    """Leave a library out where it would compute on another device than JAX.

    Raises:
        MissingLibrary: for any platform but a CPU.
    """
    if platform != "cpu":
        raise MissingLibrary(f"it is measured on CPUs only, and JAX computes on a {platform}")
