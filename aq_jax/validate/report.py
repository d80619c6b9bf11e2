"""A validation's report as files: JSON, Markdown for people and pull requests, HTML with charts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aq_jax.store.files import replacing
from aq_jax.validate.html import render
from aq_jax.validate.markup import counted, error

WORST = 10
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def write_report(report: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write report.json, report.md and report.html, each whole or not at all.

    Args:
        report: as `validate` returns it.
        folder: of the files; made if it is not there.

    Returns:
        Their paths.

    >>> write_report(report, "build/validation")  # doctest: +SKIP
    """
    writers = {"json": lambda r: json.dumps(r, indent=1, ensure_ascii=False), "md": markdown, "html": render}
    for suffix, text in writers.items():
        with replacing(Path(folder, f"report.{suffix}")) as temporary:
            temporary.write_text(text(dict(report)).rstrip("\n") + "\n", "utf-8")
    return [Path(folder, f"report.{suffix}") for suffix in writers]


def case_table(report: Mapping[str, Any]) -> Table:
    """A line for each case: size, accuracy, speed, and whether every criterion holds; no column that is empty."""
    tokens = any(case["outputs"]["kind"] != "embeddings" for case in report["cases"])
    accuracy = ("output cosine", "p1", "Spearman", "float's Spearman")
    if tokens:
        accuracy = ("perplexity", "float's perplexity", "KL")
    size_and_fit = ("MB", "x f32", "x f16", "bits", "weight cosine", "weight error")
    speed = ("convert s", "load ms", "peak MB")
    header = ("case", "verdict", "activations", *size_and_fit, *accuracy, *speed)
    rows = []
    for case in report["cases"]:
        size, seconds, out = case["size"], case["seconds"], case["outputs"]
        if tokens:
            merit = ((out["perplexity"]["quantized"], 3), (out["perplexity"]["float"], 3), (out["kl"]["mean"], 4))
        else:
            cosine, rho = out["cosine"], out["spearman"] or {"quantized": None, "float": None}
            merit = ((cosine["mean"], 4), (cosine["p1"], 4), (rho["quantized"], 2), (rho["float"], 2))
        sizes = (
            (size["file_bytes"] / 1e6, 2), (size["ratio_float32"], 2), (size["ratio_float16"], 2),
            (size["bits_per_weight"], 2), ((case["layer_cosines"] or {"mean": None})["mean"], 4),
        )  # fmt: skip
        times = (
            (sum(seconds["convert"].values()), 1), (1e3 * sum(seconds["load"].values()), 0),
            (case["peak_memory_bytes"] / 1e6, 0),
        )  # fmt: skip
        weight_error = "" if case["rel_mse"] is None else error(case["rel_mse"])
        fit = (*(number(*figure) for figure in sizes), weight_error)
        judged = "holds" if case["ok"] else "FAILS"
        rows.append(
            (case["name"], judged, case["activations"], *fit, *(number(*figure) for figure in (*merit, *times)))
        )
    told = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return tuple(header[i] for i in told), [tuple(row[i] for i in told) for row in rows]


def failed_table(report: Mapping[str, Any]) -> Table:
    """A line for each criterion that does not hold."""
    failed = [(case["name"], c) for case in report["cases"] for c in case["criteria"] if not c["ok"]]
    rows = [
        (name, c["name"], c["wanted"], "nothing" if c["found"] is None else spelled(c["found"])) for name, c in failed
    ]
    return ("case", "criterion", "wanted", "found"), rows


def verdict(report: Mapping[str, Any]) -> str:
    """The whole of it in one line.

    >>> verdict({"cases": [{"criteria": [{"ok": True}, {"ok": False}], "ok": False}]})
    '1 of 2 criteria does not hold, in 1 case'
    """
    cases, every = report["cases"], counted(len(report["cases"]), "case")
    judged = [c["ok"] for case in cases for c in case["criteria"]]
    if all(judged):
        return f"all {len(judged)} criteria hold, in {every}"
    broken, failed = judged.count(False), sum(not case["ok"] for case in cases)
    where = f"{failed} of {every}" if len(cases) > 1 else every
    return f"{broken} of {len(judged)} criteria {'does' if broken == 1 else 'do'} not hold, in {where}"


