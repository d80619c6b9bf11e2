"""Thresholds against what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from aq_jax.errors import ConfigError
from aq_jax.validate.config import Case, ValidationConfig

if TYPE_CHECKING:
    from aq_jax.nn.models import Task

Report = Mapping[str, Any]


def _error(kind: str) -> Callable[[Report], float]:
    return lambda r: r["kinds"].get(kind)["rel_mse"]


# Threshold -> where a case's report has what it is compared with.
MEASURES: Mapping[str, Callable[[Report], float]] = {
    "min_ratio_float32": lambda r: r["size"]["ratio_float32"],
    "min_ratio_float16": lambda r: r["size"]["ratio_float16"],
    "max_bits_per_weight": lambda r: r["size"]["bits_per_weight"],
    "max_metadata_share": lambda r: r["size"]["metadata_share"],
    "min_weight_cosine": lambda r: r["layer_cosines"]["mean"],
    "min_weight_cosine_worst": lambda r: r["layer_cosines"]["min"],
    "max_weight_error": lambda r: r["rel_mse"],
    "max_weight_error_worst": lambda r: r["layer_errors"]["max"],
    "max_weight_error_embeddings": _error("embeddings"),
    "max_weight_error_attention": _error("attention"),
    "max_weight_error_feed_forward": _error("feed-forward"),
    "max_weight_error_norms": _error("norms"),
    "max_weight_error_other": _error("other"),
    "min_output_cosine": lambda r: r["outputs"]["cosine"]["mean"],
    "min_output_cosine_p1": lambda r: r["outputs"]["cosine"]["p1"],
    "min_output_cosine_worst": lambda r: r["outputs"]["cosine"]["min"],
    "max_output_cosine_std": lambda r: r["outputs"]["cosine"]["std"],
    "max_spearman_loss": lambda r: r["outputs"]["spearman"]["float"] - r["outputs"]["spearman"]["quantized"],
    "max_perplexity_ratio": lambda r: r["outputs"]["perplexity"]["ratio"],
    "max_kl": lambda r: r["outputs"]["kl"]["mean"],
    "min_same_top": lambda r: r["outputs"]["same_top"]["rate"],
    "max_convert_seconds": lambda r: sum(r["seconds"]["convert"].values()),
    "max_load_seconds": lambda r: sum(r["seconds"]["load"].values()),
    "max_peak_memory_mb": lambda r: r["peak_memory_bytes"] / 1e6,
}
OF_ENCODERS = (
    "min_output_cosine", "min_output_cosine_p1", "min_output_cosine_worst", "max_output_cosine_std",
    "max_spearman_loss",
)  # fmt: skip
OF_LANGUAGE_MODELS = ("max_perplexity_ratio", "max_kl", "min_same_top")


def check_thresholds(config: ValidationConfig, task: Task) -> None:
    """Refuse thresholds of what this kind of model does not have, before anything is converted.

    Raises:
        ConfigError: naming the case and the threshold.
    """
    foreign, kind = (OF_LANGUAGE_MODELS, "an encoder") if task == "embed" else (OF_ENCODERS, "a language model")
    for case in config.cases:
        for key in case.thresholds:
            if key in foreign:
                raise ConfigError(
                    f"case {case.name!r}: {key}: the model is {kind}, which has no such figure; leave it out"
                )
        if case.max_spearman_loss is not None and not config.labels:
            raise ConfigError(f"case {case.name!r}: max_spearman_loss: wanted labels = FILE, of pairs with scores")


def judged(case: Case, report: Report) -> list[dict[str, Any]]:
    """Every criterion of a case: digests and schemas always, and the thresholds that are given.

    A figure that nothing was measured for, such as the cosine of no quantized tensor, is None and does not hold.

    >>> report = {"digests": {"ok": True}, "schemas": {"v1_read": True}, "size": {"ratio_float32": 3.94}}
    >>> [(c["name"], c["wanted"], c["ok"]) for c in judged(Case("a", "a.toml", min_ratio_float32=4), report)]
    [('ratio_float32', '>= 4', False), ('digests', 'true', True), ('v1_read', 'true', True)]
    """
    found: list[dict[str, Any]] = []
    for key, threshold in case.thresholds.items():
        try:
            value = MEASURES[key](report)
        except TypeError:  # a part of the report is None
            value = None
        least = key.startswith("min_")
        holds = value is not None and (value >= threshold if least else value <= threshold)
        wanted = f"{'>=' if least else '<='} {threshold:g}"
        found.append({"name": key[4:], "found": value, "wanted": wanted, "ok": bool(holds)})
    facts = {"digests": report["digests"]["ok"], **report["schemas"]}
    return found + [{"name": name, "found": fact, "wanted": "true", "ok": fact} for name, fact in facts.items()]
