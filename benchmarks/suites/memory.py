"""Measure the memory that quantizing a model adds to a process that has everything imported (Linux).

Every run is in a process of its own: memory that one case has freed, the next would use again.
"""

from __future__ import annotations

import importlib
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, peers
from benchmarks.children import Child, ChildError
from benchmarks.peers.ours import ABSMAX
from benchmarks.suites.contenders import peer_children
from benchmarks.suites.road import CASES, quantize_all
from benchmarks.timing import Line, Result, Skipped

TABLE = "table"
RUNS = 3
TARGET = "benchmarks.suites.memory:contenders"


def peak_added(work: Callable[[], object]) -> float:
    """Return the most MB without a backing file that a call adds while it runs."""
    peak, stop = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak.append(anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    stop.set()
    thread.join()
    return (max(peak) - peak[0]) / 1e6


def contenders(module: str) -> dict[str, Callable[[], Any]]:
    """Return, in a child, "peer|bits" -> a call that quantizes MiniLM's matrices, and returns the MB that it adds."""
    calls: dict[str, Callable[[], Any]] = {}
    if module == "ours":
        calls = {f"{TABLE}|{bits}": partial(measure_table, bits) for bits in CASES}
    for peer in peers.load(module):
        if peer.slow or (module == "ours" and peer.name != ABSMAX):
            continue
        for bits, (_, wanted, _) in CASES.items():
            if bits in peer.widths:
                calls[f"{peer.name}|{bits}"] = partial(measure, peer, bits, peers.nearest_group(peer, bits, wanted))
    return calls


def measure(peer: peers.Peer, bits: int, group: int) -> float:
    """Return the MB that a peer adds."""
    importlib.import_module("aq_jax.converters.checkpoint")  # what reads the matrices
    peer.quantize(peer.prepare(np.ones((512, 512), np.float32)), bits, group)  # compiled, and warm
    return peak_added(partial(quantize_all, peer, bits, group))


def measure_table(bits: int) -> float:
    """Return the MB that converting MiniLM to a table adds."""
    from safetensors.numpy import save_file

    import aq_jax as aq
    from aq_jax.converters import huggingface

    config = aq.QuantizationConfig(**CASES[bits][2])
    with tempfile.TemporaryDirectory() as scratch:
        save_file({"w": np.ones((512, 512), np.float32)}, Path(scratch, "model.safetensors"))
        huggingface.to_table(scratch, Path(scratch, "warm.parquet"), config)
        return peak_added(lambda: huggingface.to_table(models.folder(), Path(scratch, "m.parquet"), config))


def memory(full: bool) -> Iterator[Line]:
    """Measure each peer; ours writes a table, or keeps its results in memory, as the others do."""
    for module in peers.MODULES:
        with peer_children(TARGET, modules=(module,)) as (children, skipped):
            yield from skipped
            names = [name for child in children.values() for name in child.names]
        for name in names:
            yield measure_in_fresh_processes(module, name, RUNS if full else 1)


def measure_in_fresh_processes(module: str, name: str, runs: int) -> Line:
    """Yield the median of runs, each in a process of its own."""
    peer, bits = name.split("|")
    case = f"MiniLM int{bits} in memory, {peer}"
    if peer == TABLE:
        case = f"MiniLM {CASES[int(bits)][0]}, to a table"
    found = []
    for _ in range(runs):
        try:
            with Child(TARGET, module) as child:
                found.append(child.call(name))
        except ChildError as why:
            return Skipped(f"memory of {peer}", str(why))
    limits = ("<= 150", "<= 50") if peer == TABLE else ("", "")
    note = f"runs: {runs}, each in a process of its own; from the least to the most"
    middle = statistics.median(found)
    return Result(f"{case}: anonymous memory added", middle, "MB", *limits, note, low=min(found), high=max(found))


def anonymous_bytes() -> int:
    """Count the bytes of this process's memory that no file backs (Linux)."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
