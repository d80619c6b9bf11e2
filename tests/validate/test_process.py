"""Jobs in processes of their own: what they return, raise and take."""

from __future__ import annotations

import multiprocessing
import os
import signal

import numpy as np
import pytest

from aq_jax.errors import AqError, FormatError
from aq_jax.progress import Progress
from aq_jax.validate.process import peak_memory, run_measured


def grab(size: int, progress: Progress) -> int:
    """Has so many bytes for a moment."""
    progress("grabbing", 1, 2)
    return int(np.ones(size, np.uint8).sum())


def fail(text: str, progress: Progress) -> None:
    raise FormatError(text)


def die(status: int, progress: Progress) -> None:
    """As the system ends a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_peak_is_the_jobs_own() -> None:
    ours = np.ones(500 << 20, np.uint8)  # which is no part of it
    said: list[tuple[str, int, int]] = []
    done, peak = run_measured(grab, 100 << 20, lambda *what: said.append(what))
    assert done == 100 << 20
    assert 100 << 20 < peak < 600 << 20 < peak_memory()
    assert said == [("grabbing", 1, 2)]
    assert ours.all()
    assert not multiprocessing.active_children()


def test_what_a_job_raises_is_raised() -> None:
    with pytest.raises(FormatError, match=r"^m\.parquet: is none$"):
        run_measured(fail, "m.parquet: is none")


def test_a_process_that_is_ended_is_said_to_be() -> None:
    with pytest.raises(AqError, match=r"ended with status -9 .*memory"):
        run_measured(die, 0)
