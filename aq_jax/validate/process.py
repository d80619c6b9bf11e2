"""Run a job in a process of its own, so that its peak of memory is its own."""

from __future__ import annotations

import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from aq_jax.errors import AqError
from aq_jax.worker import Worker, WorkerDied, stop

if TYPE_CHECKING:
    from aq_jax.progress import Progress

A = TypeVar("A")
R = TypeVar("R")


def run_measured(job: Callable[[A, Progress], R], argument: A, progress: Progress | None = None) -> tuple[R, int]:
    """Run a job, and tell what it returns and how many bytes its process had in memory at its peak.

    The process is a fresh interpreter (see `worker.Worker`).

    Args:
        job: function of a module, called with the argument and a callback.
        argument: argument of the job; it can be pickled, as what the job returns or raises.
        progress: callback that is given what the job gives to its own.

    Raises:
        AqError: if the process ends without an answer, as when the system kills it for its memory.
        Exception: what the job raises.

    >>> done, peak = run_measured(aq_jax.convert, config)  # doctest: +SKIP
    """
    worker, patience = Worker(_work, job, argument), 0.0
    try:
        while True:
            kind, *content = worker.receive()
            if kind == "progress":
                if progress is not None:
                    progress(*content)
                continue
            patience = 60.0  # it has nothing to do but to go
            if kind == "error":
                raise content[0]
            return content[0], content[1]
    except WorkerDied as error:
        raise AqError(f"while it converted, {error}") from None
    finally:
        stop([worker], patience)


def _work(connection: Connection, job: Callable[[Any, Progress], Any], argument: Any) -> None:
    try:
        done = job(argument, lambda name, size, total: connection.send(("progress", name, size, total)))
        connection.send(("done", done, peak_memory()))
    except Exception as error:
        connection.send(("error", error))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing left to remove


def peak_memory() -> int:
    """Read how many bytes this process had in memory at most.

    What Linux's `getrusage` says begins before the program was started, in its parent's memory; /proc/self does not.

    >>> peak_memory() > 1e6
    True
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
