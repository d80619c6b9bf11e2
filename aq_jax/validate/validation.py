"""A validation, done: every case converted, measured and judged; the report is as docs/validation.md says."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import math
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from flax import nnx

from aq_jax._version import __version__
from aq_jax.codes import CODES
from aq_jax.config import ConversionConfig
from aq_jax.converters.checkpoint import open_checkpoint
from aq_jax.converters.convert import convert
from aq_jax.converters.huggingface import resolve_source
from aq_jax.core.dispatch import Activations
from aq_jax.io.loader import WeightLoader
from aq_jax.nn.architecture import read_architecture
from aq_jax.nn.load import load_model
from aq_jax.quantizers.screen import is_floating
from aq_jax.store import decode, open_table
from aq_jax.store.inspection import inspect_table
from aq_jax.store.verification import verify_table
from aq_jax.validate import independent_reader
from aq_jax.validate.config import FLOAT, Case, ValidationConfig, conversions
from aq_jax.validate.criteria import check_thresholds, judged
from aq_jax.validate.data import HeldOut, held_out
from aq_jax.validate.metrics import distribution
from aq_jax.validate.outputs import Judge, judge_of
from aq_jax.validate.process import measured
from aq_jax.validate.report import write_report

if TYPE_CHECKING:
    from aq_jax.conversion.write import Written
    from aq_jax.nn import Encoder, Generator
    from aq_jax.nn.models import Family
    from aq_jax.progress import Progress
    from aq_jax.store.inspection import Inspection, Layer
    from aq_jax.store.verification import Verdict

SCHEMA = 1
LOADS = 3  # the fastest of so many loads counts
LIBRARIES = ("jax", "jaxlib", "numpy", "pyarrow", "flax", "tokenizers")


def validate(
    config: ValidationConfig,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Convert a model as each case says, judge what comes of it, and write report.json, report.md and report.html.

    Each case is converted in a process of its own, whose peak memory is measured.

    Args:
        config: from `load_validation`, or made by hand.
        progress: called with what is being done, its size, and the size of all.

    Returns:
        The report, of JSON types, as docs/validation.md describes it; `report["ok"]` is the verdict.

    Raises:
        ConfigError: for a config of which something cannot be judged, before anything is converted.
        FormatError, AqError, OSError: as `convert` and `load_model`.

    >>> from aq_jax.validate.config import load_validation  # doctest: +SKIP
    >>> validate(load_validation("configs/validate_minilm.toml"))["ok"]  # doctest: +SKIP
    True
    """
    asked = conversions(config)
    held = held_out(config, asked)
    source = resolve_source(asked[0].source)
    architecture = read_architecture(source)
    family, name = architecture.family, str(architecture.fields["model_type"])
    check_thresholds(config, family.task)
    allow_pickle = any(conversion.allow_pickle for conversion in asked)
    plain = str(Path(config.folder, f"{FLOAT}.parquet"))
    convert(ConversionConfig(asked[0].source, plain, allow_pickle=allow_pickle), progress)
    model, v1_read = _model(asked[0].source, name, plain, allow_pickle)
    judge = judge_of(load_model(plain), held)
    cases = []
    for case, conversion in zip(config.cases, asked, strict=True):

        def tell(name: str, size: int, total: int, case: Case = case) -> None:
            if progress is not None:
                progress(f"{case.name}: {name}", size, total)

        done, peak = measured(convert, conversion, tell)
        measures = _measures(
            case, conversion, done, inspect_table(done.path), verify_table(done.path), model, family, judge
        )
        measures |= {"peak_memory_bytes": peak, "schemas": {"v1_read": v1_read, **_schemas(Path(done.path))}}
        criteria = judged(case, measures)
        cases.append(measures | {"ok": all(c["ok"] for c in criteria), "criteria": criteria})
    found = {
        "schema": SCHEMA, "ok": all(case["ok"] for case in cases),
        "created": dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "model": model, **_texts(held), "environment": environment(),
        "config": dataclasses.asdict(config), "cases": cases,
    }  # fmt: skip
    # JSON has no NaN and no infinity: what cannot be said is null.
    report = json.loads(json.dumps(found), parse_constant=lambda _: None)
    write_report(report, config.folder)
    return report


