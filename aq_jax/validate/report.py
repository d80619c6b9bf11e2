"""Write a validation's report: JSON for programs, Markdown for pull requests, a page with a chart to look at."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aq_jax.errors import escape
from aq_jax.store.files import atomic_write
from aq_jax.validate import tables
from aq_jax.validate.page import page
from aq_jax.validate.tables import Table

WORST = 10  # tensors of a case that report.md lists


def write_report(report: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write report.json, report.md and report.html, each whole or not at all.

    Args:
        report: the report, as `validate` returns it.
        folder: folder of the files, which is made if it is not there.

    Returns:
        Paths of the files.

    >>> write_report(report, "build/validation")  # doctest: +SKIP
    """
    writers = {"json": lambda r: json.dumps(r, indent=1, ensure_ascii=False), "md": markdown, "html": page}
    for suffix, text in writers.items():
        with atomic_write(Path(folder, f"report.{suffix}")) as temporary:
            temporary.write_text(text(dict(report)).rstrip("\n") + "\n", "utf-8")
    return [Path(folder, f"report.{suffix}") for suffix in writers]


def markdown(report: Mapping[str, Any]) -> str:
    """Write the report for people, the verdict first."""
    return "\n".join(_markdown(report)) + "\n"


def _markdown(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"# Validation of {_clean(report['model']['source'])}: {'passed' if report['ok'] else 'FAILED'}\n"
    verdict = tables.verdict(report)
    yield f"{verdict[0].upper()}{verdict[1:]}.\n"
    yield from _lines(tables.case_table(report))
    yield from map(_clean, tables.basis(report))
    yield "\n## Criteria that do not hold\n"
    failed = tables.failed_table(report)
    yield from _lines(failed) if failed[1] else ["None.\n"]
    for case in report["cases"]:
        types = ", ".join(f"{count} {name}" for name, count in case["quant_types"].items())
        yield f"## {_clean(case['name'])}: {_clean(case['config_file'])}\n"
        yield f"Tensors: {types}. Judged with {case['activations']} activations.\n"
        yield from _lines(tables.kind_table(case))
        yield from (f"- {_clean(note)}" for note in case["notes"])
        worst = tables.tensor_table(case, WORST)
        yield f"{chr(10) * bool(case['notes'])}The {len(worst[1])} tensors that fit worst:\n"
        yield from _lines(worst)
    yield f"## Environment\n\n{_clean(tables.machine(report))}"


def _lines(table: Table) -> Iterator[str]:
    header, rows = table
    yield f"| {' | '.join(header)} |\n|{'---|' * len(header)}"
    yield from (f"| {' | '.join(map(_clean, row))} |" for row in rows)
    yield ""


def _clean(text: str) -> str:
    """Show what Markdown or a terminal would take for an order: names come from files."""
    return re.sub(r"[\\|`*\[\]]|<(?=[A-Za-z/!?])", r"\\\g<0>", escape(text))
