"""Memory that quantizing a model adds to a process that has everything imported (Linux)."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, peers
from benchmarks.children import ChildError
from benchmarks.suites.contenders import peer_children
from benchmarks.suites.road import quantize_all
from benchmarks.timing import Line, Result, Skipped

CASES = {8: peers.ROW, 2: 128}


def added(work: Callable[[], object]) -> float:
    """MB that no file backs, at most, while something runs, over what there was before."""
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


def contenders(module: str, full: bool) -> dict[str, Callable[[], Any]]:
    """In a child: "peer|bits" -> MB added by reading MiniLM's matrices one by one and keeping them quantized."""
    calls: dict[str, Callable[[], Any]] = {}
    for peer in peers.load(module):
        for bits, wanted in CASES.items():
            if bits not in peer.widths or peer.slow:
                continue
            calls[f"{peer.name}|{bits}"] = partial(measure, peer, bits, peers.nearest(peer, bits, wanted))
    return calls


def measure(peer: peers.Peer, bits: int, group: int) -> float:
    """MB that a peer adds."""
    peer.quantize(peer.arrange(np.ones((512, 512), np.float32)), bits, group)  # compiled, and warm
    return added(partial(quantize_all, peer, bits, group))


def memory(full: bool) -> Iterator[Line]:
    """Ours writes a table; the others keep what they made, and write nothing."""
    import aq_jax as aq
    from aq_jax.converters import huggingface

    with tempfile.TemporaryDirectory() as scratch:
        for name, config in (
            ("int8 channel", aq.QuantizationConfig("int8", per_channel=True)),
            ("int2 g128 absmax", aq.QuantizationConfig("int2", group_size=128, solver="absmax")),
        ):
            aq.quantize_tree({"w": np.ones((512, 512), np.float32)}, config)  # compiled before the count starts
            folder, path = models.folder(), Path(scratch, "m.parquet")
            megabytes = added(lambda config=config: huggingface.to_table(folder, path, config))  # noqa: B023
            yield Result(f"MiniLM {name}, to a table: anonymous memory added", megabytes, "MB", "<= 150", "<= 50")
    others = [module for module in peers.MODULES if module != "ours"]
    with peer_children("benchmarks.suites.memory:contenders", full, modules=others) as (children, skipped):
        yield from skipped
        for child in children.values():
            for name in child.names:
                peer, bits = name.split("|")
                try:
                    megabytes = child.call(name)
                except ChildError as why:
                    yield Skipped(f"memory of {peer}", str(why))
                    continue
                yield Result(f"MiniLM int{bits} in memory, {peer}: anonymous memory added", megabytes, "MB")


def anonymous() -> int:
    """Bytes of memory of this process that no file backs (Linux)."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
