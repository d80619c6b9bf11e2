"""Print text and tables on a terminal, show a progress bar, and handle interrupts."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, BinaryIO

from aq_jax.errors import ConfigError, escape

if TYPE_CHECKING:
    from aq_jax.progress import Progress

DONE, NO, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses: done, the answer is no, bad input, interrupted."""
OUTPUT = "standard output"
"""The name of it in errors."""
interrupted = threading.Event()


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print the library's warnings as notes beside the output."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *rest: print_note(str(message))
        yield


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]], footer: tuple[str, ...] | None = None) -> None:
    """Print aligned columns, numbers to the right; plain text, so that it can be piped."""
    lines = [header, *(tuple(map(escape, row)) for row in rows), *([footer] if footer else [])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for n, line in enumerate(lines):
        cells = [c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        if n == 1 or (footer and n == len(lines) - 1):
            print_line("-" * (sum(widths) + 2 * len(widths) - 2))
        print_line("  ".join(cells).rstrip())


@contextmanager
def progress_bar(as_json: bool, of: str = "parts") -> Iterator[Progress]:
    """Show a bar on a terminal that counts texts, parts, or tensors and their bytes; nothing elsewhere."""
    if as_json or not sys.stderr.isatty():
        yield raise_if_interrupted
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    counts = {
        "texts": (MofNCompleteColumn(),),
        "bytes": (TextColumn("{task.fields[calls]} tensors"), DownloadColumn()),
        "parts": (TaskProgressColumn(),),
    }
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *counts[of], TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None, calls=0)

        def advance(name: str, size: int, total: int) -> None:
            raise_if_interrupted(name, size, total)
            if bar.tasks[0].finished:  # the next phase is counted and timed from 0
                bar.reset(task)
            calls = bar.tasks[0].fields["calls"] + 1
            bar.update(task, description=escape(name)[-40:], total=total, advance=size, calls=calls)

        yield advance


def format_shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def format_number(value: float | None, how: str) -> str:
    return "" if value is None else how.format(value)


def escape_lines(text: str) -> str:
    return "\n".join(map(escape, text.split("\n")))


def error_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def print_line(text: str, end: str = "\n") -> None:
    with _naming_output():
        print(text, end=end)  # noqa: T201


def flush_output() -> None:
    with _naming_output():
        sys.stdout.flush()


def drop_output() -> None:
    """Drop what the standard output has not taken; else Python would try again when it exits, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _naming_output() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # which names no file
        raise OSError(error.errno, error.strerror, OUTPUT) from error


def read_input() -> BinaryIO:
    """Return the standard input.

    Raises:
        ConfigError: if it is closed.
    """
    if sys.stdin is None:
        raise ConfigError("-: the standard input is closed; wanted lines of text from a file or a pipe")
    return sys.stdin.buffer


def fail(text: str, status: int) -> int:
    print_note(text)
    return status


def print_note(text: str) -> None:
    print(f"aq-jax: {escape(text)}", file=sys.stderr)  # noqa: T201


def handle_interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but not inside JAX's garbage-collection callback, which would drop and report it."""
    interrupted.set()
    if frame is not None and frame.f_code.co_name == "_xla_gc_callback":
        threading.Timer(0.01, signal.raise_signal, [number]).start()
        return
    raise KeyboardInterrupt


def raise_if_interrupted(name: str, size: int, total: int) -> None:
    """Raise an interrupt again that another callback swallowed: Python drops what those raise."""
    if interrupted.is_set():
        raise KeyboardInterrupt