def _texts(held: HeldOut) -> dict[str, Any]:
    record = held.text.record()
    text = {"name": record.pop("text"), **record, "excluded": held.excluded}
    pairs = held.pairs
    return {
        "text": text,
        "labels": pairs and {"name": pairs.name, "pairs": len(pairs.rows), "excluded": pairs.excluded},
    }


def _model(source: str, architecture: str, plain: str, allow_pickle: bool) -> tuple[dict[str, Any], bool]:
    """What the model is, and whether a V1 table of it is read back bit for bit."""
    with open_checkpoint(resolve_source(source), allow_pickle) as weights, WeightLoader(plain) as table:
        names, shapes = list(weights.shapes), weights.shapes.values()
        with open_table(plain) as opened:
            same = opened.version == 1 and list(opened.names) == names
        same = same and all(_same(table.get_layer(n, "numpy", copy=False), weights.read(n)) for n in names)
    floats = sum(math.prod(shape) for shape, dtype in shapes if is_floating(dtype))
    others = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes if not is_floating(dtype))
    model = {
        "source": source, "architecture": architecture, "tensors": len(names),
        "params": sum(math.prod(shape) for shape, _ in shapes),
        "float32_bytes": 4 * floats + others, "float16_bytes": 2 * floats + others,
    }  # fmt: skip
    return model, same


def _measures(
    case: Case,
    conversion: ConversionConfig,
    done: Written,
    table: Inspection,
    verdict: Verdict,
    model: Mapping[str, Any],
    family: Family,
    judge: Judge,
) -> dict[str, Any]:
    """What a case's report says of its table, but for what is done in other processes and by other readers."""
    kinds: dict[str, list[Layer]] = {}
    for layer in table.layers:
        kinds.setdefault(family.kind(layer.name), []).append(layer)
    quantized = [layer for layer in table.layers if layer.quant_type in CODES]
    size, tensors = table.file_bytes, sum(layer.bytes for layer in table.layers)
    weights = sum(layer.params for layer in quantized)
    loaded = load_model(done.path, cast("Activations | None", case.activations))
    outputs = judge.outputs(loaded)
    policy = conversion.quantization
    with open_table(done.path) as opened:
        digest = opened.metadata.digest if opened.metadata else None
    return {
        "name": case.name, "config_file": case.config, "activations": _activations(loaded),
        "config": dataclasses.asdict(conversion) | {"quantization": policy and policy.to_dict()},
        "notes": [*done.kept.values(), *done.notes],
        "quant_types": dict(Counter(layer.quant_type for layer in table.layers)),
        "size": {
            "file_bytes": size,
            **{f"ratio_{name}": model[f"{name}_bytes"] / size for name in ("float32", "float16")},
            "bits_per_weight": 8 * size / max(table.params, 1),
            "bits_per_quantized_weight": 8 * sum(layer.bytes for layer in quantized) / weights if weights else None,
            "metadata_share": (size - tensors) / size,
        },
        "layers": [_layer(layer, family.kind(layer.name)) for layer in table.layers],
        "kinds": {kind: _kind(layers) for kind, layers in kinds.items()},
        "rel_mse": _rel_mse(quantized),
        "layer_cosines": distribution([layer.cosine for layer in quantized if layer.cosine is not None]),
        "layer_errors": distribution([layer.rel_mse for layer in quantized if layer.rel_mse is not None]),
        "outputs": outputs,
        "seconds": {"convert": done.seconds, "load": load_seconds(done.path), "encode": judge.speeds(loaded)},
        "digests": {"rows": verdict.rows, "unchecked": verdict.unchecked, "ok": verdict.ok, "table": digest},
    }  # fmt: skip


def _layer(layer: Layer, kind: str) -> dict[str, Any]:
    number = re.search(r"\blayers?\.(\d+)\.", layer.name)
    found = {
        name: getattr(layer, name) for name in ("shape", "quant_type", "params", "bytes", "bits", "cosine", "rel_mse")
    }
    return {"name": layer.name, "kind": kind, "layer": int(number[1]) if number else None} | found


