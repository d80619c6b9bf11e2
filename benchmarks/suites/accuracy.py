"""Measure every library's accuracy on MiniLM: the cosine of embeddings with the float32 model's, and bits a weight.

Each library quantizes the linears and the word embedding, and its dequantized weights run in our float32 encoder. So
only the weights differ: no activations are rounded. Bits count alike for all: packed codes, and scales and zero points
in the types that they are stored in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, peers
from benchmarks.calibrated import VARIABLE, CalibratedTable, describe, given_tables
from benchmarks.children import ChildError, shorten
from benchmarks.peers.ours import ABSMAX, MSE, Ours, array_bytes
from benchmarks.suites.contenders import peer_children
from benchmarks.timing import Line, Result, Skipped

# Bits -> group sizes, of which each library takes the nearest that it has: for full runs, slow peers, quick runs.
FULL = {16: (peers.ROW,), 8: (peers.ROW,), 5: (32,), 4: (128, 32), 3: (128,), 2: (128, 64)}
SLOW = {4: (64,), 3: (64,), 2: (64,)}
QUICK = {4: (128,), 2: (128,)}
UNOPTIMIZED = "hqq, no optimizer"  # left out where the method itself is measured
OURS_QUICK = {4: (128, 32), 2: (128,)}  # some peers have small groups only


@dataclass(frozen=True)
class Measurement:
    """The bits and the accuracy of one way to quantize.

    Args:
        name: The name of the quantizer, with its width and group.
        bits: Bits a weight, over the linears and the word embedding, of packed codes, scales and zero points.
        stored: The same as the library stores them; for ours, in a .parquet table, which compresses scales.
        mean, low: The cosine of embeddings with the float32 model's, and its first percentile.
        kind: "peer", "data-free" or "calibrated".
        made: The record of how a calibrated table was made.
    """

    name: str
    bits: float
    stored: float
    mean: float
    low: float
    kind: str
    made: Mapping[str, Any] = field(default_factory=dict)


def contenders(module: str, full: bool) -> dict[str, Callable[..., Any]]:
    """Return, in a child, "peer|bits|group" -> a call that writes dequantized weights to a file, and returns bits."""
    calls: dict[str, Callable[..., Any]] = {}
    # Some peers have no zero points: compare them with ours without.
    ours = [Ours(f"{MSE}, symmetric", "mse", rotate=True)] if module == "ours" else []
    for peer in (*peers.load(module), *ours):
        if peer.name == UNOPTIMIZED if full else peer.slow or peer.name == MSE:
            continue
        wanted = FULL if full else OURS_QUICK if module == "ours" else QUICK
        for bits, sizes in (SLOW if peer.slow else wanted).items():
            if bits in peer.widths and not (peer.name == ABSMAX and bits < 8):  # as NumPy
                for group in dict.fromkeys(peers.nearest_group(peer, bits, size) for size in sizes):
                    calls[f"{peer.name}|{bits}|{group}"] = partial(dequantized, peer, bits, group)
    return calls


def dequantized(peer: peers.Peer, bits: int, group: int, path: str) -> list[int]:
    """Write dequantized weights to a file; return the bits as stored, the bits as needed, and the number of weights."""
    from safetensors.numpy import save_file

    out, stored, needed, count = {}, 0, 0, 0
    for name, w in models.iter_matrices():
        q = peer.quantize(peer.prepare(w), bits, group)
        out[name] = np.ascontiguousarray(peer.dequantize(q))
        stored, needed, count = stored + peer.stored_bits(q), needed + peer.packed_bits(q), count + w.size
    save_file(out, path)
    return [stored, needed, count]


class Judge:
    """The float32 model, and sentences on which no table was calibrated.

    Args:
        lines: The sentences.
    """

    def __init__(self, lines: list[str]) -> None:
        from aq_jax.calibration.text import pad_batches, tokenize
        from aq_jax.io.loader import WeightLoader
        from aq_jax.nn.compiled import Program
        from aq_jax.nn.encoder import embed_batch

        floats = models.encoder("float32")
        with WeightLoader(models.table("float32")) as loader:
            self._tensors = loader.load_weights("numpy")
        self._program = Program(partial(embed_batch, sentences=floats.sentences))
        vocabulary = floats.model.config.vocab_size
        self._batches = pad_batches(tokenize(lines, floats.tokenizer, floats.sentences.max_tokens, vocabulary))
        self._exact = self._embeddings(floats.model)

    def cosines(self, tensors: dict[str, Any]) -> tuple[float, float]:
        """Return mean and first percentile of the cosine, with these weights in place of the model's own."""
        from aq_jax.nn.architecture import read_architecture

        architecture = read_architecture(models.table("float32").parent)
        weights = {name: tensors.get(name, value) for name, value in self._tensors.items()}
        found = self._embeddings(architecture.fill(weights, "float32", "the benchmark"))
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(self._exact, axis=1)
        cosines = (found * self._exact).sum(1) / norms
        return float(cosines.mean()), float(np.quantile(cosines, 0.01))

    def _embeddings(self, model: Any) -> np.ndarray:
        run = self._program.bind(model)
        parts = [np.asarray(run(ids, lengths))[lengths > 0] for ids, lengths in self._batches]
        return np.concatenate(parts).astype(np.float64)


