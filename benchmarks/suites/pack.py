"""Measure packing codes to bytes and back, by the libraries that have functions for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.models import iter_matrices
from benchmarks.peers.ours import ABSMAX
from benchmarks.suites.contenders import peer_children
from benchmarks.timing import Line, compare, race

MODULES = ("ours", "numpy_vectorized", "quanto_peer", "hqq_peer")
MODEL = "MiniLM"


def contenders(module: str, cases: list[str], widths: list[int]) -> dict[str, Callable[[], Any]]:
    """Return, in a child, "peer|bits|case|pack" and "...|unpack" -> a call."""
    calls: dict[str, Callable[[], Any]] = {}
    rng = np.random.default_rng(0)
    peer = peers.load(module)[0]  # further ones pack alike
    for case in cases:
        shapes = [w.shape for _, w in iter_matrices()] if case == MODEL else [(int(case), int(case))]
        for bits in set(widths) & set(peer.packs):
            codes = [rng.integers(0, 2**bits, shape, np.uint8) for shape in shapes]
            arranged = [peer.prepare_codes(array, bits) for array in codes]
            packed = [peer.pack(array, bits) for array in arranged]
            ending = f"{peer.name}|{bits}|{case}"
            calls[f"{ending}|pack"] = partial(_call_each, peer.pack, arranged, bits)
            calls[f"{ending}|unpack"] = partial(_call_each, peer.unpack, packed, bits)
    return calls


def _call_each(call: Callable[[Any, int], Any], arrays: list[Any], bits: int) -> None:
    for array in arrays:
        call(array, bits)


def pack(full: bool) -> Iterator[Line]:
    """Measure square matrices, and all of MiniLM's, one after the other."""
    cases, widths = (["2048", "4096", MODEL], [4, 3, 2]) if full else (["2048", MODEL], [4, 2])
    with peer_children("benchmarks.suites.pack:contenders", cases, widths, modules=MODULES) as (children, skipped):
        yield from skipped
        for case in cases:
            for bits in widths:
                for way in ("pack", "unpack"):
                    ending = f"|{bits}|{case}|{way}"
                    found: dict[str, Callable[[], object]] = {
                        name.removesuffix(ending): child.remote(name)
                        for child in children.values()
                        for name in child.names
                        if name.endswith(ending)
                    }
                    times = race(found, 9 if full else 3)
                    ours = times.pop(ABSMAX)
                    shape = case if case == MODEL else f"{case} x {case}"
                    for peer, timing in times.items():
                        yield compare(f"{way} {bits} bits, {shape}", peer.partition(",")[0], timing, ours)
