"""torch, with as many threads as this process has cores."""

from __future__ import annotations

import os
import warnings
from types import ModuleType

from benchmarks.peers import library


def load_torch() -> ModuleType:
    """Import torch, and set its number of threads.

    Raises:
        MissingLibrary: if it is missing.
    """
    torch = library("torch")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    warnings.filterwarnings("ignore")  # deprecations in the libraries that build on it
    return torch
