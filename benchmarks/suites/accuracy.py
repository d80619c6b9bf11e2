"""How near a quantized MiniLM's embeddings are to the float32 model's, at how many bits a weight, for every library.

Each library quantizes the linears and the word embedding; what it dequantizes runs in our float32 encoder. So only the
weights differ: nobody's activations are rounded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, peers
from benchmarks.children import ChildError
from benchmarks.peers.ours import ABSMAX, SEARCH
from benchmarks.suites.contenders import peer_children
from benchmarks.timing import Line, Result, Skipped

TABLES = "AQ_JAX_CALIBRATED"  # paths of calibrated tables of MiniLM, divided as PATH is
# Bits -> sizes of groups, of which each takes the nearest that it has: of all, of the slow, of quick runs.
FULL = {16: (peers.ROW,), 8: (peers.ROW,), 5: (32,), 4: (128, 32), 3: (128,), 2: (128, 64)}
SLOW = {4: (64,), 3: (64,), 2: (64,)}
QUICK = {4: (128,), 2: (128,)}
UNOPTIMIZED = "hqq, no optimizer"  # where the method itself is measured, this says nothing more
OURS_QUICK = {4: (128, 32), 2: (128,)}  # somebody may have small groups only


@dataclass(frozen=True)
class Fit:
    """What came of one way to quantize.

    Args:
        name: of it, with its width and group.
        bits: a weight, over the linears and the word embedding, codes packed.
        stored: the same as the library keeps them.
        mean, low: cosine of embeddings with the float32 model's, and its first percentile.
        kind: "peer", "data-free" or "calibrated".
    """

    name: str
    bits: float
    stored: float
    mean: float
    low: float
    kind: str


def contenders(module: str, full: bool) -> dict[str, Callable[..., Any]]:
    """In a child: "peer|bits|group" -> a call that writes all dequantized weights to a file, and returns bits."""
    calls: dict[str, Callable[..., Any]] = {}
    for peer in peers.load(module):
        if peer.name == UNOPTIMIZED if full else peer.slow or peer.name == SEARCH:
            continue
        wanted = FULL if full else OURS_QUICK if module == "ours" else QUICK
        for bits, sizes in (SLOW if peer.slow else wanted).items():
            if bits in peer.widths and not (peer.name == ABSMAX and bits < 8):  # as NumPy
                for group in dict.fromkeys(peers.nearest(peer, bits, size) for size in sizes):
                    calls[f"{peer.name}|{bits}|{group}"] = partial(dequantized, peer, bits, group)
    return calls


def dequantized(peer: peers.Peer, bits: int, group: int, path: str) -> list[int]:
    """Bits as stored, bits as needed, weights; what they stand for is in the file."""
    from safetensors.numpy import save_file

    out, stored, needed, count = {}, 0, 0, 0
    for name, w in models.each_matrix():
        q = peer.quantize(peer.arrange(w), bits, group)
        out[name] = np.ascontiguousarray(peer.dequantize(q))
        stored, needed, count = stored + peer.stored_bits(q), needed + peer.needed_bits(q), count + w.size
    save_file(out, path)
    return [stored, needed, count]


class Judge:
    """The float32 model, and sentences that no calibration by default has seen.

    Args:
        count: of sentences.
    """

    def __init__(self, count: int) -> None:
        from aq_jax.calibration.text import padded_batches, tokenized
        from aq_jax.loader import WeightLoader
        from aq_jax.nn.compiled import Program, leaves_of
        from aq_jax.nn.encoder import embeddings

        floats, self._leaves_of = models.encoder("float32"), leaves_of
        with WeightLoader(models.table("float32")) as loader:
            self._tensors = loader.load_weights("numpy")
        self._program = Program(floats.model, partial(embeddings, sentences=floats.sentences))
        ids = tokenized(models.held_out(count), floats.tokenizer, floats.sentences.max_tokens)
        self._batches = padded_batches(ids)
        self._exact = self._embeddings(floats.model)

    def fit(self, tensors: dict[str, Any]) -> tuple[float, float]:
        """Mean and first percentile of the cosine, with these weights in the place of the model's own."""
        from aq_jax.nn.load import read_architecture

        plan = read_architecture(models.table("float32").parent)
        known = {name: tensors.get(name, value) for name, value in self._tensors.items()}
        found = self._embeddings(plan.fill(known, "float32", "the benchmark"))
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(self._exact, axis=1)
        cosines = (found * self._exact).sum(1) / norms
        return float(cosines.mean()), float(np.quantile(cosines, 0.01))

    def _embeddings(self, model: Any) -> np.ndarray:
        leaves = self._leaves_of(model)
        parts = [np.asarray(self._program(leaves, ids, lengths))[lengths > 0] for ids, lengths in self._batches]
        return np.concatenate(parts).astype(np.float64)


