"""Measure quantizing one matrix and back, by every library, each in its own process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.children import Child
from benchmarks.peers.ours import ABSMAX
from benchmarks.suites.contenders import peer_children
from benchmarks.timing import Line, Result, compare, race

WIDTHS = ((8, peers.ROW), (4, 128), (2, 128))
SIDES = (2048, 4096)
PATIENCE = 1.5
CLAIMS = {"NumPy": ("5", "12"), "torchao": ("5", "15"), "quanto": ("5", "15")}  # below eight bits


def contenders(module: str, side: int, slow: bool) -> dict[str, Callable[[], Any]]:
    """Return, in a child, "quantize|peer|bits|group" and "dequantize|..." -> a call, for a module's peers.

    Args:
        module: The name of a module in `benchmarks.peers`.
        side: The side of the matrix.
        slow: Whether to include slow peers.
    """
    w = np.random.default_rng(0).standard_normal((side, side), np.float32)
    calls: dict[str, Callable[[], Any]] = {}
    for peer in peers.load(module):
        if peer.slow and not slow:
            continue
        arranged = peer.prepare(w)
        for bits, wanted in WIDTHS:
            if bits not in peer.widths:
                continue
            group = peers.nearest_group(peer, bits, wanted)
            forwards = partial(peer.quantize, arranged, bits, group)
            calls[f"quantize|{peer.name}|{bits}|{group}"] = forwards
            if peer.decodes and not peer.slow:  # slow ones decode like their library's quick ones
                calls[f"dequantize|{peer.name}|{bits}|{group}"] = partial(_decode, peer, cache(forwards))
    return calls


def _decode(peer: peers.Peer, quantized: Callable[[], Any]) -> None:
    peer.dequantize(quantized())


def quantize(full: bool) -> Iterator[Line]:
    """Quantize float32 to codes and scales, packed if the library packs; and back, into fresh memory."""
    for side in SIDES if full else SIDES[:1]:
        slow = full and side == SIDES[0]  # the larger one would take minutes
        with peer_children("benchmarks.suites.quantize:contenders", side, slow) as (children, skipped):
            yield from skipped if side == SIDES[0] else ()
            for what in ("quantize", "dequantize"):
                for bits, group in WIDTHS:
                    yield from _against_all(what, bits, group, side, list(children.values()), 7 if full else 3)


def _against_all(what: str, bits: int, group: int, side: int, children: list[Child], rounds: int) -> Iterator[Line]:
    source = np.ones((side, side), np.float32)
    reused = source.copy()
    found: dict[str, Callable[[], object]] = {"memcpy": lambda: np.copyto(reused, source)}
    groups = {}
    for child in children:
        for name in child.names:
            way, peer, width, size = name.split("|")
            if (way, int(width)) == (what, bits):
                found[peer], groups[peer] = child.remote(name), int(size)
    times = race(found, rounds, PATIENCE)
    ours = times.pop(ABSMAX)
    forwards = what == "quantize"
    case = f"{what} int{bits} {f'g{group}' if group else 'rows'}, {side} x {side}"
    limits = ("0.9", "1.3") if forwards else ("", "")
    note = f"{4 * side**2 / 1e9 / ours.median:.2f} GB/s of float32"
    yield compare(case, "memcpy", times.pop("memcpy"), ours, *limits, note=note)
    for peer, timing in times.items():
        claim = CLAIMS.get(peer, ("", "")) if bits < 8 and forwards else ("", "")
        yield compare(case, peer, timing, ours, *claim, note=peers.group_note(groups[peer], group))
    yield Result(f"{case}: first call longer by", ours.first, "s")