def accuracy(full: bool) -> Iterator[Line]:
    """Yield a line for each way to quantize; beside another library's, our best one with no more bits."""
    tables: list[CalibratedTable] = []
    for table in calibrated(full):
        if isinstance(table, Skipped):
            yield table
        else:
            tables.append(table)
    lines = models.held_out(300 if full else 64, seen_by_any(tables))
    yield Result("judged by sentences of Python's manual that no table has seen", len(lines), "sentences")
    judge = Judge(lines)
    found: list[Measurement] = []
    for fit in (*(measure_table(judge, table) for table in tables), *uncalibrated(judge, full)):
        if isinstance(fit, Skipped):
            yield fit
        else:
            found.append(fit)
    for fit in sorted(found, key=lambda fit: (-fit.bits, fit.name)):
        yield line_of(fit, found)


def line_of(fit: Measurement, found: list[Measurement]) -> Result:
    """Build the line of one way to quantize."""
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


def best_within(found: list[Measurement], bits: float, kind: str) -> Measurement | None:
    """Find the best of a kind that has no more bits."""
    fitting = [fit for fit in found if fit.kind == kind and fit.bits <= bits + 0.005]
    return max(fitting, key=lambda fit: fit.mean, default=None)


def uncalibrated(judge: Judge, full: bool) -> Iterator[Measurement | Skipped]:
    """Measure all peers, ours among them."""
    from safetensors.numpy import load_file

    modules = [module for module in peers.MODULES if module != "numpy_plain"]  # its weights are the vectorized ones'
    with peer_children("benchmarks.suites.accuracy:contenders", full, modules=modules) as (children, skipped):
        yield from skipped
        for module, child in children.items():
            for name in child.names:
                peer, bits, group = name.split("|")
                path = models.scratch_folder() / "weights.safetensors"
                label = f"{peer} {bits} bits, {f'g{group}' if group != '0' else 'rows'}"
                try:
                    stored, needed, count = child.call(name, str(path))
                except ChildError as why:
                    yield Skipped(label, str(why))
                    continue
                kind = "data-free" if module == "ours" else "peer"
                yield Measurement(label, needed / count, stored / count, *judge.cosines(load_file(path)), kind)


def calibrated(full: bool) -> Iterator[CalibratedTable | Skipped]:
    """Find the given calibrated tables, if enough text is left to judge them by; else make two, in full runs."""
    from aq_jax.validate.config import MIN_TEXTS

    paths, texts = given_tables()
    if not paths and not full:
        yield Skipped("calibrated gptq", f"{VARIABLE} names no table, and making one takes minutes")
    taken: list[CalibratedTable] = []
    for path in paths or (make_tables() if full else ()):
        try:
            table = describe(path, texts)
        except (OSError, ValueError) as why:
            yield Skipped(f"table {path.parent.name}/{path.name}", shorten(why).replace(str(path), path.name))
            continue
        if len(models.held_out(MIN_TEXTS, seen_by_any([*taken, table]))) < MIN_TEXTS:
            yield Skipped(table.name, f"fewer than {MIN_TEXTS} sentences would be left that no table has seen")
            continue
        if table.name in {other.name for other in taken}:
            table = replace(table, name=f"{table.name}, table {table.made['table'][:8]}")
        taken.append(table)
        yield table


def seen_by_any(tables: Collection[CalibratedTable]) -> set[str]:
    """Unite the lines that the tables have seen."""
    return set().union(*(table.seen for table in tables))


def make_tables() -> Iterator[Path]:
    """Make calibrated tables of four and two bits, in a few minutes."""
    import aq_jax as aq

    for bits in (4, 2):
        config = aq.QuantizationConfig(f"int{bits}", group_size=128, symmetric=False, rotate=True, solver="gptq")
        path = models.scratch_folder() / f"gptq{bits}.parquet"
        calibration = aq.CalibrationConfig(sentences=256, max_tokens=64)
        aq.quantize_file(models.table("float32"), path, config, calibration=calibration)
        yield path


def measure_table(judge: Judge, table: CalibratedTable) -> Measurement | Skipped:
    """Measure a table, all of whose tensors replace the float model's."""
    from aq_jax.io.loader import WeightLoader
    from aq_jax.store.inspection import inspect_table

    try:
        layers = [layer for layer in inspect_table(table.path).layers if models.is_matrix(layer.name)]
        params = sum(layer.params for layer in layers)
        with WeightLoader(table.path) as loader:
            needed = 8 * sum(array_bytes(loader.get_quantized(layer.name)) for layer in layers) / params
            fitted = judge.cosines(loader.load_weights("numpy"))
    except (OSError, ValueError, ZeroDivisionError) as why:
        return Skipped(table.name, shorten(why))
    stored = 8 * sum(layer.bytes for layer in layers) / params
    return Measurement(table.name, needed, stored, *fitted, "calibrated", table.made)