def accuracy(full: bool) -> Iterator[Line]:
    """A line for each way; beside another library's, the best of ours that has no more bits."""
    judge = Judge(300 if full else 64)
    found: list[Fit] = []
    for fit in (*calibrated(judge, full), *uncalibrated(judge, full)):
        if isinstance(fit, Skipped):
            yield fit
        else:
            found.append(fit)
    for fit in sorted(found, key=lambda fit: (-fit.bits, fit.name)):
        figures = {"bits": fit.bits, "p1": fit.low}
        if fit.stored > fit.bits + 0.01:
            figures["bits as stored"] = fit.stored
        if fit.kind == "peer":
            for kind in ("data-free", "calibrated"):
                if best := best_within(found, fit.bits, kind):
                    figures |= {f"{kind} bits": best.bits, f"{kind} mean": best.mean, f"{kind} p1": best.low}
        note = fit.kind if fit.kind != "peer" else ""
        yield Result(f"{fit.name}: embedding cosine", fit.mean, "cosine", note=note, figures=figures)


def best_within(found: list[Fit], bits: float, kind: str) -> Fit | None:
    """The best of a kind that has no more bits."""
    fitting = [fit for fit in found if fit.kind == kind and fit.bits <= bits + 0.005]
    return max(fitting, key=lambda fit: fit.mean, default=None)


def uncalibrated(judge: Judge, full: bool) -> Iterator[Fit | Skipped]:
    """All peers, ours among them."""
    from safetensors.numpy import load_file

    modules = [module for module in peers.MODULES if module != "numpy_plain"]  # its weights are the vectorized ones'
    with peer_children("benchmarks.suites.accuracy:contenders", full, modules=modules) as (children, skipped):
        yield from skipped
        for module, child in children.items():
            for name in child.names:
                peer, bits, group = name.split("|")
                path = models.scratch() / "weights.safetensors"
                label = f"{peer} {bits} bits, {f'g{group}' if group != '0' else 'rows'}"
                try:
                    stored, needed, count = child.call(name, str(path))
                except ChildError as why:
                    yield Skipped(label, str(why))
                    continue
                kind = "data-free" if module == "ours" else "peer"
                yield Fit(label, needed / count, stored / count, *judge.fit(load_file(path)), kind)


def calibrated(judge: Judge, full: bool) -> Iterator[Fit | Skipped]:
    """Tables that are given; of full runs without any, two that are made here, in some minutes."""
    import aq_jax as aq

    given = [Path(part) for part in os.environ.get(TABLES, "").split(os.pathsep) if part]
    if not given and not full:
        yield Skipped("calibrated gptq", f"{TABLES} names no table, and making one takes minutes")
    if not given and full:
        for bits in (4, 2):
            config = aq.QuantizationConfig(f"int{bits}", group_size=128, symmetric=False, rotate=True, solver="gptq")
            path = models.scratch() / f"gptq{bits}.parquet"
            calibration = aq.CalibrationConfig(sentences=256, max_tokens=64)
            aq.quantize_file(models.table("float32"), path, config, calibration=calibration)
            given.append(path)
    for path in given:
        yield judged_table(judge, path)


def judged_table(judge: Judge, path: Path) -> Fit:
    """A table as it is: all of its tensors take the places of the float model's."""
    from aq_jax.jobs import inspect_table
    from aq_jax.loader import WeightLoader

    layers = [layer for layer in inspect_table(path).layers if models.is_matrix(layer.name)]
    bits = 8 * sum(layer.bytes for layer in layers) / sum(layer.params for layer in layers)
    with WeightLoader(path) as loader:
        fitted = judge.fit(loader.load_weights("numpy"))
    return Fit(f"aq_jax calibrated, {path.stem}", bits, bits, *fitted, "calibrated")
