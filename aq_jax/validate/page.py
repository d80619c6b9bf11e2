"""Write a validation's report as one page that fetches nothing and runs nothing, light and dark."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aq_jax.validate import tables
from aq_jax.validate.chart import Point, draw
from aq_jax.validate.markup import Html, el
from aq_jax.validate.tables import Table, lookup

STYLE = Path(__file__).with_name("page.css").read_text("utf-8")
# What cases are compared by, the first that any of them has: path, name, loss of a figure, figure of a loss.
AXES: tuple[tuple[str, str, Callable[[float], float], Callable[[float], str]], ...] = (
    ("outputs.cosine.mean", "output cosine", lambda cosine: 1 - cosine, lambda loss: f"{1 - loss:.6g}"),
    ("outputs.kl.mean", "KL divergence from the float model", lambda kl: kl, lambda loss: f"{loss:.3g}"),
)


def page(report: Mapping[str, Any]) -> str:
    """Write the page of a report: of the same report, the same bytes.

    Args:
        report: the report, as `validate` returns it.

    >>> page(report)[:15]  # doctest: +SKIP
    '<!DOCTYPE html>'
    """
    folders = [part for part in re.split(r"[/\\:]", report["model"]["source"]) if part]
    name = next((part for part in reversed(folders) if part != "model"), report["model"]["source"])
    # What is in a report comes from files: even if markup got through, the policy would run and fetch nothing.
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    head = [
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=f"default-src 'none'; style-src 'sha256-{digest}'"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", f"Validation of {name}"),
        el("style", Html(STYLE)),
    ]
    parts = {
        "Cases": [_table(tables.case_table(report), "cases"), [el("p", said) for said in tables.basis(report)]],
        "Size and accuracy": _chart(report),
        "Criteria": [el("p", "What was found, and what was wanted."), _table(tables.criteria_table(report))],
        "Tensors": [_tensors(case) for case in report["cases"]],
        "Environment": [el("p", tables.machine(report))],
    }
    sections = [el("section", el("h2", title), content) for title, content in parts.items() if content]
    body = [el("header", _title(report, name)), el("main", sections)]
    return f"<!DOCTYPE html>\n{el('html', el('head', head), el('body', body), lang='en')}\n"


def _title(report: Mapping[str, Any], name: str) -> list[Html]:
    model, verdict = report["model"], tables.verdict(report)
    facts = (
        f"{model['architecture']}, {model['params']:,} parameters in {model['tensors']} tensors, "
        f"{model['float32_bytes'] / 1e6:.1f} MB in float32"
    )
    failed = [
        el("li", el("b", case), f": {criterion} is {found}, wanted {wanted}")
        for case, criterion, wanted, found in tables.failed_table(report)[1]
    ]
    said = el("p", el("b", f"{verdict[0].upper()}{verdict[1:]}."))
    return [
        el("p", "Validation"),
        el("h1", name),
        el("p", facts),
        el("div", said, el("ul", failed) if failed else None, class_="holds" if report["ok"] else "fails"),
    ]


def _chart(report: Mapping[str, Any]) -> list[Html]:
    """Draw bits a weight against accuracy; nothing where no case has one."""
    for path, axis, loss, tick in AXES:
        cases = [(case, found) for case in report["cases"] if (found := lookup(case, path)) is not None]
        if not cases:
            continue
        ours = [
            Point(case["name"], case["size"]["bits_per_weight"], max(0.0, loss(found)), f"{found:.4g}",
                  "ours" if case["ok"] else "failed")
            for case, found in cases
        ]  # fmt: skip
        peers = [
            Point(peer["name"], peer["bits_per_weight"], max(0.0, loss(peer["accuracy"])), f"{peer['accuracy']:.4g}",
                  "peer")
            for peer in report["config"]["peers"]
        ]  # fmt: skip
        about = "The dotted line joins what nothing else beats in both; the vertical axis is logarithmic."
        beside = " Hollow: other libraries, as the config has their figures." if peers else ""
        chart = el("div", draw([*peers, *ours], axis, tick), class_="wide", tabindex="0")
        return [el("figure", chart, el("figcaption", about + beside))]
    return []


def _tensors(case: Mapping[str, Any]) -> Html:
    types = ", ".join(f"{count} {name}" for name, count in case["quant_types"].items())
    notes = [el("li", note) for note in case["notes"]]
    content = [
        el("p", f"{case['config_file']}; digest {case['digests']['table']}"),
        el("ul", notes) if notes else None,
        _table(tables.kind_table(case)),
        _table(tables.tensor_table(case)),
    ]
    return el("details", el("summary", el("b", case["name"]), f" {types}"), content)


def _table(table: Table, class_: str | None = None) -> Html:
    """Build a table; what is wider than the screen scrolls by itself."""
    header, rows = table
    head = el("thead", el("tr", [el("th", name, scope="col") for name in header]))
    body = el("tbody", [el("tr", el("th", row[0], scope="row"), map(_cell, row[1:])) for row in rows])
    return el("div", el("table", head, body, class_=class_), class_="wide", tabindex="0")


def _cell(text: str) -> Html:
    return el("td", text or "\u2013", class_="bad" if text == "FAILS" or text.endswith("✗") else None)
