"""What tests of several folders share: files, programs that XLA compiles, processes, and inputs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np

Run = Callable[..., tuple[int, str, str]]  # the fixture `run`
COMPILED = "/jax/core/compile/backend_compile_duration"


def listing(folder: Path) -> list[str]:
    """Every file and folder below a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@contextmanager
def compilations() -> Iterator[list[float]]:
    """Collects the seconds of each program that XLA compiles."""
    found: list[float] = []

    def listen(event: str, duration_secs: float, **_: object) -> None:
        if event == COMPILED:
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def run_alone(home: Path, code: str, *arguments: object, stdin: str = "", **variables: str) -> str:
    """Run Python in a process that is offline and has no variables but these; gives its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={"PATH": "", "HOME": str(home), "HF_HUB_OFFLINE": "1"} | variables, input=stdin,
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def padded(texts: list[list[int]], length: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a batch, padded on the right to the longest text or a length, and which of them are a text's."""
    length = length or max(map(len, texts))
    ids = np.array([text + [0] * (length - len(text)) for text in texts], np.int32)
    return ids, np.arange(length) < np.array([[len(text)] for text in texts])


def moment(width: int, seed: int = 1) -> np.ndarray:
    """Of inputs that depend on their neighbours and differ in size."""
    sizes = np.exp(0.5 * np.random.default_rng(seed).standard_normal(width))
    distance = np.abs(np.arange(width)[:, None] - np.arange(width))
    return (sizes[:, None] * 0.8**distance * sizes).astype(np.float32)


def inputs_of(rows: int, inputs: int) -> np.ndarray:
    """Rows of any sizes, whose mean is not zero."""
    rng = np.random.default_rng(rows)
    return (rng.normal(size=(rows, inputs)) + 0.5).astype(np.float32)
