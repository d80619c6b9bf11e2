"""The page of a report: whole, well formed, self-contained, and never broken by what is in a report."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
import sample_report

from aq_jax.errors import FormatError
from aq_jax.validate import charts, pareto
from aq_jax.validate.heatmap import Plan, Scale, heat_map, part
from aq_jax.validate.html import render
from aq_jax.validate.markup import DASH, TIMES, el

VOID = {"meta", "br", "col"}
HOSTILE = "<script>alert(1)</script>\"'&amp;</style></svg>]]>\x00\x1b[2J\u202e\ud800\nhttp:"


class Page(HTMLParser):
    """What is in a page; fails where an element is closed that is not open, or the other way round."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"script", "style"}:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def checked(page: str) -> Page:
    """The page, after all that must hold of any page."""
    found = Page(page)
    page.encode("utf-8")
    assert page.startswith("<!DOCTYPE html>\n<html lang=")
    for tag in ("html", "head", "body", "h1", "main", "style"):
        assert len(found.all(tag)) == 1, tag
    assert len(found.all("script")) == page.count("<script") == 1
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in found.tags:
        assert not {"src", "style", "onclick", "onload", "xlink:href"} & set(attrs), tag
        assert tag not in {"link", "iframe", "object", "embed", "img", "image", "use", "base", "form"}
        if "href" in attrs:
            assert (attrs["href"] or "").removeprefix("#") in ids
        for name in ("aria-labelledby", "aria-describedby"):
            assert name not in attrs or attrs[name] in ids
        if tag == "th":
            assert attrs["scope"] in {"col", "row", "colgroup"}
    assert page.count("<caption") == page.count("<table")
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        root = ET.fromstring(svg)
        if root.get("role") == "img":
            assert [child.tag for child in root][:2] == ["title", "desc"]
            assert all((child.text or "").strip() for child in root[:2])
        for name, value in ((n, v) for e in root.iter() for n, v in e.items() if n not in {"class", "id"}):
            assert not re.search(r"\b(nan|inf|none)\b", value, re.IGNORECASE), (name, value)
    return found


def changed(value: Any, change: Callable[[Any], Any], keep: tuple[str, ...] = ("schema",)) -> Any:
    """A report with every leaf changed, except those under some keys."""
    if isinstance(value, dict):
        return {k: v if k in keep else changed(v, change, keep) for k, v in value.items()}
    return [changed(v, change, keep) for v in value] if isinstance(value, list) else change(value)


