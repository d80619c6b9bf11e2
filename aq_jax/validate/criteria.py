"""Judge a case's report by thresholds, which are keyed by the report's own paths."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from aq_jax.errors import ConfigError
from aq_jax.validate.config import Case, ValidationConfig
from aq_jax.validate.tables import lookup

if TYPE_CHECKING:
    from aq_jax.nn.models import Family, Task


def _under(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names)


DISTRIBUTION = ("count", "mean", "std", "p1", "min", "p99", "max")
# What a case's report has a number for: of any model, and by task.
FIGURES: tuple[str, ...] = (
    *_under("size", "file_bytes", "ratio_float32", "ratio_float16", "bits_per_weight", "bits_per_quantized_weight",
            "metadata_share"),
    "rel_mse", "peak_memory_bytes", "digests.rows", "digests.unchecked",
    *_under("layer_cosines", *DISTRIBUTION), *_under("layer_errors", *DISTRIBUTION),
    *_under("seconds.convert", "read", "calibrate", "allocate", "train", "quantize", "write", "total"),
    *_under("seconds.load", "open", "read", "dequantize", "total"),
    *_under("seconds.encode", "sentences_a_second", "float_sentences_a_second"),
)  # fmt: skip
OUTPUTS: Mapping[Task, tuple[str, ...]] = {
    "embed": (
        *_under("outputs.cosine", *DISTRIBUTION), *_under("outputs.spearman", "float", "quantized", "loss"),
    ),
    "generate": (
        "outputs.tokens",
        *_under("outputs.perplexity", "float", "quantized", "standard_error", "ratio", "ratio_standard_error"),
        *_under("outputs.kl", "mean", "standard_error"), *_under("outputs.same_top", "rate", "standard_error"),
    ),
}  # fmt: skip
OF_KIND = ("tensors", "params", "cosine_mean", "cosine_min", "rel_mse")


def figure_paths(family: Family) -> tuple[str, ...]:
    """List the paths of all numbers that a case's report can have for a family of models.

    >>> from aq_jax.nn.models import FAMILIES
    >>> [path for path in figure_paths(FAMILIES["bert"]) if "attention" in path][-1]
    'kinds.attention.rel_mse'
    """
    kinds = (path for kind in (*family.kinds, "other") for path in _under(f"kinds.{kind}", *OF_KIND))
    return (*FIGURES, *OUTPUTS[family.task], *kinds)


def check_thresholds(config: ValidationConfig, family: Family) -> None:
    """Refuse thresholds of figures that the report will not have, before anything is converted.

    Args:
        config: the validation.
        family: family of its model.

    Raises:
        ConfigError: for a path that is none, naming the case, the path and those that are like it.
    """
    known = figure_paths(family)
    foreign = {path for paths in OUTPUTS.values() for path in paths} - set(known)
    kind = "an encoder" if family.task == "embed" else "a language model"
    for case in config.cases:
        for table, path, _ in _thresholds(case):
            where = f"case {case.name!r}: {table}: {path!r}"
            if path in foreign:
                raise ConfigError(f"{where}: the model is {kind}, whose report has no such figure; leave it out")
            if path not in known:
                near = [p for p in known if p.startswith(f"{path}.")] or difflib.get_close_matches(path, known, 3)
                parts = dict.fromkeys(path.partition(".")[0] + ".*" * ("." in path) for path in known)
                hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(parts)}"
                raise ConfigError(f"{where}: the report of a case has no such figure; {hint}")
            if path.startswith("outputs.spearman.") and not config.labels:
                raise ConfigError(f"{where}: wanted labels = FILE, of pairs with scores")


def judge_case(case: Case, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Judge a case by its digests and schemas, always, and by the thresholds that it has.

    A figure that nothing was measured for, such as the cosine of no quantized tensor, is None and does not hold.

    Args:
        case: the case.
        report: all of the case's report but for the criteria.

    Returns:
        A criterion each, as docs/validation.md describes it.

    >>> report = {"digests": {"ok": True}, "schemas": {"v1_read": True}, "size": {"ratio_float32": 3.94}}
    >>> case = Case("a", "a.toml", at_least={"size.ratio_float32": 4})
    >>> [(c["name"], c["wanted"], c["ok"]) for c in judge_case(case, report)]
    [('size.ratio_float32', '>= 4', False), ('digests', 'true', True), ('v1_read', 'true', True)]
    """
    criteria: list[dict[str, Any]] = []
    for table, path, threshold in _thresholds(case):
        found, at_least = lookup(report, path), table == "at_least"
        holds = found is not None and (found >= threshold if at_least else found <= threshold)
        wanted = f"{'>=' if at_least else '<='} {threshold:g}"
        criteria.append({"name": path, "found": found, "wanted": wanted, "ok": bool(holds)})
    facts = {"digests": report["digests"]["ok"], **report["schemas"]}
    return criteria + [{"name": name, "found": fact, "wanted": "true", "ok": fact} for name, fact in facts.items()]


def _thresholds(case: Case) -> Iterator[tuple[str, str, float]]:
    """Go through a case's thresholds: table, path, number."""
    for table in ("at_least", "at_most"):
        for path, threshold in getattr(case, table).items():
            yield table, path, threshold
