"""A validation report as one page that needs nothing else: no network, no script to be read, light and dark."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from aq_jax.errors import FormatError
from aq_jax.validate import figures, tables
from aq_jax.validate.figures import Case
from aq_jax.validate.markup import TIMES, Child, Html, at, counted, el, megabytes, number, real, words
from aq_jax.validate.style import SCRIPT, STYLE

SCHEMA = 1


def render(report: Mapping[str, Any]) -> str:
    """The page of a report: of the same report, the same bytes.

    Args:
        report: what report.json holds, schema 1. What is missing, or not a number, is shown as a dash.

    Returns:
        HTML, whole: style, script and charts are in it, and nothing is fetched.

    Raises:
        FormatError: for a report of another schema.

    >>> page = render({"schema": 1, "ok": True, "model": {"source": "models/tiny"}, "cases": []})
    >>> page[:15], "<title>Validation of tiny</title>" in page
    ('<!DOCTYPE html>', True)
    """
    if report.get("schema") != SCHEMA:
        raise FormatError(
            f"report: schema is {report.get('schema')!r}; wanted {SCHEMA}: write it again with this version"
        )
    cases = [case for case in report.get("cases") or () if isinstance(case, Mapping)]
    source = words(at(report, "model", "source"))
    folders = [part for part in re.split(r"[/\\:]", source) if part]
    name = next((part for part in reversed(folders) if part != "model"), source)
    parts = [
        ("cases", "Cases", tables.cases(cases)),
        ("tradeoff", "Size and accuracy", figures.tradeoff(cases)),
        ("errors", "Where the error is", figures.errors(cases)),
        ("distributions", "Distributions", figures.distributions(cases)),
        ("time", "Time", figures.times(cases)),
        ("criteria", "Criteria", tables.criteria(cases)),
        ("layers", "Layers", tables.layers(cases)),
        ("about", "About this run", tables.about(report, cases)),
    ]
    # What is in a report comes from files: even if markup got through, the policy would run no script but ours.
    policy = f"default-src 'none'; style-src '{_digest(STYLE)}'; script-src '{_digest(SCRIPT)}'; base-uri 'none'"
    head = [
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"Validation of {name}"),
        el("style", Html(STYLE)),
    ]
    links = [el("li", el("a", title, href=f"#{key}")) for key, title, _ in parts]
    body = [
        el(
            "header",
            el("p", f"Validation report, {words(report.get('created'))}", class_="over"),
            el("h1", name),
            _facts(report),
            _verdict(report, cases),
            el("nav", el("ul", links), aria_label="Parts of this page"),
        ),
        el("main", [_section(*part) for part in parts]),
        el("footer", "Made of report.json alone."),
        el("script", Html(SCRIPT)),
    ]
    page = el("html", el("head", head), el("body", body), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _section(key: str, title: str, content: Child) -> Html:
    return el("section", el("h2", title, id=f"{key}-head"), content, id=key, aria_labelledby=f"{key}-head")


def _facts(report: Mapping[str, Any]) -> Html:
    model, sentences = at(report, "model"), at(report, "text")
    facts = [
        at(model, "architecture"),
        f"{number(at(model, 'params'))} parameters in {number(at(model, 'tensors'))} tensors",
        f"{megabytes(at(model, 'float32_bytes'))} in float32",
        f"{number(at(sentences, 'sentences'))} sentences, {words(at(sentences, 'name'))}" if sentences else None,
    ]
    return el("p", [el("span", fact) for fact in facts if fact], class_="facts")


def _verdict(report: Mapping[str, Any], cases: Sequence[Case]) -> Html:
    """What it all comes to, and each thing that is not as wanted."""
    found = [(case, c) for case in cases for c in case.get("criteria") or ()]
    broken = [(case, c) for case, c in found if not c.get("ok")]
    if not cases:
        kind, title, mark = "", "No case was validated", "M8 12h8"
    elif report.get("ok") and not broken:
        kind, mark = "good", "M7.5 12.4l3 3 6-6.6"
        title = f"All {len(found)} criteria hold" if found else "Nothing failed, and no criteria were set"
    else:
        kind, mark = "bad", "M8.5 8.5l7 7m0-7l-7 7"
        title = f"{len(broken)} of {len(found)} criteria {'does' if len(broken) == 1 else 'do'} not hold"
        title = title if broken else "Not everything is as it should be"
    path = el("circle", cx="12", cy="12", r="11", class_="sign"), el("path", d=mark)
    ratios = [r for case in cases if (r := real(at(case, "size", "ratio_float32"))) is not None]
    span = " to ".join(number(r, ".2f", TIMES) for r in dict.fromkeys((min(ratios), max(ratios)))) if ratios else ""
    said = counted(len(cases), "case") + f", {span} smaller than float32" * bool(span)
    failed = sum(not case.get("ok") for case in cases)
    said += (f"; {failed} of them failed." if len(cases) > 1 else "; it failed.") if failed else "."
    lines = [
        el(
            "li",
            el("b", words(case.get("name"))),
            f": {words(c.get('name'))} is {tables.found(c.get('found'))}, wanted {tables.wanted(c.get('wanted'))}",
        )
        for case, c in broken
    ]
    inside = el("p", said) if cases else None, el("ul", lines) if lines else None
    icon = el("svg", path, viewBox="0 0 24 24", aria_hidden="true")
    return el("div", icon, el("div", el("h2", title), inside), class_=f"verdict {kind}".strip())
