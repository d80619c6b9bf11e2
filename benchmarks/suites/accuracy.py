"""Measure how near a quantized MiniLM's embeddings are to the float32 model's, and at how many bits a weight.

Each library quantizes the linears and the word embedding; what it dequantizes runs in our float32 encoder. So only the
weights differ: nobody's activations are rounded. Bits are counted alike for all: codes packed, scales and zero points
in the types that they are kept in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, peers
from benchmarks.calibrated import VARIABLE, Calibrated, described, given
from benchmarks.children import ChildError, brief
from benchmarks.peers.ours import ABSMAX, MSE, Ours, array_bytes
from benchmarks.suites.contenders import peer_children
from benchmarks.timing import Line, Result, Skipped

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
        bits: a weight, over the linears and the word embedding: of codes, packed, and of scales and zero points.
        stored: the same as the library keeps them; of ours, in a .parquet table, which compresses scales.
        mean, low: cosine of embeddings with the float32 model's, and its first percentile.
        kind: "peer", "data-free" or "calibrated".
        made: what a calibrated one was made of.
    """

    name: str
    bits: float
    stored: float
    mean: float
    low: float
    kind: str
    made: Mapping[str, Any] = field(default_factory=dict)


def contenders(module: str, full: bool) -> dict[str, Callable[..., Any]]:
    """List calls of a child: "peer|bits|group" -> write all dequantized weights to a file, and return bits."""
    calls: dict[str, Callable[..., Any]] = {}
    # Others have no zero points: beside them, ours without.
    ours = [Ours(f"{MSE}, symmetric", "mse", rotate=True)] if module == "ours" else []
    for peer in (*peers.load(module), *ours):
        if peer.name == UNOPTIMIZED if full else peer.slow or peer.name == MSE:
            continue
        wanted = FULL if full else OURS_QUICK if module == "ours" else QUICK
        for bits, sizes in (SLOW if peer.slow else wanted).items():
            if bits in peer.widths and not (peer.name == ABSMAX and bits < 8):  # as NumPy
                for group in dict.fromkeys(peers.nearest(peer, bits, size) for size in sizes):
                    calls[f"{peer.name}|{bits}|{group}"] = partial(dequantized, peer, bits, group)
    return calls


def dequantized(peer: peers.Peer, bits: int, group: int, path: str) -> list[int]:
    """Write what quantized weights stand for; return bits as stored, bits as needed, and the number of weights."""
    from safetensors.numpy import save_file

    out, stored, needed, count = {}, 0, 0, 0
    for name, w in models.each_matrix():
        q = peer.quantize(peer.arrange(w), bits, group)
        out[name] = np.ascontiguousarray(peer.dequantize(q))
        stored, needed, count = stored + peer.stored_bits(q), needed + peer.needed_bits(q), count + w.size
    save_file(out, path)
    return [stored, needed, count]


class Judge:
    """The float32 model, and sentences that nothing has seen that is judged.

    Args:
        lines: the sentences.
    """

    def __init__(self, lines: list[str]) -> None:
        from aq_jax.calibration.text import padded_batches, tokenized
        from aq_jax.io.loader import WeightLoader
        from aq_jax.nn.compiled import Program
        from aq_jax.nn.encoder import embeddings

        floats = models.encoder("float32")
        with WeightLoader(models.table("float32")) as loader:
            self._tensors = loader.load_weights("numpy")
        self._program = Program(partial(embeddings, sentences=floats.sentences))
        vocabulary = floats.model.config.vocab_size
        self._batches = padded_batches(tokenized(lines, floats.tokenizer, floats.sentences.max_tokens, vocabulary))
        self._exact = self._embeddings(floats.model)

    def fit(self, tensors: dict[str, Any]) -> tuple[float, float]:
        """Measure mean and first percentile of the cosine, with these weights in the place of the model's own."""
        from aq_jax.nn.architecture import read_architecture

        plan = read_architecture(models.table("float32").parent)
        known = {name: tensors.get(name, value) for name, value in self._tensors.items()}
        found = self._embeddings(plan.fill(known, "float32", "the benchmark"))
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(self._exact, axis=1)
        cosines = (found * self._exact).sum(1) / norms
        return float(cosines.mean()), float(np.quantile(cosines, 0.01))

    def _embeddings(self, model: Any) -> np.ndarray:
        run = self._program.of(model)
        parts = [np.asarray(run(ids, lengths))[lengths > 0] for ids, lengths in self._batches]
        return np.concatenate(parts).astype(np.float64)


