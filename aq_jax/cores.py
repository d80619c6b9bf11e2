"""The processors that this process may work on."""

from __future__ import annotations

import os

_processes = 1


def cores() -> int:
    """Count the processors of this process: its share, where several processes work beside each other.

    >>> cores() >= 1
    True
    """
    of_all = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, of_all // _processes)


def share_cores(processes: int) -> None:
    """Say that so many processes, this one among them, work on this machine."""
    global _processes
    _processes = processes
