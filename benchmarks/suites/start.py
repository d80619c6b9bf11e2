"""Measure the time to the first sentences of a process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

from benchmarks import models
from benchmarks.timing import Line, Result

START = """
import sys, time
import jax, flax.nnx, aq_jax as aq, aq_jax.nn, tokenizers
jax.numpy.zeros(1).block_until_ready()
start = time.perf_counter()
model = aq.load_model(sys.argv[1])
loaded = time.perf_counter()
model.encode(["The first sentence of a process.", "And another one."])
print(loaded - start, time.perf_counter() - loaded)
"""


def start(full: bool) -> Iterator[Line]:
    """Embed the first sentences of a process, with everything imported and a warm compile cache."""
    path = models.table("int8")
    with tempfile.TemporaryDirectory() as cached:
        variables = {
            "JAX_COMPILATION_CACHE_DIR": cached,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        found = []
        for _ in range(6 if full else 3):
            done = subprocess.run(
                [sys.executable, "-c", START, str(path)],
                env=os.environ | variables,
                capture_output=True,
                text=True,
                check=True,
            )
            found.append([float(x) for x in done.stdout.split()])
    loads, firsts = np.median(found[1:], axis=0)
    note = f"cold cache {found[0][1]:.2f} s; load_model {loads:.2f} s"
    yield Result("first `encode` of a process, compile cache warm", float(firsts), "s", "<= 2", "<= 1", note)
    yield Result("the same with load_model", float(loads + firsts), "s", "", "")