def accuracy(full: bool) -> Iterator[Line]:
    """Yield a line for each way; beside another library's, the best of ours that has no more bits."""
    tables: list[Calibrated] = []
    for table in calibrated(full):
        if isinstance(table, Skipped):
            yield table
        else:
            tables.append(table)
    lines = models.held_out(300 if full else 64, seen_by_any(tables))
    yield Result("judged by sentences of Python's manual that no table has seen", len(lines), "sentences")
    judge = Judge(lines)
    found: list[Fit] = []
    for fit in (*(judged_table(judge, table) for table in tables), *uncalibrated(judge, full)):
        if isinstance(fit, Skipped):
            yield fit
        else:
            found.append(fit)
    for fit in sorted(found, key=lambda fit: (-fit.bits, fit.name)):
        yield line_of(fit, found)


def line_of(fit: Fit, found: list[Fit]) -> Result:
    """Write the line of one way."""
    figures, made = {"bits": fit.bits, "p1": fit.low}, dict(fit.made)
    if fit.kind != "peer":
        figures["bits in a table"] = fit.stored
    elif fit.stored > fit.bits + 0.01:
        figures["bits as stored"] = fit.stored
    for kind in ("data-free", "calibrated") if fit.kind == "peer" else ():
        if best := best_within(found, fit.bits, kind):
            figures |= {f"{kind} bits": best.bits, f"{kind} bits in a table": best.stored}
            figures |= {f"{kind} mean": best.mean, f"{kind} p1": best.low}
            made[kind] = best.name
    note = fit.kind if fit.kind != "peer" else ""
    return Result(f"{fit.name}: embedding cosine", fit.mean, "cosine", note=note, figures=figures, made=made)


def best_within(found: list[Fit], bits: float, kind: str) -> Fit | None:
    """Choose the best of a kind that has no more bits."""
    fitting = [fit for fit in found if fit.kind == kind and fit.bits <= bits + 0.005]
    return max(fitting, key=lambda fit: fit.mean, default=None)


def uncalibrated(judge: Judge, full: bool) -> Iterator[Fit | Skipped]:
    """Measure all peers, ours among them."""
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


def calibrated(full: bool) -> Iterator[Calibrated | Skipped]:
    """Describe the tables that are given, as long as enough is left to judge by; or two that full runs make."""
    from aq_jax.validate.config import MIN_TEXTS

    paths, texts = given()
    if not paths and not full:
        yield Skipped("calibrated gptq", f"{VARIABLE} names no table, and making one takes minutes")
    taken: list[Calibrated] = []
    for path in paths or (made_here() if full else ()):
        try:
            table = described(path, texts)
        except (OSError, ValueError) as why:
            yield Skipped(f"table {path.parent.name}/{path.name}", brief(why).replace(str(path), path.name))
            continue
        if len(models.held_out(MIN_TEXTS, seen_by_any([*taken, table]))) < MIN_TEXTS:
            yield Skipped(table.name, f"fewer than {MIN_TEXTS} sentences would be left that no table has seen")
            continue
        if table.name in {other.name for other in taken}:
            table = replace(table, name=f"{table.name}, table {table.made['table'][:8]}")
        taken.append(table)
        yield table


def seen_by_any(tables: Collection[Calibrated]) -> set[str]:
    """Collect the lines that any of them has seen."""
    return set().union(*(table.seen for table in tables))


def made_here() -> Iterator[Path]:
    """Make tables of four and two bits, in some minutes."""
    import aq_jax as aq

    for bits in (4, 2):
        config = aq.QuantizationConfig(f"int{bits}", group_size=128, symmetric=False, rotate=True, solver="gptq")
        path = models.scratch() / f"gptq{bits}.parquet"
        calibration = aq.CalibrationConfig(sentences=256, max_tokens=64)
        aq.quantize_file(models.table("float32"), path, config, calibration=calibration)
        yield path


def judged_table(judge: Judge, table: Calibrated) -> Fit | Skipped:
    """Measure a table as it is: all of its tensors take the places of the float model's."""
    from aq_jax.io.loader import WeightLoader
    from aq_jax.store.inspection import inspect_table

    try:
        layers = [layer for layer in inspect_table(table.path).layers if models.is_matrix(layer.name)]
        params = sum(layer.params for layer in layers)
        with WeightLoader(table.path) as loader:
            needed = 8 * sum(array_bytes(loader.get_quantized(layer.name)) for layer in layers) / params
            fitted = judge.fit(loader.load_weights("numpy"))
    except (OSError, ValueError, ZeroDivisionError) as why:
        return Skipped(table.name, brief(why))
    stored = 8 * sum(layer.bytes for layer in layers) / params
    return Fit(table.name, needed, stored, *fitted, "calibrated", table.made)