def _kind(layers: list[Layer]) -> dict[str, Any]:
    """Of all tensors of a kind; fit, of those of them that were quantized."""
    cosines = [layer.cosine for layer in layers if layer.cosine is not None]
    return {
        "tensors": len(layers), "params": sum(layer.params for layer in layers),
        "cosine_mean": float(np.mean(cosines)) if cosines else None, "cosine_min": min(cosines, default=None),
        "rel_mse": _rel_mse(layers),
    }  # fmt: skip


def _rel_mse(layers: list[Layer]) -> float | None:
    """The mean error of those that were quantized, each as much as it has parameters."""
    found = [(layer.rel_mse, layer.params) for layer in layers if layer.rel_mse is not None]
    return sum(error * params for error, params in found) / sum(params for _, params in found) if found else None


def _activations(model: Encoder | Generator) -> Activations:
    """What inputs of quantized layers are rounded to, whoever chose it."""
    found = (getattr(part, "activations", None) for _, part in nnx.iter_modules(model.model))
    return next((activations for activations in found if activations is not None), "float32")


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def agree(ours: np.ndarray, theirs: np.ndarray, block: int) -> bool:
    """Whether rotated tensors differ by no more than what sums of float32 in another order differ by.

    A sum of n terms, n elements a block, is within n 2^-24 of the block's norm: Higham, Accuracy and Stability of
    Numerical Algorithms, 3.1. Two more roundings are those of the matrix and of the other reader. In blocks of 128 one
    code more, of eight bits, moves an element by some ten times as much, or more.

    >>> blocks = np.arange(8, dtype=np.float32)
    >>> agree(blocks, blocks * (1 + 2**-23), 4), agree(blocks, blocks + [0, 0, 1e-4, 0, 0, 0, 0, 0], 4)
    (True, False)
    """
    if ours.shape != theirs.shape:
        return False
    a, b = (x.reshape(-1, block).astype(np.float64) for x in (ours, theirs))
    within = (block + 2) * 2**-24 * np.linalg.norm(b, axis=1, keepdims=True)
    return bool((np.abs(a - b) <= within).all())


def _schemas(path: Path) -> dict[str, bool]:
    """Whether the table is V2, means the same to a reader that shares no code with ours, and is V1 to one of V1."""
    rows, metadata = independent_reader.read_rows(path)
    same = [independent_reader.row_digest(row) for row in rows] == [row["digest"] for row in rows]
    if metadata is not None:
        wanted = (metadata["statistics"], metadata["digest"])
        same = same and independent_reader.table_digests(rows, metadata) == wanted
    with WeightLoader(path) as table:
        for name, value in independent_reader.tensors(rows):
            ours = table.get_layer(name, "numpy", copy=False)
            block = table.describe(name).rotation
            same = same and (agree(ours, value, block) if block else _same(ours, value))
    return {
        "v2_written": independent_reader.begins_with(path, independent_reader.V2),
        "independent_reader": same,
        "v1_columns": independent_reader.reads_as_v1(path),
    }


def load_seconds(path: str) -> dict[str, float]:
    """To open a table, to read and check all rows, and to dequantize them into NumPy; the fastest of a few loads.

    >>> import tempfile
    >>> from aq_jax import save
    >>> save(path := tempfile.mkdtemp() + "/m.arrow", {"w": np.ones(3)})
    >>> list(load_seconds(path))
    ['open', 'read', 'dequantize']
    """
    loads = []
    for _ in range(LOADS):
        marks = [time.perf_counter()]
        with open_table(path) as table:
            marks.append(time.perf_counter())
            rows = {name: [table.read(info.position) for info in table.pieces(name)] for name in table.names}
            marks.append(time.perf_counter())
            for each in rows.values():
                decode(each)
            marks.append(time.perf_counter())
        loads.append(np.diff(marks).tolist())
    return dict(zip(("open", "read", "dequantize"), min(loads, key=sum), strict=True))


def environment() -> dict[str, Any]:
    """Where a report was made.

    >>> sorted(environment())
    ['cores', 'machine', 'platform', 'python', 'versions']
    """
    about = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", about.read_text()) if about.exists() else None
    return {
        "machine": named[1] if named else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(), "platform": platform.platform(),
        "versions": {"aq_jax": __version__} | {name: version(name) for name in LIBRARIES},
    }  # fmt: skip
