"""Measure the memory that quantizing a model adds to a process that has everything imported (Linux).

Every run is in a process of its own: what one case has freed, the next would use again.
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
from benchmarks.suites.road import quantize_all
from benchmarks.timing import Line, Result, Skipped

CASES = {8: ("int8 channel", peers.ROW), 2: ("int2 g128 absmax", 128)}
TABLE = "table"
RUNS = 3
TARGET = "benchmarks.suites.memory:contenders"


def added(work: Callable[[], object]) -> float:
    """Measure MB that no file backs, at most, while something runs, over what there was before."""
    peak, stop = [anonymous()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    stop.set()
    thread.join()
    return (max(peak) - peak[0]) / 1e6


def contenders(module: str) -> dict[str, Callable[[], Any]]:
    """List calls of a child, which runs one: "peer|bits" -> MB added by MiniLM's matrices, read one by one."""
    calls: dict[str, Callable[[], Any]] = {}
    if module == "ours":
        calls = {f"{TABLE}|{bits}": partial(by_table, bits) for bits in CASES}
    for peer in peers.load(module):
        if peer.slow or (module == "ours" and peer.name != ABSMAX):
            continue
        for bits, (_, wanted) in CASES.items():
            if bits in peer.widths:
                calls[f"{peer.name}|{bits}"] = partial(measure, peer, bits, peers.nearest(peer, bits, wanted))
    return calls


def measure(peer: peers.Peer, bits: int, group: int) -> float:
    """Measure the MB that a peer adds."""
    importlib.import_module("aq_jax.converters.checkpoint")  # what reads the matrices
    peer.quantize(peer.arrange(np.ones((512, 512), np.float32)), bits, group)  # compiled, and warm
    return added(partial(quantize_all, peer, bits, group))


def by_table(bits: int) -> float:
    """Measure the MB that MiniLM's way to a table adds."""
    from safetensors.numpy import save_file

    import aq_jax as aq
    from aq_jax.converters import huggingface

    config = (
        aq.QuantizationConfig("int8", per_channel=True)
        if bits == 8
        else aq.QuantizationConfig("int2", group_size=128, solver="absmax")
    )
    with tempfile.TemporaryDirectory() as scratch:
        save_file({"w": np.ones((512, 512), np.float32)}, Path(scratch, "model.safetensors"))
        huggingface.to_table(scratch, Path(scratch, "warm.parquet"), config)
        return added(lambda: huggingface.to_table(models.folder(), Path(scratch, "m.parquet"), config))


def memory(full: bool) -> Iterator[Line]:
    """Yield the MB of each: ours writes a table, or keeps what it made, as the others do."""
    for module in peers.MODULES:
        try:
            with Child(TARGET, module) as child:
                names = child.names
        except (peers.Absent, ChildError) as why:
            yield Skipped(module.removesuffix("_peer"), str(why))
            continue
        for name in names:
            yield in_fresh_processes(module, name, RUNS if full else 1)


def in_fresh_processes(module: str, name: str, runs: int) -> Line:
    """Take the median of runs, each of which has a process for itself."""
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


def anonymous() -> int:
    """Count bytes of memory of this process that no file backs (Linux)."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
