"""Run contenders in processes of their own: their thread pools would disturb each other. They are timed in turn.

A child is `python -m benchmarks.children module:function [JSON arguments]`. The function returns callables by name; the
child lists them, and then runs the one that each line on its standard input names. It times the call itself, so that
the pipe costs nothing, and sleeps in between.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, Self

from benchmarks.peers import MissingLibrary
from benchmarks.timing import seconds_of

# Keeps idle threads of these pools from spinning beside the contender whose turn it is.
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "TOKENIZERS_PARALLELISM": "false"}


class ChildError(RuntimeError):
    """The error of a contender that failed; the text says how."""


class Child:
    """A process with contenders.

    Args:
        target: The "module:function" that returns callables by name. Their arguments and results are JSON; other
            results are dropped.
        arguments: The arguments of the function.

    Raises:
        MissingLibrary: if the function does, because a library is missing.
        ChildError: if it fails otherwise.
    """

    def __init__(self, target: str, *arguments: Any) -> None:
        self.target = target
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - until `close`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.children", target, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=QUIET | dict(os.environ),
        )
        try:
            self.names: list[str] = self._read()["names"]
        except BaseException:
            self.close()
            raise

    def call(self, name: str, *arguments: Any) -> Any:
        """Call one of the callables, and return its result.

        Raises:
            ChildError: if it fails.
        """
        return self._ask("call", name, arguments)

    def seconds(self, name: str) -> float:
        """Time one of the callables (see `timing.seconds_of`).

        Raises:
            ChildError: if it fails.
        """
        return self._ask("seconds", name, ())

    def _ask(self, what: str, name: str, arguments: tuple[Any, ...]) -> Any:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died before: its error output says why
            print(json.dumps([what, name, arguments]), file=self._process.stdin, flush=True)
        return self._read()["value"]

    def remote(self, name: str) -> Remote:
        """Return one of the callables as a contender for `race`."""
        return Remote(self, name)

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            raise ChildError(f"{self.target} ended: {said[-1] if said else 'without a word'}")
        answer = json.loads(line)
        if "absent" in answer:
            raise MissingLibrary(answer["absent"])
        if "failed" in answer:
            raise ChildError(answer["failed"])
        return answer


class Remote:
    """A callable of a child, which measures its time itself."""

    def __init__(self, child: Child, name: str) -> None:
        self._child, self._name = child, name

    def __call__(self) -> Any:
        return self._child.call(self._name)

    def seconds(self) -> float:
        """Time a call."""
        return self._child.seconds(self._name)


def serve(target: str, arguments: list[Any]) -> None:
    """Serve calls as a child, until its input ends, or the function fails."""
    # Libraries print to the error output: standard output carries answers only.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**said: Any) -> None:
        print(json.dumps(said), file=answers, flush=True)

    module, _, function = target.partition(":")
    try:
        calls: Mapping[str, Callable[..., Any]] = getattr(importlib.import_module(module), function)(*arguments)
    except MissingLibrary as absent:
        return answer(absent=str(absent))
    except Exception as error:
        return answer(failed=shorten(error))
    answer(names=list(calls))
    for line in sys.stdin:
        what, name, given = json.loads(line)
        try:
            value = seconds_of(calls[name]) if what == "seconds" else calls[name](*given)
        except Exception as error:
            answer(failed=shorten(error))
            continue
        answer(value=value if _is_json(value) else None)
    return None


def shorten(error: BaseException) -> str:
    """Shorten an exception to one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _is_json(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, bool | int | float | str)


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
