"""A job in a process of its own, so that its peak of memory is its own."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from aq_jax.errors import AqError

if TYPE_CHECKING:
    from aq_jax.pipeline import Progress

A = TypeVar("A")
R = TypeVar("R")


def measured(job: Callable[[A, Progress], R], argument: A, progress: Progress | None = None) -> tuple[R, int]:
    """What a job returns, and the bytes that its process had in memory at its peak.

    The process is a fresh interpreter: a script that calls this keeps its own work under `if __name__ == "__main__"`.

    Args:
        job: a function of a module, called with the argument and a callback.
        argument: can be pickled, as what the job returns or raises.
        progress: called with what the job calls its callback with.

    Raises:
        AqError: if the process ends without an answer, as when the system kills it for its memory.
        Exception: what the job raises.

    >>> done, peak = measured(aq_jax.jobs.convert, config)  # doctest: +SKIP
    """
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_work, args=(sender, job, argument), daemon=True)
    process.start()
    sender.close()  # the child's end is the only one: if the child dies, reading ends
    try:
        while True:
            kind, *content = receiver.recv()
            if kind != "progress":
                process.join(60)  # it has nothing to do but to go
                if kind == "error":
                    raise content[0]
                return content[0], content[1]
            if progress is not None:
                progress(*content)
    except EOFError:
        process.join()
        raise AqError(
            f"the converting process ended with status {process.exitcode} and without a word; status -9 means that the "
            "system ended it, most often for lack of memory"
        ) from None
    finally:
        process.terminate()  # lets it remove what it has half-written
        process.join(10)
        process.kill()
        process.join()
        receiver.close()


def _work(sender: Connection, job: Callable[[Any, Progress], Any], argument: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started us is told, and ends us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        done = job(argument, lambda name, size, total: sender.send(("progress", name, size, total)))
        sender.send(("done", done, peak_memory()))
    except Exception as error:
        sender.send(("error", error))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing left to remove


def peak_memory() -> int:
    """Bytes that this process had in memory at most.

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
