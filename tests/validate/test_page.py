"""The page of a report: whole, self-contained, and never broken by what is in a report."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import sample_report
from hypothesis import given
from hypothesis import strategies as st

from aq_jax.validate.chart import LETTER, LINE, Point, draw, frontier
from aq_jax.validate.page import page
from aq_jax.validate.tables import case_table

HOSTILE = "<script>alert(1)</script>\"'&amp;</style></svg>]]>\x00\x1b[2J\u202e\ud800\nhttp:"
points = st.lists(
    st.builds(Point, st.text("ab ", min_size=1, max_size=20), st.sampled_from([0.0, 2, 4, 4.1, 8]),
              st.sampled_from([0, 1e-9, 1e-3, 1.1e-3, 0.5, 1.9]), st.just(""), st.sampled_from(["ours", "peer"])),
    min_size=1, max_size=8,
)  # fmt: skip


class Page(HTMLParser):
    """Read a page; fails where an element is closed that is not open, or the other way round."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def checked(text: str) -> Page:
    """Check what must hold of any page: it is well formed, fetches nothing, runs nothing, and draws no NaN."""
    found = Page(text)
    text.encode("utf-8")
    assert {tag for tag, _ in found.tags} <= {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "p", "b", "div", "ul", "li", "main",
        "section", "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "details", "summary",
        "svg", "desc", "line", "text", "path", "circle",
    }  # fmt: skip
    for tag, attributes in found.tags:
        assert not {"src", "href", "style", "onclick", "onload"} & set(attributes), tag
        assert tag == "meta" or not re.search(
            r"\b(nan|inf|none)\b", " ".join(map(str, attributes.values())), re.IGNORECASE
        ), attributes
    style = text[text.index("<style>") + 7 : text.index("</style>")]
    assert not re.search(r"url\(|@import|https?:", style)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = (attributes["content"] for _, attributes in found.tags if "http-equiv" in attributes)
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'"
    return found


def changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change every leaf of a report."""
    if isinstance(value, dict):
        return {key: changed(inner, change) for key, inner in value.items()}
    return [changed(inner, change) for inner in value] if isinstance(value, list) else change(value)


def test_the_page_has_all_of_the_report() -> None:
    report = sample_report.sample()
    text = "\n".join(checked(page(report)).text)
    assert "1 of 6 criteria does not hold, in 1 of 3 cases." in text
    assert "outputs.cosine.mean is 0.579, wanted >= 0.9" in text
    for case in report["cases"]:
        assert all(layer["name"] in text for layer in case["layers"] if layer["cosine"] is not None)
        assert all(criterion["name"] in text for criterion in case["criteria"])
        assert {case["name"], case["digests"]["table"], *case["notes"]} <= set(re.split(r"\n|; digest ", text))
    for words in ("other 4 bits", "jax 0.10.2", "the float model's is 82.00", *case_table(report)[0]):
        assert words in text
    assert page(sample_report.sample()) == page(report)


def test_everything_from_a_report_is_escaped() -> None:
    hostile = changed(sample_report.sample(), lambda leaf: leaf + HOSTILE if isinstance(leaf, str) else leaf)
    hostile["environment"]["versions"][HOSTILE] = HOSTILE
    for case in hostile["cases"]:
        for part in (case["quant_types"], case["kinds"]):
            part[HOSTILE] = next(iter(part.values()))
    text = page(hostile)
    checked(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    assert text.count("alert(1)") == text.count("&lt;script&gt;alert(1)") > 100


def test_what_was_not_measured_is_a_dash_and_not_drawn() -> None:
    report = sample_report.sample()
    first = report["cases"][0]
    first |= {"rel_mse": None, "layer_cosines": None, "layer_errors": None}
    first["outputs"] |= {"spearman": None, "cosine": None}
    first["criteria"][1] |= {"found": None, "ok": False}
    text = page(report)
    checked(text)
    assert text.count("<td>\u2013</td>") > 5
    assert "outputs.cosine.mean is nothing, wanted" in text
    assert "int8: " not in text  # as points are described
    for case in report["cases"]:
        case["outputs"]["cosine"] = None
    assert "<svg" not in page(report)


def test_a_language_model_is_drawn_by_its_divergence() -> None:
    text = page(sample_report.tokens())
    checked(text)
    assert "KL divergence from the float model" in text
    assert "The float model&#x27;s perplexity is 3.214." in text


@given(points)
def test_the_frontier_is_what_nothing_beats(given_points: list[Point]) -> None:
    best = frontier(given_points)
    for point in given_points:
        beaten = [p for p in given_points if p.bits <= point.bits and p.loss < point.loss]
        equal = [p for p in best if (p.bits, p.loss) == (point.bits, point.loss)]
        smaller = [p for p in given_points if p.bits < point.bits and p.loss == point.loss]
        assert bool(equal) is not bool(beaten or smaller)


@given(points)
def test_names_in_a_chart_are_not_written_over_each_other(given_points: list[Point]) -> None:
    label = r'<text x="([-\d.]+)" y="([-\d.]+)"( text-anchor="end")? class="\w+">([^<]*)'
    found = re.findall(label, draw(given_points, "a", str))
    assert len(found) == len(given_points)
    boxes = [(float(x) - (LETTER * len(name) if end else 0), float(y), LETTER * len(name)) for x, y, end, name in found]
    for i, (x, y, width) in enumerate(boxes):
        for other_x, other_y, other_width in boxes[:i]:
            apart = x >= other_x + other_width - 0.2 or other_x >= x + width - 0.2
            assert apart or abs(y - other_y) >= LINE - 0.2
