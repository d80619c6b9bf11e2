"""Jobs in processes of their own: what they return, raise and take."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import small_validation

from aq_jax.errors import AqError, FormatError
from aq_jax.validate.process import measured, peak_memory


def test_the_peak_is_the_jobs_own() -> None:
    ours = np.ones(500 << 20, np.uint8)  # which is no part of it
    said: list[tuple[str, int, int]] = []
    done, peak = measured(small_validation.grab, 100 << 20, lambda *what: said.append(what))
    assert done == 100 << 20
    assert 100 << 20 < peak < 600 << 20 < peak_memory()
    assert said == [("grabbing", 1, 2)]
    assert ours.all()
    assert not multiprocessing.active_children()


def test_what_a_job_raises_is_raised() -> None:
    with pytest.raises(FormatError, match=r"^m\.parquet: is none$"):
        measured(small_validation.fail, "m.parquet: is none")


def test_a_process_that_is_ended_is_said_to_be() -> None:
    with pytest.raises(AqError, match=r"ended with status -9 .*memory"):
        measured(small_validation.die, 0)