def without(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything that can be left out of a report; of lists, the first item stands for all."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from without(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield from without(value[0], (*path, 0))


def at(value: Any, path: list[Any]) -> Any:
    """What lies at a path."""
    return at(value[path[0]], path[1:]) if path else value


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return sample_report.sample()


@pytest.fixture(scope="module")
def page(report: dict[str, Any]) -> str:
    return render(report)


def small(**changes: Any) -> dict[str, Any]:
    """One case of a report, with few layers."""
    report = sample_report.sample()
    case = report["cases"][0] | changes
    return report | {"cases": [case], "ok": case["ok"]}


def test_page_is_well_formed_and_complete(page: str, report: dict[str, Any]) -> None:
    found = checked(page)
    text = "\n".join(found.text)
    heads = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert heads[1:] == [
        "Cases",
        "Size and accuracy",
        "Where the error is",
        "Distributions",
        "Time",
        "Criteria",
        "Layers",
        "About this run",
    ]
    for case in report["cases"]:
        for row in case["layers"]:
            assert row["name"] in text
        for criterion in case["criteria"]:
            assert criterion["name"] in text
        assert case["digests"]["table"] in text
        assert case["config_file"] in text
        assert all(note in text for note in case["notes"])
    tables = re.findall(r'<table class="sortable">.*?</table>', page)
    assert [table.count("<tr") for table in tables] == [1 + len(case["layers"]) for case in report["cases"]]
    # the chart, the scale, a map and three histograms for each case, two breakdowns of time
    assert sum(attrs.get("role") == "img" for attrs in found.all("svg")) == 1 + 1 + 5 * 4 + 2
    assert report["environment"]["versions"]["jax"] in text
    assert "1 of 35 criteria does not hold" in text
    assert "; 1 of them failed." in text
    assert re.search(r">activations</th>", page)
    assert "Its bytes come in where they are first used" in text


def test_nothing_is_fetched(page: str) -> None:
    assert not re.search(r"https?:|//\w|url\(|@import|data:|fetch\(|XMLHttp|import\(", page)
    policy = next(attrs["content"] for attrs in Page(page).all("meta") if "http-equiv" in attrs)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_the_same_report_gives_the_same_bytes(page: str, report: dict[str, Any]) -> None:
    assert render(json.loads(json.dumps(report))) == page


def test_verdict_says_which_criteria_do_not_hold() -> None:
    report = small()
    assert "All 7 criteria hold" in render(report)
    report["cases"][0]["criteria"][0] |= {"ok": False, "found": 1.5}
    report["cases"][0]["ok"] = report["ok"] = False
    page = render(report)
    assert "1 of 7 criteria does not hold" in page
    assert f"1 case, 3.94{TIMES} smaller than float32; it failed." in page
    assert "<b>int8</b>: ratio_float32 is 1.5, wanted ≥ 3.9" in page
    report["cases"][0]["criteria"][0]["found"] = None
    assert "ratio_float32 is not measured, wanted" in render(report)
    report["cases"][0]["criteria"] = []
    assert "Not everything is as it should be" in render(report)


def test_everything_from_a_report_is_escaped(report: dict[str, Any]) -> None:
    hostile = changed(report, lambda leaf: leaf + HOSTILE if isinstance(leaf, str) else leaf)
    for case in hostile["cases"]:
        case["outputs"]["kind"] = "embeddings"
        for part_of in (
            case["quant_types"],
            case["kinds"],
            case["seconds"]["convert"],
            case["schemas"],
            case["config"],
        ):
            part_of[HOSTILE] = next(iter(part_of.values()))
    hostile["environment"]["versions"][HOSTILE] = HOSTILE
    page = render(hostile)
    checked(page)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    shown = page[page.index("</style></head>") :]
    assert shown.count("alert(1)") == shown.count("&lt;script&gt;alert(1)") > 100
    assert shown.count("<script") == 1


@pytest.mark.parametrize("leaf", [None, math.nan, math.inf, -math.inf, -1, 0, 0.0, 1e308, 5e-324, 10**400, "x", [], {}])
def test_no_number_breaks_a_chart(report: dict[str, Any], leaf: Any) -> None:
    page = render(changed(report, lambda value: value if isinstance(value, str | bool) else leaf))
    checked(page)
    assert all(case["name"] in page for case in report["cases"])


def test_not_a_number_is_a_dash(report: dict[str, Any]) -> None:
    for leaf in (None, math.nan):
        page = render(changed(report, lambda value, leaf=leaf: value if isinstance(value, str | bool) else leaf))
        assert DASH + "</td>" in page
        assert not re.search(r">nan\b|>None\b", page)


@pytest.mark.slow
def test_what_is_missing_breaks_nothing() -> None:
    tokens = sample_report.tokens()["cases"][0]["outputs"]
    layers = sample_report.sample()["cases"][0]["layers"][2:7]
    for whole, within in ((small(layers=layers), ""), (small(layers=layers, outputs=tokens), "outputs")):
        text = json.dumps(whole)
        for *path, last in without(whole):
            if last != "schema" and (not within or within in path):
                null, gone = json.loads(text), json.loads(text)
                at(null, path)[last] = None
                del at(gone, path)[last]
                checked(render(null))
                checked(render(gone))


def test_few_cases_and_few_layers() -> None:
    report = sample_report.sample() | {"cases": [], "ok": True}
    page = render(report)
    checked(page)
    assert "No case was validated" in page
    assert page.count("<svg") == 1

    quantized = next(row for row in sample_report.sample()["cases"][0]["layers"] if row["rel_mse"] is not None)
    for layers in ([], [quantized], [quantized | {"rel_mse": 0.0, "cosine": 1.0}], [quantized | {"layer": 3}]):
        page = render(small(layers=layers))
        checked(page)
        assert ('id="map-0-title"' in page) == bool(layers)


def test_case_without_quantized_tensors() -> None:
    case = sample_report.sample()["cases"][0]
    plain = [row | {"quant_type": "none", "cosine": None, "rel_mse": None} for row in case["layers"]]
    empty = {"count": 0, "mean": None, "std": None, "p1": None, "min": None, "histogram": {"edges": [], "counts": []}}
    changes = {
        "layers": plain,
        "kinds": {},
        "layer_cosines": empty,
        "layer_errors": empty,
        "quant_types": {"none": len(plain)},
    }
    assert "No case has quantized tensors" in render(small(**changes))
    report = sample_report.sample()
    report["cases"][1] |= changes
    page = render(report)
    checked(page)
    assert page.count("Nothing is quantized.") == 1


def test_language_model_is_drawn_by_its_divergence() -> None:
    page = render(sample_report.tokens())
    checked(page)
    assert "KL divergence from float" in page
    assert "Cosines of outputs" not in page
    report = changed(sample_report.tokens(), lambda leaf: leaf)
    for case in report["cases"]:
        case["outputs"]["kl"] = None
    assert "better: perplexity" in render(report)


def test_another_schema_is_refused() -> None:
    with pytest.raises(FormatError, match="schema is 2; wanted 1"):
        render({"schema": 2})


def test_points_that_are_beaten_are_not_on_the_frontier() -> None:
    points = [
        pareto.Point(name, bits, loss, "", 0) for name, bits, loss in (("a", 2, 0.2), ("b", 3, 0.3), ("c", 3, 0.1))
    ]
    assert [point.name for point in pareto.frontier(points)] == ["a", "c"]
    chart = pareto.tradeoff(points, "loss", str)
    assert (chart.count("<circle"), chart.count("point beaten")) == (3, 1)


def test_labels_of_near_points_do_not_overlap() -> None:
    points = [pareto.Point(f"case {i}", 4 + 0.02 * i, 0.01 + 0.0001 * i, "7.50x, cosine 0.9900", i) for i in range(6)]
    names = re.findall(
        r'<text x="([\d.]+)" y="([\d.]+)" class="strong" text-anchor="(\w+)">', pareto.tradeoff(points, "a", str)
    )
    boxes = []
    for x, y, anchor in names:
        left = float(x) - (110 if anchor == "end" else 0)
        boxes.append((left, float(y), left + 110, float(y) + 24))
    assert len(boxes) == 6
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_ticks_are_round_and_inside() -> None:
    for low, high in ((0, 1), (0.57, 0.99), (0.9981, 0.99961), (-3, 4), (1e-9, 2e-9), (0, 1e6), (1, 1)):
        found = charts.ticks(low, high)
        assert 1 <= len(found) <= 9
        assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in found)
        assert found == sorted(set(found))


def test_map_has_a_cell_for_each_tensor_and_columns_by_kind_if_there_are_many() -> None:
    rows = [
        {
            "name": f"model.layers.{i}.mlp.part{j}.weight",
            "kind": "feed-forward",
            "layer": i,
            "params": 4,
            "rel_mse": 0.01,
        }
        for i in range(3)
        for j in range(20)
    ]
    plan = Plan.of([rows[::20] + rows[1::20]])
    assert plan.columns == ("mlp.part0", "mlp.part1")
    assert Plan.of([rows]).columns == ("feed-forward",)
    few = heat_map("m", "a", rows[::20] + rows[1::20], plan, Scale.of([0.01]))
    assert few is not None
    assert few.count("<rect") == 6
    assert part("a.weight", None) == "a"


def test_markup_escapes_what_is_not_markup() -> None:
    assert el("b", "<i>", title='"&') == '<b title="&quot;&amp;">&lt;i&gt;</b>'
    assert el("p", None, ["a", el("br")], hidden=True, lang=None) == '<p hidden="">a<br></p>'
