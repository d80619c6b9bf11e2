"""Measure the conversion of a whole model: from its safetensors to a table."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, peers
from benchmarks.peers.numpy_vectorized import NumpyVectorized, cosine_and_error
from benchmarks.suites.contenders import peer_children
from benchmarks.timing import Line, Result, compare, race, seconds_of

# By bits: the label, the groups of other libraries, and the fields of our config.
CASES: Mapping[int, tuple[str, int, dict[str, Any]]] = {
    8: ("int8 channel", peers.ROW, {"quant_type": "int8", "per_channel": True}),
    2: ("int2 g128 absmax", 128, {"quant_type": "int2", "group_size": 128, "solver": "absmax"}),
}
KINDS = (".parquet", ".arrow")
PATIENCE = 6.0
# Peers write nothing.
LIMITS = {(bits, "NumPy"): ("1", "2") for bits in CASES} | {
    (8, f"{peer} (writes nothing)"): ("0.7", "1") for peer in ("torchao", "qwix absmax")
}


def contenders(module: str) -> dict[str, Callable[[], Any]]:
    """Return, in a child, "peer|bits|group" -> a call that reads and quantizes MiniLM's matrices."""
    calls: dict[str, Callable[[], Any]] = {}
    for peer in peers.load(module):
        for bits, (_, wanted, _) in CASES.items():
            if bits not in peer.widths or peer.slow:
                continue
            group = peers.nearest_group(peer, bits, wanted)
            calls[f"{peer.name}|{bits}|{group}"] = partial(quantize_all, peer, bits, group)
    return calls


def quantize_all(peer: peers.Peer, bits: int, group: int) -> list[Any]:
    """Read MiniLM's matrices one by one, and keep them as the peer quantizes them."""
    return [peer.quantize(peer.prepare(w), bits, group) for _, w in models.iter_matrices()]


class NewFile:
    """A contender that writes a new file: the old one is removed before a call is timed, and its cached pages with it.

    Args:
        path: The path of the file.
        write: Writes it.
    """

    def __init__(self, path: Path, write: Callable[[Path], None]) -> None:
        self._path, self._write = path, write

    def __call__(self) -> None:
        self._write(self._path)

    def seconds(self) -> float:
        """Time a call."""
        self._path.unlink(missing_ok=True)
        return seconds_of(self)


def road(full: bool) -> Iterator[Line]:
    """Measure conversions; ours and NumPy's write a V2 table with digests and fit, others nothing."""
    import aq_jax as aq

    left = ("ours", "numpy_vectorized", "safetensors_peer")
    others = [module for module in peers.MODULES if full and module not in left]
    target = "benchmarks.suites.road:contenders"
    with (
        tempfile.TemporaryDirectory() as scratch,
        peer_children(target, modules=others) as (children, skipped),
    ):
        yield from skipped
        for bits, (label, wanted, fields) in CASES.items():
            config = aq.QuantizationConfig(**fields)
            found: dict[str, Callable[[], object]] = {
                kind: NewFile(Path(scratch, f"ours{kind}"), partial(convert_with_ours, config=config)) for kind in KINDS
            }
            found["NumPy"] = NewFile(Path(scratch, "numpy.parquet"), partial(convert_with_numpy, config=config))
            notes = {}
            for child in children.values():
                for name in child.names:
                    peer, width, group = name.split("|")
                    if int(width) == bits:
                        peer += " (writes nothing)"
                        found[peer], notes[peer] = child.remote(name), peers.group_note(int(group), wanted)
            times = race(found, 7 if full else 3, PATIENCE)
            tables = {kind: times.pop(kind) for kind in KINDS}
            for kind, mine in tables.items():
                case = f"MiniLM to a table, {label}, {kind}"
                for peer, timing in times.items():
                    limits = LIMITS.get((bits, peer), ("", ""))
                    yield compare(case, peer, timing, mine, *limits, note=notes.get(peer, ""))
                yield Result(f"{case}: first call longer by", mine.first, "s")
        fitted = aq.QuantizationConfig("int2", group_size=128)
        ours = NewFile(Path(scratch, "fitted.parquet"), partial(convert_with_ours, config=fitted))
        times = race({"ours": ours}, 3 if full else 1)["ours"]
        first = {"first call longer by, s": times.first}
        yield Result("MiniLM int2 g128 mse, whole road", times.median, "s", "<= 8", "<= 3", figures=first)


def convert_with_ours(path: Path, config: Any) -> None:
    """Convert safetensors to a table."""
    from aq_jax.conversion.write import write_model
    from aq_jax.converters.checkpoint import open_checkpoint

    with open_checkpoint(models.folder()) as source:
        write_model(source, path, config)


def convert_with_numpy(path: Path, config: Any) -> None:
    """Write the same table, as far as plain NumPy can."""
    from aq_jax.converters.checkpoint import open_checkpoint
    from aq_jax.io.dense import as_v2, plain_rows
    from aq_jax.store import Row, TableWriter

    peer = NumpyVectorized()
    with open_checkpoint(models.folder()) as source, TableWriter(path, version=2) as table:
        for name in source.shapes:
            w = source.read(name)
            if w.ndim < 2 or w.dtype.kind != "f":
                for row in plain_rows(name, w):
                    table.write(as_v2(row))
                continue
            spec = config.spec
            q = peer.quantize(w, spec.bits, spec.group_elements(w.shape))
            cosine, error = cosine_and_error(w, peer.dequantize(q))
            table.write(
                Row(
                    name, w.shape, w.dtype.name, q[0].reshape(-1), w.size, spec.quant_type, q[1],
                    np.zeros_like(q[1]), 0, spec.group_size, 0, "absmax", cosine, error,
                )
            )  # fmt: skip
