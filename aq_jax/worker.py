"""Processes of their own: fresh interpreters, which this one talks to and takes down with it."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

from aq_jax.errors import AqError


class WorkerDied(AqError):  # noqa: N818
    """A worker ended without an answer; `status` is its exit status."""

    def __init__(self, status: int | None) -> None:
        super().__init__(
            f"the process ended with status {status} and without a word; status -9 means that the system ended it, "
            "most often for lack of memory"
        )
        self.status = status


class Worker:
    """A process that runs a function, at the other end of a pipe.

    A script that starts one keeps its own work under `if __name__ == "__main__"`.

    Args:
        function: of a module, called with its end of the pipe and the arguments.
        arguments: what can be pickled.
    """

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_run, args=(function, theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()  # the child's end is the only one: if the child dies, reading ends

    def receive(self) -> Any:
        """Wait for the next message.

        Raises:
            WorkerDied: if there will be none.
        """
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise WorkerDied(self._process.exitcode) from None


def stop(workers: Iterable[Worker], patience: float = 0.0) -> None:
    """End workers, all at once.

    Args:
        workers: running or not.
        patience: seconds in which each may end by itself.
    """
    workers = list(workers)
    for worker in workers:
        worker._process.join(patience)
    for worker in workers:
        worker._process.terminate()  # lets it remove what it has half-written
        worker.connection.close()
    for worker in workers:
        worker._process.join(10)
        worker._process.kill()
        worker._process.join()


def _run(function: Callable[..., None], connection: Connection, *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started us is told, and ends us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    function(connection, *arguments)
