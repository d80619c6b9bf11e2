"""The page in a real browser: drawn, sorted, in light and in dark, on a phone, and without scripts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sample_report

from aq_jax.validate.html import render
from aq_jax.validate.markup import DASH

playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser's driver: pip install playwright")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Nothing of the browser's own goes out either.
OPTIONS = ("--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = [path for name in NAMES if (path := shutil.which(name))]
        own = driver.chromium.executable_path
        path = found[0] if found else own if Path(own).exists() else None
        if path is None:
            pytest.skip("needs a browser: apt-get install chromium, or playwright install chromium")
        sandbox = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []  # root has none
        running = driver.chromium.launch(executable_path=path, args=[*OPTIONS, *sandbox])
        yield running
        running.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(sample_report.sample()), "utf-8")
    return path


@pytest.fixture
def visit(browser: Any, file: Path) -> Iterator[Any]:
    """Opens the page; at the end, nothing was fetched and nothing was complained of."""
    contexts, complaints, fetched = [], [], []

    def opened(**options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert fetched == [file.as_uri()] * len(contexts)


def luminance(colour: str) -> float:
    """Of rgb(1, 2, 3), as WCAG reckons it."""
    parts = [float(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def colour(page: Any, selector: str, name: str = "color") -> str:
    return page.locator(selector).first.evaluate("(element, name) => getComputedStyle(element)[name]", name)


def boxes(page: Any) -> list[dict[str, float]]:
    return [svg.bounding_box() for svg in page.locator("svg.chart").all()]


def test_charts_are_drawn(visit: Any) -> None:
    page = visit()
    drawn = boxes(page)
    assert len(drawn) == 1 + 1 + 5 * 4 + 2
    assert all(box["width"] > 100 and box["height"] > 20 for box in drawn)
    for mark in ("#tradeoff circle", "#errors rect.c0", "#distributions rect", "#time rect"):
        box = page.locator(mark).first.bounding_box()
        assert min(box["width"], box["height"]) > 0.5, mark
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def column(page: Any, number: int) -> list[str]:
    cells = page.locator(f"#case-0 table.sortable tbody tr > :nth-child({number})").all_inner_texts()
    return [cell.strip() for cell in cells]


def test_tables_are_sorted_by_mouse_and_by_keyboard(visit: Any) -> None:
    page = visit()
    heads = page.locator("#case-0 table.sortable thead th")
    before = column(page, 1)
    error = heads.nth(9)
    assert error.get_attribute("aria-sort") is None
    error.get_by_role("button").click()
    assert error.get_attribute("aria-sort") == "ascending"
    found = [float(cell) for cell in column(page, 10) if cell != DASH]
    assert len(found) == 40
    assert found == sorted(found)
    assert column(page, 10)[40:] == [DASH] * 63  # what has no value stays at the end
    error.get_by_role("button").press("Enter")
    assert error.get_attribute("aria-sort") == "descending"
    found = [float(cell) for cell in column(page, 10)[:40]]
    assert found == sorted(found, reverse=True)

    heads.nth(0).get_by_role("button").press("Space")
    assert heads.nth(0).get_attribute("aria-sort") == "ascending"
    assert error.get_attribute("aria-sort") is None
    after = column(page, 1)
    assert after != before
    assert after == sorted(before, key=str.lower)
    assert page.locator("#case-1 [aria-sort]").count() == 0


def test_text_stands_out_in_light_and_in_dark(visit: Any) -> None:
    papers = []
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme)
        paper = colour(page, "body", "backgroundColor")
        papers.append(paper)
        for selector in ("h1", ".facts", "nav a", "td", "thead th", "tbody th", "figcaption", ".yes"):
            assert contrast(colour(page, selector), paper) >= 4.5, (scheme, selector)
        for selector in ("text.tick", "text.strong", "text.name"):
            assert contrast(colour(page, selector, "fill"), paper) >= 4.5, (scheme, selector)
        for selector in (".verdict h2", ".verdict li"):
            assert contrast(colour(page, selector), colour(page, ".verdict", "backgroundColor")) >= 4.5
        pairs = [(f"--c{i}", f"--d{i}") for i in range(9)] + [(f"--t{i}", "--on") for i in range(9)]
        for behind, before in pairs:  # all steps of the scale, whether or not the sample has them
            found = page.locator("h1").evaluate(
                "(element, names) => names.map(name => { element.style.color = `var(${name})`;"
                " return getComputedStyle(element).color; })",
                [behind, before],
            )
            assert contrast(*found) >= 4.5, (scheme, behind, before, found)
        for i in range(8):
            dots = page.locator("h1").evaluate(
                "(element, name) => { element.style.color = `var(${name})`; return getComputedStyle(element).color; }",
                f"--s{i}",
            )
            assert contrast(dots, paper) >= 3, (scheme, i)
    assert papers[0] != papers[1]


def test_phone_scrolls_tables_and_not_the_page(visit: Any) -> None:
    page = visit(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    table = page.locator("#cases .scroll")
    assert table.evaluate("element => element.scrollWidth > element.clientWidth")
    assert all(box["width"] > 0 for box in boxes(page))


def test_page_is_complete_without_scripts(visit: Any) -> None:
    page = visit(java_script_enabled=False)
    assert page.locator("th button").count() == 0
    assert page.locator("#case-0 table.sortable tbody tr").count() == 103
    assert page.locator("#case-0 table.sortable").get_by_text("encoder.layer.5.output.dense.weight").is_visible()
    assert all(box["width"] > 100 for box in boxes(page))
    second = page.locator("#case-1")
    assert not second.locator("table.sortable").is_visible()
    second.locator("summary").click()
    assert second.locator("table.sortable").is_visible()


def test_print_shows_the_tables_of_every_case(visit: Any) -> None:
    page = visit(java_script_enabled=False)
    page.emulate_media(media="print", color_scheme="dark")
    assert colour(page, "body", "backgroundColor") == "rgb(255, 255, 255)"
    for i in range(5):
        assert page.locator(f"#case-{i} table.sortable tbody tr").last.bounding_box()["height"] > 5
