"""Run the tasks in this process, in processes of this machine, or on a Ray cluster. The bytes are the same."""

from __future__ import annotations

import importlib
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from aq_jax.conversion.shards.memory import PROCESS_BYTES
from aq_jax.conversion.shards.task import OnTensor, ShardResult, ShardTask, convert_shard
from aq_jax.cores import share_cores
from aq_jax.errors import AqError, ConfigError
from aq_jax.store.writer import use_system_memory
from aq_jax.worker import Worker, WorkerDied, stop

# An engine yields the results of tasks in any order, and calls back for each tensor that was written.
RunTasks = Callable[[Sequence[ShardTask], OnTensor], Iterator[ShardResult]]
RETRIES = 3
_WAIT = 0.5


def local_engine(workers: int) -> RunTasks:
    """Return the engine of this machine: one worker is this process, more are processes of their own.

    Their interpreters are fresh: a script that asks for more than one worker must keep its own work under
    `if __name__ == "__main__"`.
    """
    return _in_this_process if workers == 1 else lambda tasks, on_tensor: _in_processes(tasks, on_tensor, workers)


def _in_this_process(tasks: Sequence[ShardTask], on_tensor: OnTensor) -> Iterator[ShardResult]:
    for task in tasks:
        yield convert_shard(task, on_tensor)


def _in_processes(tasks: Sequence[ShardTask], on_tensor: OnTensor, workers: int) -> Iterator[ShardResult]:
    try:
        pickle.dumps(tasks[0].config)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"the quantizer cannot be sent to other processes: {error}; define its class in a module that they can "
            "import, or set workers = 1"
        ) from None
    waiting = deque(tasks)
    busy: dict[Connection, tuple[Worker, ShardTask]] = {}
    started: list[Worker] = []
    processes = min(workers, len(tasks))
    try:
        for _ in range(processes):
            started.append(worker := Worker(_serve_tasks, processes))
            busy[worker.connection] = worker, (task := waiting.popleft())
            worker.connection.send(task)
        while busy:
            for connection in wait(list(busy), _WAIT):
                assert isinstance(connection, Connection)  # noqa: S101
                worker, task = busy[connection]
                try:
                    kind, *content = worker.receive()
                except WorkerDied as error:
                    raise AqError(
                        f"{task.file}: {error}; set max_memory lower, and run again: finished files are kept"
                    ) from None
                if kind == "tensor":
                    on_tensor(*content)
                    continue
                if kind == "error":
                    raise content[0]
                if waiting:
                    busy[connection] = worker, (task := waiting.popleft())
                    connection.send(task)
                else:
                    del busy[connection]
                yield content[0]
    finally:
        stop(started)


def _serve_tasks(connection: Connection, processes: int) -> None:
    use_system_memory()
    share_cores(processes)
    try:
        while True:
            task = connection.recv()
            connection.send(("done", convert_shard(task, lambda name, size: connection.send(("tensor", name, size)))))
    except (EOFError, BrokenPipeError, ConnectionResetError, SystemExit):
        pass  # the parent is gone
    except Exception as error:
        connection.send(("error", error))
    finally:
        os._exit(1)  # half-written files are removed by now; a normal exit could meet another signal in JAX


def ray_engine(tasks: Sequence[ShardTask], on_tensor: OnTensor) -> Iterator[ShardResult]:
    """Run the tasks on the Ray cluster that RAY_ADDRESS names or this process is connected to, else on a new one, here.

    Each task asks Ray for the memory that it takes; if its worker ends, the task is done again elsewhere.

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
                f"engine = 'ray': a file takes {need:,} bytes of memory, and no machine has more than {most:,}; take "
                "smaller files (shards.size)"
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
                    raise AqError(f"{task.file}: Ray gave up: {text}; run again: finished files are kept") from None
                for name, size in task.sizes.items():
                    on_tensor(name, size)
                yield done
    finally:
        if own:
            ray.shutdown()
