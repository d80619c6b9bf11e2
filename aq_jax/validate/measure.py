"""Measure a case's table: size, fit, outputs and speed."""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from flax import nnx

from aq_jax.codes import CODES
from aq_jax.config import ConversionConfig
from aq_jax.core.dispatch import Activations
from aq_jax.nn.load import load_model
from aq_jax.store import decode, open_table
from aq_jax.store.inspection import inspect_table
from aq_jax.store.verify import verify_table
from aq_jax.validate.config import Case
from aq_jax.validate.metrics import distribution
from aq_jax.validate.outputs import Judge

if TYPE_CHECKING:
    from aq_jax.conversion.write import ConversionResult
    from aq_jax.nn import Encoder, Generator, Reranker
    from aq_jax.nn.models import Family
    from aq_jax.store.inspection import Layer

LOADS = 3  # the fastest of so many loads counts


def measure(
    case: Case,
    conversion: ConversionConfig,
    done: ConversionResult,
    model: Mapping[str, Any],
    family: Family,
    judge: Judge,
) -> dict[str, Any]:
    """Measure a case's table.

    Args:
        case: the case.
        conversion: conversion that it asked for.
        done: result of that conversion.
        model: float model, as the report describes it.
        family: family of the model.
        judge: judge of outputs.

    Returns:
        The case's report, but for the memory of its conversion and the criteria.

    >>> measure(case, conversion, done, model, FAMILIES["bert"], judge)["size"]["ratio_float32"]  # doctest: +SKIP
    3.95
    """
    table, verdict = inspect_table(done.path), verify_table(done.path)
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
        "seconds": {
            "convert": _with_total(done.seconds),
            "load": _with_total(load_seconds(done.path)),
            "encode": judge.speeds(loaded),
        },
        "schemas": {"v2_written": table.version == 2},
        "digests": {"rows": verdict.rows, "unchecked": verdict.unchecked, "ok": verdict.ok, "table": digest},
    }  # fmt: skip


def _layer(layer: Layer, kind: str) -> dict[str, Any]:
    number = re.search(r"\blayers?\.(\d+)\.", layer.name)
    found = {
        name: getattr(layer, name) for name in ("shape", "quant_type", "params", "bytes", "bits", "cosine", "rel_mse")
    }
    return {"name": layer.name, "kind": kind, "layer": int(number[1]) if number else None} | found


def _kind(layers: list[Layer]) -> dict[str, Any]:
    """Describe the tensors of a kind; their fit is that of those that were quantized."""
    cosines = [layer.cosine for layer in layers if layer.cosine is not None]
    return {
        "tensors": len(layers), "params": sum(layer.params for layer in layers),
        "cosine_mean": float(np.mean(cosines)) if cosines else None, "cosine_min": min(cosines, default=None),
        "rel_mse": _rel_mse(layers),
    }  # fmt: skip


def _rel_mse(layers: list[Layer]) -> float | None:
    """Average the errors of quantized tensors, by their parameters."""
    found = [(layer.rel_mse, layer.params) for layer in layers if layer.rel_mse is not None]
    return sum(error * params for error, params in found) / sum(params for _, params in found) if found else None


def _with_total(seconds: Mapping[str, float]) -> dict[str, float]:
    return {**seconds, "total": sum(seconds.values())}


def _activations(model: Encoder | Generator | Reranker) -> Activations:
    """Find out what inputs of quantized layers are rounded to, whoever chose it."""
    found = (getattr(part, "activations", None) for _, part in nnx.iter_modules(model.model))
    return next((activations for activations in found if activations is not None), "float32")


def load_seconds(path: str) -> dict[str, float]:
    """Time opening a table, reading and checking all rows, and dequantizing them into NumPy; the fastest load counts.

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
            rows = {name: table.read_tensor(name) for name in table.names}
            marks.append(time.perf_counter())
            for each in rows.values():
                decode(each)
            marks.append(time.perf_counter())
        loads.append(np.diff(marks).tolist())
    return dict(zip(("open", "read", "dequantize"), min(loads, key=sum), strict=True))
