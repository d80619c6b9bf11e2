"""Make a report such as `aq-jax validate` writes of an encoder, or of a language model. Nothing is computed."""

from __future__ import annotations

from typing import Any

# Name, bits, mean output cosine, relative error of the weights.
CASES = (("int8", 8, 0.9995, 6.1e-5), ("int4", 4, 0.991, 0.0116), ("int2 plain", 2, 0.579, 0.119))
LAYERS = [f"encoder.layer.{i}.{part}.weight" for i in range(6) for part in ("query", "key", "value", "output")]


def case(name: str, bits: int, cosine: float, error: float) -> dict[str, Any]:
    """Make a case, which holds unless it loses too much."""
    layers = [
        {"name": layer, "kind": "attention", "layer": 0, "shape": [384, 384], "quant_type": f"int{bits}",
         "params": 384**2, "bytes": 384 * 48 * bits, "bits": bits, "cosine": 1 - error / (2 + i), "rel_mse": error}
        for i, layer in enumerate(LAYERS)
    ]  # fmt: skip
    layers.append(layers[0] | {"name": "norm.weight", "quant_type": "none", "cosine": None, "rel_mse": None})
    spread = {"count": 400, "mean": cosine, "std": 0.001, "p1": cosine - 0.02, "min": cosine - 0.05, "p99": 1, "max": 1}
    found = [("size.ratio_float32", 31 / bits, ">= 3.8", True), ("outputs.cosine.mean", cosine, ">= 0.9", cosine > 0.9)]
    kind = {"tensors": 24, "params": 3_538_944, "cosine_mean": 1 - error / 9, "cosine_min": 0.5, "rel_mse": error}
    return {
        "name": name, "config_file": f"configs/{name}.toml", "activations": "float32", "ok": cosine > 0.9,
        "notes": ["calibrated on 256 sentences"], "quant_types": {f"int{bits}": 24, "none": 1},
        "size": {"file_bytes": 2.8e6 * bits, "ratio_float32": 31 / bits, "bits_per_weight": bits * 1.03},
        "layers": layers, "kinds": {"attention": kind, "norms": dict.fromkeys(kind) | {"tensors": 1, "params": 384}},
        "rel_mse": error, "layer_cosines": spread, "layer_errors": spread,
        "outputs": {"kind": "embeddings", "cosine": spread, "spearman": {"float": 82.0, "quantized": 80, "loss": 2.0}},
        "seconds": {"convert": {"read": 1, "total": 1.2}, "load": {"open": 0.01, "total": 0.073},
                    "encode": {"sentences_a_second": 412.0, "float_sentences_a_second": 388.0}},
        "peak_memory_bytes": 9.4e8, "digests": {"rows": 25, "unchecked": 0, "ok": True, "table": "5e" * 32},
        "criteria": [dict(zip(("name", "found", "wanted", "ok"), each, strict=True)) for each in found],
    }  # fmt: skip


def sample() -> dict[str, Any]:
    """Make the whole report: cases of which the last is not good enough, beside another library."""
    return {
        "schema": 2, "ok": False, "created": "2026-11-22T17:00:00Z",
        "model": {"source": "models/all-MiniLM-L6-v2", "architecture": "bert", "tensors": 25, "params": 22_713_216,
                  "float32_bytes": 90_852_864},
        "text": {"name": "reference sentences", "sentences": 400, "digest": "ab" * 32, "seed": 0, "excluded": 256},
        "labels": {"name": "sts-b test", "pairs": 1379, "excluded": 0},
        "environment": {"machine": "x86_64", "cores": 2, "python": "3.11.7", "platform": "Linux",
                        "versions": {"aq_jax": "0.4.0", "jax": "0.10.2"}},
        "config": {"peers": [{"name": "other 4 bits", "bits_per_weight": 4.5, "accuracy": 0.965}]},
        "cases": [case(*arguments) for arguments in CASES],
    }  # fmt: skip


def tokens() -> dict[str, Any]:
    """Make the report of a language model: perplexity and KL instead of cosines."""
    report = sample() | {"labels": None, "config": {"peers": []}}
    for i, found in enumerate(report["cases"]):
        kl = {"mean": 1e-4 * 14.0**i, "standard_error": 1e-5}
        perplexity = {"float": 3.214, "quantized": 3.3, "ratio": 1.03}
        found["outputs"] = {"kind": "tokens", "perplexity": perplexity, "kl": kl, "same_top": {"rate": 0.98}}
    return report
