"""Who does the tasks: this process, processes of this machine, or a Ray cluster. The bytes are the same."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from aq_jax.errors import AqError, ConfigError
from aq_jax.shards.memory import PROCESS_BYTES
from aq_jax.shards.task import ShardDone, ShardTask, Step, convert_shard
from aq_jax.store.writer import use_system_memory

# An engine: yields what comes of the tasks, in any order; the step is called with each tensor that was written.
Run = Callable[[Sequence[ShardTask], Step], Iterator[ShardDone]]
RETRIES = 3
_WAIT = 0.5


def local(workers: int) -> Run:
    """This machine: one worker is this process, more are processes of their own.

    Their interpreters are fresh: a script that asks for more than one keeps its own work under
    `if __name__ == "__main__"`.
    """
    return _here if workers == 1 else lambda tasks, step: _processes(tasks, step, workers)


def _here(tasks: Sequence[ShardTask], step: Step) -> Iterator[ShardDone]:
    for task in tasks:
        yield convert_shard(task, step)


def _processes(tasks: Sequence[ShardTask], step: Step, workers: int) -> Iterator[ShardDone]:
    spawn = multiprocessing.get_context("spawn")
    waiting = deque(tasks)
    busy: dict[Connection, tuple[BaseProcess, ShardTask]] = {}
    started: list[tuple[BaseProcess, Connection]] = []
    try:
        for _ in range(min(workers, len(tasks))):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()  # the child's end is the only one: if the child dies, reading ends
            started.append((process, ours))
            busy[ours] = process, (task := waiting.popleft())
            ours.send(task)
        while busy:
            for connection in wait(list(busy), _WAIT):
                assert isinstance(connection, Connection)  # noqa: S101
                process, task = busy[connection]
                try:
                    kind, *content = connection.recv()
                except (EOFError, OSError):
                    process.join()
                    raise AqError(_ended(task, process.exitcode)) from None
                if kind == "step":
                    step(*content)
                    continue
                if kind == "error":
                    raise content[0]
                if waiting:
                    busy[connection] = process, (task := waiting.popleft())
                    connection.send(task)
                else:
                    del busy[connection]
                yield content[0]
    finally:
        for process, connection in started:
            process.terminate()  # lets it remove what it has half-written
            connection.close()
        for process, _ in started:
            process.join(10)
            process.kill()
            process.join()


def _ended(task: ShardTask, status: int | None) -> str:
    return (
        f"{task.file}: the process that made it ended with status {status} and without a word; status -9 means that "
        "the system ended it, most often for lack of memory: set max_memory lower. Run again: finished files are kept"
    )


def _work(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started us is told, and ends us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    use_system_memory()
    try:
        while True:
            task = connection.recv()
            connection.send(("done", convert_shard(task, lambda name, size: connection.send(("step", name, size)))))
    except (EOFError, BrokenPipeError, ConnectionResetError, SystemExit):
        pass  # nobody waits for us
    except Exception as error:
        connection.send(("error", error))
    finally:
        os._exit(1)  # what is half-written is removed; JAX has nothing to take down that another signal could disturb


def on_ray(tasks: Sequence[ShardTask], step: Step) -> Iterator[ShardDone]:
    """A Ray cluster: the one that RAY_ADDRESS names or that the process is connected to, else a new one, here.

    Each task asks Ray for the memory that it takes; one whose worker ends is done again, elsewhere.

    Raises:
        ImportError: if Ray is not installed.
        ConfigError: if no machine of the cluster has the memory that a task takes.
        AqError: if a task's workers end again and again.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise ImportError("engine = 'ray' needs ray: pip install 'aq-jax[ray]'") from None
    own = not ray.is_initialized()
    if own:
        ray.init(log_to_driver=False, configure_logging=False)
    try:
        need = PROCESS_BYTES + max(task.memory for task in tasks)
        most = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
        if need > most:
            raise ConfigError(
                f"engine = 'ray': a file takes {need:,} bytes of memory, no machine has more than {most:,}"
            )
        remote: Any = ray.remote(convert_shard)
        running = {
            remote.options(num_cpus=1, memory=PROCESS_BYTES + task.memory, max_retries=RETRIES).remote(task): task
            for task in tasks
        }
        while running:
            ready, _ = ray.wait(list(running), num_returns=1)
            for reference in ready:
                task = running.pop(reference)
                try:
                    done = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, Exception) else AqError(str(error)) from None
                except ray.exceptions.RayError as error:
                    text = str(error).splitlines()[0]
                    raise AqError(f"{task.file}: Ray gave up: {text}. Run again: finished files are kept") from None
                for name, extent in task.extents.items():
                    step(name, extent.size)
                yield done
    finally:
        if own:
            ray.shutdown()