def markdown(report: Mapping[str, Any]) -> str:
    """The report for people: the verdict first."""
    return "\n".join(_markdown(report)) + "\n"


def _markdown(report: Mapping[str, Any]) -> Iterator[str]:
    model, text, labels = report["model"], report["text"], report["labels"]
    yield f"# Validation of {_clean(model['source'])}: {'passed' if report['ok'] else 'FAILED'}\n"
    yield f"{verdict(report)[0].upper()}{verdict(report)[1:]}.\n"
    yield from _lines(case_table(report))
    seen = f"{text['excluded']} others are left out, which a case has calibrated or trained on"
    yield f"Judged on {text['sentences']} lines of {_clean(text['name'])} (seed {text['seed']}); {seen}."
    if labels:
        pairs = f"{labels['pairs']} pairs of {_clean(labels['name'])}"
        yield f"Spearman x 100 on {pairs}; {labels['excluded']} are left out likewise."
    yield "\n## Criteria that do not hold\n"
    failed = failed_table(report)
    yield from _lines(failed) if failed[1] else ["None.\n"]
    for case in report["cases"]:
        types = ", ".join(f"{count} {name}" for name, count in case["quant_types"].items())
        yield f"## {_clean(case['name'])}: {_clean(case['config_file'])}\n\nTensors: {types}. "
        yield f"Judged with {case['activations']} activations.\n"
        kinds = [
            (kind, str(k["tensors"]), f"{k['params']:,}", number(k["cosine_mean"], 5), number(k["cosine_min"], 5),
             spelled(k["rel_mse"]))
            for kind, k in case["kinds"].items()
        ]  # fmt: skip
        yield from _lines((("kind", "tensors", "parameters", "cosine", "worst", "relative error"), kinds))
        fitted = sorted((layer for layer in case["layers"] if layer["cosine"] is not None), key=lambda x: x["cosine"])
        worst = [
            (x["name"], "x".join(map(str, x["shape"])), x["quant_type"], number(x["bits"], 2), number(x["cosine"], 5),
             spelled(x["rel_mse"]))
            for x in fitted[:WORST]
        ]  # fmt: skip
        yield from (f"- {_clean(note)}" for note in case["notes"])
        yield f"{chr(10) * bool(case['notes'])}The {len(worst)} tensors that fit worst:\n"
        yield from _lines((("name", "shape", "type", "bits", "cosine", "relative error"), worst))
    where = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    yield "## Environment\n"
    yield f"{_clean(where['machine'])}, {where['cores']} cores; Python {where['python']}, {where['platform']}."
    yield f"{versions}. Made {report['created']}."


def _lines(table: Table) -> Iterator[str]:
    header, rows = table
    yield f"| {' | '.join(header)} |\n|{'---|' * len(header)}"
    yield from (f"| {' | '.join(map(_clean, row))} |" for row in rows)
    yield ""


def number(value: float | None, digits: int) -> str:
    """With so many digits after the point; nothing for None."""
    return "" if value is None else f"{value:,.{digits}f}"


def spelled(value: float | bool | None) -> str:
    """A number of four digits that count, or a fact.

    >>> spelled(0.99987654), spelled(True), spelled(None)
    ('0.99988', 'true', '')
    """
    if value is None or isinstance(value, bool):
        return "" if value is None else str(value).lower()
    return f"{value:.5g}"


def _clean(text: str) -> str:
    """Names come from files: what Markdown or a terminal would take for an order is shown."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return re.sub(r"[\\|`*\[\]]|<(?=[A-Za-z/!?])", r"\\\g<0>", shown)
