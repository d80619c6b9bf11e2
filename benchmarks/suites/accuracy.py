"""Measure every library's accuracy on MiniLM: the cosine of embeddings with the float32 model's, and bits a weight.

Each library quantizes the linears and the word embedding, and its dequantized weights run in our float32 encoder. So
only the weights differ: no activations are rounded. Bits count alike for all: packed codes, and scales and zero points
in the types that they are stored in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, peers
from benchmarks.calibrated import VARIABLE, CalibratedTable, describe, given_tables, rung_name
from benchmarks.children import ChildError, shorten
from benchmarks.peers.ours import OurCode, array_bytes
from benchmarks.suites.contenders import peer_children
from benchmarks.timing import Line, Result, Skipped

# Bits -> group sizes, of which each library takes the nearest that it has: for full runs, slow peers, quick runs.
FULL = {16: (peers.ROW,), 8: (peers.ROW,), 5: (32,), 4: (128, 32), 3: (128,), 2: (128, 64)}
SLOW = {4: (64,), 3: (64,), 2: (64,)}
QUICK = {4: (128,), 2: (128,)}
UNOPTIMIZED = "hqq, no optimizer"  # left out where the method itself is measured
# Ours: a ladder, so that every peer finds something of no more bits and hardly fewer. A rung is the code of the linears
# and that of the word embedding, which can spare more; both are rotated, and have a scale a row. A full run has every
# rung without data and calibrated.
LADDER = (
    ("int8", "int8"), ("int8", "int6"), ("int6", "int6"), ("int6", "tcq5"), ("int6", "tcq4"), ("tcq5", "tcq4"),
    ("tcq5", "tcq3"), ("tcq4", "tcq3"), ("tcq4", "tcq2"), ("tcq3", "tcq2"), ("tcq3", "tcq1.5"), ("tcq2", "tcq2"),
    ("tcq2", "tcq1.5"), ("tcq1.5", "tcq1.5"),
)  # fmt: skip
LADDER_QUICK = (("tcq4", "tcq3"), ("tcq2", "tcq2"))
Choice = tuple[peers.Peer, int, int]  # a library, its bits, and its group size


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
    """Return, in a child, by its label a call that writes dequantized weights to a file, and returns bits."""
    if module == "ours":
        rungs = [tuple((OurCode(code), 0, peers.ROW) for code in rung) for rung in (LADDER if full else LADDER_QUICK)]
        return {
            f"aq_jax {rung_name(*(c.name for c, *_ in rung))}, rotated": partial(dequantized, *rung) for rung in rungs
        }
    calls: dict[str, Callable[..., Any]] = {}
    for peer in peers.load(module):
        if peer.name == UNOPTIMIZED if full else peer.slow:
            continue
        for bits, sizes in (SLOW if peer.slow else FULL if full else QUICK).items():
            if bits in peer.widths:
                for group in dict.fromkeys(peers.nearest_group(peer, bits, size) for size in sizes):
                    choice, label = (peer, bits, group), f"{peer.name} {bits} bits, {f'g{group}' if group else 'rows'}"
                    calls[label] = partial(dequantized, choice, choice)
    return calls


def dequantized(linears: Choice, table: Choice, path: str) -> list[int]:
    """Write dequantized weights to a file; return the bits as stored, the bits as needed, and the number of weights.

    Args:
        linears: What quantizes the linears.
        table: What quantizes the word embedding.
        path: The path of the file.
    """
    from safetensors.numpy import save_file

    out, stored, needed, count = {}, 0, 0, 0
    for name, w in models.iter_matrices():
        peer, bits, group = table if models.is_table(name) else linears
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
        self._batches = pad_batches(tokenize(lines, floats.tokenizer, floats.sentences.max_tokens, vocabulary)[0])
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
    """Yield a line for each way to quantize; `tables.accuracy_table` puts others beside the best of ours."""
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
        yield line_of(fit)


def line_of(fit: Measurement) -> Result:
    """Build the line of one way to quantize."""
    figures = {"bits": fit.bits, "p1": fit.low}
    if fit.kind != "peer":
        figures["bits in a table"] = fit.stored
    elif fit.stored > fit.bits + 0.01:
        figures["bits as stored"] = fit.stored
    note = fit.kind if fit.kind != "peer" else ""
    return Result(f"{fit.name}: embedding cosine", fit.mean, "cosine", note=note, figures=figures, made=dict(fit.made))


def uncalibrated(judge: Judge, full: bool) -> Iterator[Measurement | Skipped]:
    """Measure all peers, ours among them."""
    from safetensors.numpy import load_file

    modules = [module for module in peers.MODULES if module != "numpy_plain"]  # its weights are the vectorized ones'
    with peer_children("benchmarks.suites.accuracy:contenders", full, modules=modules) as (children, skipped):
        yield from skipped
        for module, child in children.items():
            for label in child.names:
                path = models.scratch_folder() / "weights.safetensors"
                try:
                    stored, needed, count = child.call(label, str(path))
                except ChildError as why:
                    yield Skipped(label, str(why))
                    continue
                kind = "data-free" if module == "ours" else "peer"
                yield Measurement(label, needed / count, stored / count, *judge.cosines(load_file(path)), kind)


def calibrated(full: bool) -> Iterator[CalibratedTable | Skipped]:
    """Find the given calibrated tables, and in full runs make the ladder, if enough text is left to judge them by."""
    from aq_jax.validate.config import MIN_TEXTS

    paths, texts = given_tables()
    if not paths and not full:
        yield Skipped("calibrated gptq", f"{VARIABLE} names no table, and making one takes minutes")
    taken: list[CalibratedTable] = []
    for path in itertools.chain(paths, make_tables() if full else ()):
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
    """Make a calibrated table for each rung of the ladder, in about a minute each."""
    import aq_jax as aq

    others = aq.Override("position_embeddings|token_type_embeddings", quant_type="int8", solver="absmax")
    calibration = aq.CalibrationConfig(sentences=256, max_tokens=64)
    for linears, table in LADDER:
        overrides = (aq.Override("word_embeddings", quant_type=table), others)
        policy = aq.QuantizationConfig(linears, per_channel=True, rotate=True, solver="gptq", overrides=overrides)
        path = models.scratch_folder() / f"{linears}_{table}" / "m.parquet"
        path.parent.mkdir()
        aq.convert(aq.ConversionConfig(models.MINILM, str(path), policy, calibration))
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
